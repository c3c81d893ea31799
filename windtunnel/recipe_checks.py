"""Contradictions inside a recipe, found before any work. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from windtunnel.base.errors import RecipeError
from windtunnel.base.units import Length, si
from windtunnel.model.shape import Shape
from windtunnel.recipe_errors import nearest
from windtunnel.recipe_growth import Problem, growth
from windtunnel.recipe_posttraining import posttraining
from windtunnel.recipe_schema import Recipe
from windtunnel.tunnel.space import DEFAULT_SPACE, grid, space_of

_STATED = {
    "learning_rate": "optimizer.lr", "init_std": "model.init_std", "scale_emb": "model.scale_emb",
    "scale_depth": "model.scale_depth", "weight_decay": "optimizer.weight_decay", "beta2": "optimizer.beta2",
    "warmup": "trunk.warmup", "qk_norm": "model.qk_norm", "optimizer": "optimizer.kind", "decay": "optimizer.decay",
}  # fmt: skip
"""Where a recipe states what an axis would search."""
_SCHEMES = ("pypi:", "hf:", "made:")


def check(recipe: Recipe) -> None:
    """Raises on the first contradiction.

    Raises:
        RecipeError: two values of the recipe cannot both hold; the message names the line of one of them.
    """
    for find in CHECKS:
        try:
            problem = next(iter(find(recipe)), None)
        except RecipeError as error:  # from a family or a shape, which do not know the file
            fix = error.fix or f"sizes of '{recipe.family.name}': {', '.join(m.name for m in recipe.family.members)}"
            raise RecipeError(recipe.where(error.where), error.problem, fix) from None
        if problem is not None:
            raise RecipeError(recipe.where(problem.key), problem.problem, problem.fix)


def check_files(recipe: Recipe) -> None:
    """Raises if a local file that the recipe names is not there; globs and remote sources are left to the reader.

    Raises:
        RecipeError: with the line of the path.
    """
    places = [(f"corpus.{name}.source", source) for name, corpus in recipe.corpus.items() for source in corpus.source]
    places += [
        (f"corpus.{name}.decontaminate", p) for name, corpus in recipe.corpus.items() for p in corpus.decontaminate
    ]
    places += [(f"evaluate.tasks.{name}", path) for name, path in recipe.evaluate.tasks.items()]
    if recipe.tokenizer.path:
        places.append(("tokenizer.path", recipe.tokenizer.path))
    for key, named in places:
        path = named.partition("+")[2] if named.startswith("made:long/") else named
        if path.startswith(_SCHEMES) or any(mark in path for mark in "*?["):
            continue
        scheme, colon, _ = path.partition("://")
        if colon:
            raise RecipeError(
                recipe.where(key), f"expected a path, pypi: or hf:, got {scheme + '://'!r}", "download it first"
            )
        try:
            there = (recipe.base / path).exists()
        except (OSError, ValueError):
            there = False
        if not there:
            fix = "paths are relative to the recipe's folder"
            raise RecipeError(recipe.where(key), f"expected an existing file or folder, got {path[:120]!r}", fix)


def _dial(recipe: Recipe) -> Iterator[Problem]:
    model, budget = recipe.model, recipe.budget
    stated = [f"model.{name}" for name in ("size", "shape") if getattr(model, name) is not None]
    stated += ["budget"] if budget else []
    if not stated:
        yield Problem("model", "expected a size, a shape or a [budget], got none", 'write for example size = "0.3M"')
    if len(stated) > 1:
        yield Problem(
            stated[-1], f"expected one of size, shape and budget, got {' and '.join(stated)}", "leave the others out"
        )
    if budget:
        amounts = [name for name in ("hours", "gpu_hours", "flops", "money") if getattr(budget, name) is not None]
        if len(amounts) != 1:
            got = " and ".join(amounts) or "none"
            yield Problem("budget", f"expected exactly one of hours, gpu_hours, flops and money, got {got}")
        if amounts == ["money"] and not (recipe.machine and recipe.machine.price):
            yield Problem("budget.money", "expected a price to spend it on, got none", "give [machine] a price")
    if recipe.max_cost and not (recipe.machine and recipe.machine.price):
        yield Problem("max_cost", "expected a price to compare with, got none", "give [machine] a price")


def _names(recipe: Recipe) -> Iterator[Problem]:
    known = tuple(recipe.corpus)
    uses: list[tuple[str, Iterable[str]]] = [
        ("tokenizer.corpora", recipe.tokenizer.corpora or ()),
        ("trunk.mixture", recipe.trunk.mixture or ()),
        ("evaluate.corpora", recipe.evaluate.corpora or ()),
        *((f"branch.{name}.mixture", branch.mixture or ()) for name, branch in recipe.branch.items()),
    ]
    for key, names in uses:
        for name in names:
            if name not in known:
                yield Problem(key, f"expected a corpus of this recipe, got {name!r}", nearest(name, known))
    if recipe.trunk.mixture is None and len(known) > 1:
        example = ", ".join(f"{name} = 1" for name in known[:2])
        yield Problem(
            "trunk.mixture",
            f"expected weights for {len(known)} corpora, got none",
            f"write for example {{ {example} }}",
        )
    if "trunk" in recipe.branch:
        yield Problem("branch.trunk", "expected a name other than the trunk's, got 'trunk'", "rename the branch")
    for name in recipe.from_trunk:
        branch = recipe.branch[name]
        if branch.parent != "trunk":
            yield Problem(
                f"branch.{name}.parent",
                f"expected 'trunk' for a {branch.kind}, got {branch.parent!r}",
                f"a {branch.kind} grows from the stable run",
            )
    if recipe.export.branch and recipe.export.branch not in recipe.branch:
        fix = nearest(recipe.export.branch, recipe.branch)
        yield Problem("export.branch", f"expected a branch of this recipe, got {recipe.export.branch!r}", fix)


def _shape(recipe: Recipe) -> Iterator[Problem]:
    model, family = recipe.model, recipe.family
    if model.shape is not None:
        width, heads = model.shape.width, model.shape.heads
        if width % family.head_dim:
            yield Problem(
                "model.shape.width",
                f"expected a multiple of the head dimension {family.head_dim} of '{family.name}', got {width}",
            )
        if heads and heads * family.head_dim != width:
            fit = width // family.head_dim
            yield Problem("model.shape.heads", f"expected width / head dimension = {fit}, got {heads}", "leave it out")
    if model.base_layers is not None and model.parametrization != "completep":
        fix = "leave it out: the others do not know a base depth"
        yield Problem(
            "model.base_layers", f"expected parametrization = 'completep', got {model.parametrization!r}", fix
        )
    if model.vocabulary_regime == "large" and model.parametrization == "standard":
        yield Problem(
            "model.vocabulary_regime",
            "expected 'fixed' with parametrization = 'standard', which knows no width",
            "leave it out",
        )
    target = recipe.target_shape()
    if model.row > family.max_positions:
        yield Problem(
            "model.row", f"expected at most the {family.max_positions} positions of '{family.name}', got {model.row}"
        )
    if target is not None and target.total > 10**13:
        yield Problem("model.shape", f"expected fewer than 10T parameters, got {si(target.total)}")
    for key, batch in [
        ("trunk.batch", recipe.trunk.batch),
        *((f"branch.{n}.batch", b.batch) for n, b in recipe.branch.items() if b.kind not in ("decay", "long")),
        *((f"trunk.batch_schedule.[{i}]", change.batch) for i, change in enumerate(recipe.trunk.batch_schedule, 1)),
    ]:
        if batch is not None and batch % model.row:
            rows = max(1, round(batch / model.row))
            fix = f"write {rows * model.row} for {rows} rows"
            yield Problem(key, f"expected a multiple of model.row = {model.row}, got {batch}", fix)


def _decay_batch(recipe: Recipe) -> Iterator[Problem]:
    for name in recipe.decays:
        batch = recipe.branch[name].batch
        if batch is not None:
            problem = f"expected none, since a decay goes on with the trunk's batch, got {batch}"
            yield Problem(f"branch.{name}.batch", problem, "leave it out")


def _batch_schedule(recipe: Recipe) -> Iterator[Problem]:
    trunk, shape = recipe.trunk, recipe.target_shape()
    if not trunk.batch_schedule:
        return
    if trunk.batch is None:
        yield Problem(
            "trunk.batch_schedule", "expected trunk.batch beside a schedule, got none", "write the batch it begins with"
        )
    whole = _tokens(trunk.tokens, recipe, shape, None)
    last = _tokens(trunk.warmup, recipe, shape, whole) or 0
    for i, change in enumerate(trunk.batch_schedule, 1):
        key, at = f"trunk.batch_schedule.[{i}]", _tokens(change.after, recipe, shape, None)
        if change.after.unit == "fraction":
            fix = "write tokens: a share would move when the trunk is extended"
            yield Problem(key, f"expected a length of its own, got the share {change.after}", fix)
        if at is not None and at <= last:
            before = f"the warmup of {si(last)} tokens" if i == 1 else f"the change before it, at {si(last)} tokens"
            yield Problem(key, f"expected a change after {before}, got {change.after}")
        if at is not None and whole is not None and at >= whole:
            yield Problem(key, f"expected a change before trunk.tokens = {si(whole)}, got {change.after}")
        last = at if at is not None else last


def _optimizer(recipe: Recipe) -> Iterator[Problem]:
    if recipe.optimizer.decay == "independent" and not recipe.given("optimizer.weight_decay"):
        yield Problem(
            "optimizer.decay",
            "expected weight_decay beside independent decay, got none",
            "write for example weight_decay = 0.001: the share that a step at full rate takes off every tensor",
        )


def _tunnel(recipe: Recipe) -> Iterator[Problem]:
    tunnel = recipe.tunnel
    if tunnel is None:
        return
    shapes = {size: recipe.shape_of(size, where="tunnel.proxies") for size in tunnel.proxies}
    if len({shape.body for shape in shapes.values()}) < len(tunnel.proxies):
        yield Problem(
            "tunnel.proxies", "expected different sizes, got one of them twice", "three sizes or more give a law"
        )
    largest = max(shapes, key=lambda size: shapes[size].body)
    target = recipe.target_shape()
    if target is not None and target.body < shapes[largest].body:
        key = "model.size" if recipe.model.size else "model.shape"
        got = f"{si(target.body)} against the proxy '{largest}'"
        yield Problem(
            key, f"expected a target at least as large as the largest proxy, got {got}", "choose smaller proxies"
        )
    searched = recipe.shape_of(tunnel.search_size or tunnel.proxies[0], where="tunnel.search_size")
    if (
        tunnel.check_size is not None
        and recipe.shape_of(tunnel.check_size, where="tunnel.check_size").width <= searched.width
    ):
        name = tunnel.search_size or tunnel.proxies[0]
        yield Problem(
            "tunnel.check_size", f"expected a wider model than the searched '{name}', got {tunnel.check_size!r}"
        )
    lengths: dict[str, list[float]] = {}
    for length in tunnel.tokens:
        if length.unit not in ("tokens", "per_parameter"):
            fix = "write tokens (800k) or tokens for each parameter (20N)"
            yield Problem("tunnel.tokens", f"expected lengths in tokens, got {str(length)!r}", fix)
        lengths.setdefault(length.unit, []).append(length.value)
    if any(len(set(values)) < len(values) for values in lengths.values()):
        yield Problem(
            "tunnel.tokens", "expected different lengths, got one of them twice", "three lengths or more give a law"
        )
    if tunnel.prune != "none" and tunnel.on_edge == "widen" and tunnel.space and tunnel.space.warmup:
        problem = 'expected "say" or "refuse" where trials end early and the warmup is searched, got "widen"'
        preset = f" (of the preset '{tunnel.preset}')" if tunnel.preset else ""
        fix = 'write on_edge = "say": a warmup beyond the range could outlast the first rung of a trial'
        yield Problem("tunnel.on_edge", problem + preset, fix)
    yield from _studies(recipe)
    if not recipe.decays:
        yield Problem(
            "tunnel", "expected a branch to forecast, got none", 'add a table such as [branch.same] with tokens = "10%"'
        )
    elif recipe.forecast_branch is None:
        fix = "add one without a mixture of its own: the law is measured on the trunk's data"
        yield Problem("branch", "expected a decay on the trunk's own mixture to forecast, got none", fix)


def _studies(recipe: Recipe) -> Iterator[Problem]:
    head, transfer = recipe.family.head_dim, recipe.tunnel.transfer if recipe.tunnel else None
    if transfer is not None and transfer.width is not None and transfer.width % head:
        problem = f"expected a multiple of the head dimension {head} of '{recipe.family.name}', got {transfer.width}"
        yield Problem("tunnel.transfer.width", problem)
    study = recipe.tunnel.batch if recipe.tunnel else None
    for batch in (study.batches or ()) if study else ():
        if batch % recipe.model.row:
            yield Problem("tunnel.batch.batches", f"expected multiples of model.row = {recipe.model.row}, got {batch}")
    for size in (study.sizes or ()) if study else ():
        recipe.shape_of(size, where="tunnel.batch.sizes")
    for length in study.tokens if study else ():
        if length.unit not in ("tokens", "per_parameter"):
            yield Problem("tunnel.batch.tokens", f"expected lengths in tokens or as 20N, got {str(length)!r}")


def _space(recipe: Recipe) -> Iterator[Problem]:
    tunnel = recipe.tunnel
    if tunnel is None or (tunnel.space is None and tunnel.sampler != "grid"):
        return
    if tunnel.space is None:
        space = tuple(axis for axis in DEFAULT_SPACE if not recipe.given(_STATED[axis.name]))
    else:
        space = space_of(tunnel.space.model_dump(mode="python"))
    for axis in space:
        if recipe.given(_STATED[axis.name]):
            problem = f"expected a value that the recipe leaves open, but {_STATED[axis.name]} states it"
            yield Problem(f"tunnel.space.{axis.name}", problem, "leave one of them out")
    names = {axis.name for axis in space}
    if "decay" in names and "weight_decay" not in names and not recipe.optimizer.weight_decay:
        problem = "expected a weight decay that can have several forms, got optimizer.weight_decay = 0"
        yield Problem("tunnel.space.decay", problem, "leave one of them out")
    if not tunnel.trials:
        yield Problem("tunnel.space", "expected trials that search it, got tunnel.trials = 0", "leave one of them out")
    elif tunnel.sampler == "grid":
        grid(space, tunnel.trials)  # raises unless there is one of this size
        if tunnel.on_edge == "widen":
            fix = "choose another sampler to widen the space"
            yield Problem("tunnel.on_edge", "expected say or refuse with a grid, got 'widen'", fix)


def _lengths(recipe: Recipe) -> Iterator[Problem]:
    trunk, shape = recipe.trunk, recipe.target_shape()
    if trunk.tokens is not None and trunk.tokens.unit == "fraction":
        yield Problem(
            "trunk.tokens",
            f"expected a length of its own, got the share {trunk.tokens}",
            "write for example 6.4M or 20N",
        )
    whole = _tokens(trunk.tokens, recipe, shape, None)
    if whole is not None and whole < (trunk.batch or recipe.model.row):
        yield Problem(
            "trunk.tokens", f"expected at least one step of {trunk.batch or recipe.model.row} tokens, got {whole}"
        )
    if trunk.dynamics is not None and trunk.dynamics.unit != "steps":
        yield Problem("trunk.dynamics", f"expected steps, got {trunk.dynamics}", "write for example '50 steps'")
    warmup = _tokens(trunk.warmup, recipe, shape, whole)
    for name in recipe.from_trunk:
        key, branch = f"branch.{name}", recipe.branch[name]
        yield from _decay(key, recipe, shape, whole)
        if branch.half_life is not None and branch.form != "exponential":
            yield Problem(f"{key}.half_life", f"expected form = 'exponential' beside a half-life, got {branch.form!r}")
        if branch.half_life is None and branch.form == "exponential" and branch.floor == 0:
            fix = "choose a floor such as 0.1, or another form"
            yield Problem(f"{key}.floor", "expected a floor above 0 for an exponential decay, got 0", fix)
        at = _tokens(branch.at, recipe, shape, whole)
        if at is not None and warmup is not None and at < warmup:
            yield Problem(f"{key}.at", f"expected a point after the warmup of {si(warmup)} tokens, got {branch.at}")
    if whole is not None and warmup is not None and warmup >= whole:
        yield Problem("trunk.warmup", f"expected less than trunk.tokens = {si(whole)}, got {trunk.warmup}")


def _decay(key: str, recipe: Recipe, shape: Shape | None, whole: int | None) -> Iterator[Problem]:
    branch = recipe.branch[key.partition(".")[2]]
    own = _tokens(branch.length, recipe, shape, whole, branch.batch)
    if whole is None or own is None:
        if branch.length == Length(1.0, "fraction"):
            yield Problem(f"{key}.tokens", "expected less than the whole of trunk.tokens, got 100%")
        return
    if own >= whole:
        fix = "trunk.tokens is the whole training, its decay included"
        yield Problem(f"{key}.tokens", f"expected less than trunk.tokens = {si(whole)}, got {branch.length}", fix)
    at = _tokens(branch.at, recipe, shape, whole)
    if at is not None and at > whole:
        yield Problem(
            f"{key}.at", f"expected a point on the trunk of {si(whole)} tokens, got {branch.at}", "raise trunk.tokens"
        )


def _tokens(
    length: Length | None, recipe: Recipe, shape: Shape | None, whole: int | None, batch: int | None = None
) -> int | None:
    """A length in tokens as far as the recipe alone tells; None where it does not. Steps are the trunk's, or of ``batch``."""
    if length is None:
        return None
    row = recipe.model.row
    try:
        return length.tokens(
            whole=whole,
            parameters=shape.body if shape else None,
            batch=batch or recipe.trunk.batch,
            row=row,
            flops_per_token=shape.flops_per_token(row).total if shape else None,
        )
    except ValueError:
        return None


CHECKS: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _dial, _names, _shape, _decay_batch, _batch_schedule, _optimizer, posttraining, growth, _tunnel, _space, _lengths,
)  # fmt: skip
