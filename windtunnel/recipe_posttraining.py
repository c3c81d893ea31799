"""Contradictions in branches that are post-trained, and in the use of pairs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from windtunnel.corpus.chat_template import shortened
from windtunnel.posttrain.config import POSTTRAINED
from windtunnel.recipe_errors import nearest
from windtunnel.recipe_growth import Problem, at_a_step
from windtunnel.recipe_schema import Recipe

_TRAINED = ("sft", "dpo", "adapt")
_DPO_ONLY = ("preset", "loss", "reference", "beta", "betas", "smoothing", "margin")
_BESIDE: dict[str, tuple[str, ...]] = {
    "at": ("decay", "moe", "long", *_TRAINED), "half_life": ("decay", "moe", "long"),
    **dict.fromkeys(("epochs", "lr", "warmup", "lora"), _TRAINED), "decay": ("sft", "adapt"),
    **dict.fromkeys(_DPO_ONLY, ("dpo",)), **dict.fromkeys(("of", "weights", "last"), ("soup",)),
    **dict.fromkeys(("tokens", "floor", "mixture", "batch"), ("decay", "moe", "long", *_TRAINED)),
}  # fmt: skip
"""Which kinds a key belongs to; those that are not listed, and kinds of other modules, are checked elsewhere."""
_KINDS = ("decay", "moe", "long", *_TRAINED, "soup")


def posttraining(recipe: Recipe) -> Iterator[Problem]:
    """Keys of another kind, parents that are none, mixtures of the wrong corpora."""
    before: list[str] = []
    for name, branch in recipe.branch.items():
        key = f"branch.{name}"
        if branch.kind in _KINDS:
            for stated in (f for f in _BESIDE if getattr(branch, f) is not None and branch.kind not in _BESIDE[f]):
                *others, last = (f"'{kind}'" for kind in _BESIDE[stated])
                kinds = f"{', '.join(others)} or {last}" if others else last
                fix = "dpo follows a cosine" if (stated, branch.kind) == ("decay", "dpo") else ""
                yield Problem(f"{key}.{stated}", f"expected it beside kind = {kinds}, got kind = '{branch.kind}'", fix)
        if branch.kind == "soup":
            yield from _soup(recipe, name, before)
        elif branch.kind in POSTTRAINED:
            yield from _grown(recipe, name, before)
        else:
            yield from _no_pairs(recipe, f"{key}.mixture", branch.mixture or {})
        before.append(name)
    yield from _no_pairs(recipe, "trunk.mixture", recipe.mixture)


def _grown(recipe: Recipe, name: str, before: list[str]) -> Iterator[Problem]:
    branch, key = recipe.branch[name], f"branch.{name}"
    if branch.parent not in before:
        known = ", ".join(before) or "none"
        fix = nearest(branch.parent, before) if branch.parent != "trunk" else f"it grows from a finished model: {known}"
        yield Problem(f"{key}.parent", f"expected a branch that stands above, got {branch.parent!r}", fix)
    yield from at_a_step(recipe, name)
    target = recipe.target_shape()
    if branch.lora is not None and target is not None and branch.lora.rank >= target.width:
        problem = f"expected a rank below the model's width {target.width}, got {branch.lora.rank}"
        yield Problem(f"{key}.lora.rank", problem, "leave lora out to train the weights themselves")
    if branch.tokens is not None and branch.epochs is not None:
        yield Problem(f"{key}.epochs", "expected tokens or epochs, got both", "leave one out")
    if branch.reference is not None and branch.loss == "simpo":
        yield Problem(
            f"{key}.reference", f"expected none, since simpo has no reference, got {branch.reference!r}", "leave it out"
        )
    if branch.mixture is None:
        kind = {"dpo": "pairs", "sft": "chats"}.get(branch.kind, "text")
        yield Problem(f"{key}.mixture", "expected weights of corpora, got none", f"write for example {{ {kind} = 1 }}")
    elif branch.kind != "dpo":
        yield from _no_pairs(recipe, f"{key}.mixture", branch.mixture)
        if branch.kind == "sft" and not any(recipe.corpus[c].chats for c in branch.mixture if c in recipe.corpus):
            yield Problem(
                f"{key}.mixture",
                "expected at least one corpus of chats, got none",
                'chats have messages = "messages", or user and assistant',
            )
    elif wrong := next((c for c in branch.mixture if c in recipe.corpus and not recipe.corpus[c].pairs), None):
        yield Problem(
            f"{key}.mixture", f"expected pairs of answers, got the corpus {wrong!r}", "pairs have chosen and rejected"
        )
    templates = sorted(
        {recipe.corpus[c].template for c in branch.mixture or () if c in recipe.corpus and recipe.corpus[c].chats}
    )
    if len(templates) > 1:
        fix = "give them the same template, or the model learns two"
        got = " and ".join(map(shortened, templates))
        yield Problem(f"{key}.mixture", f"expected chats of one template, got {got}", fix)
    for length in ("warmup", "decay"):
        value = getattr(branch, length)
        if value is not None and value.unit not in ("fraction", "steps", "tokens"):
            yield Problem(f"{key}.{length}", f"expected a share, steps or tokens, got {value}")


def _soup(recipe: Recipe, name: str, before: list[str]) -> Iterator[Problem]:
    branch, key = recipe.branch[name], f"branch.{name}"
    if branch.parent != "trunk":  # the default
        yield Problem(
            f"{key}.parent", f"expected none beside kind = 'soup', got {branch.parent!r}", "of names what it averages"
        )
    of = branch.of or ()
    if not of:
        yield Problem(f"{key}.of", "expected what to average, got none", 'write for example of = ["chat", "aligned"]')
    for member in of:
        if member not in before and of != ("trunk",):
            fix = nearest(member, before) if member != "trunk" else 'the trunk is averaged alone: of = ["trunk"]'
            yield Problem(f"{key}.of", f"expected branches that stand above, got {member!r}", fix)
    if len(set(of)) < len(of) or (len(of) == 1 and of != ("trunk",)):
        yield Problem(
            f"{key}.of", f"expected two different branches or more, got {', '.join(of)}", "or the trunk alone"
        )
    if branch.last is not None and of != ("trunk",):
        yield Problem(f"{key}.last", f"expected it beside of = ['trunk'], got {', '.join(of)}", "leave it out")
    count = (branch.last or 4) if of == ("trunk",) else len(of)
    if branch.weights is not None and len(branch.weights) != count:
        yield Problem(f"{key}.weights", f"expected {count} weights, one for each member, got {len(branch.weights)}")


def _no_pairs(recipe: Recipe, key: str, mixture: dict[str, float]) -> Iterator[Problem]:
    for name in mixture:
        if name in recipe.corpus and recipe.corpus[name].pairs:
            yield Problem(
                key, f"expected text or chats, got the pairs of answers {name!r}", "pairs are for kind = 'dpo'"
            )
