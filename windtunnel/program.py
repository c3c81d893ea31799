"""A program: a recipe with everything that follows from it, each derived value with its source. Needs no torch.

The functions here turn recipe values into settings and stages; nothing is read or written except the small files in which an
earlier run recorded its corpora, its derived batch and its choices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import RecipeError
from windtunnel.base.units import Length, si
from windtunnel.growth import averaged, extended, posttrained, upcycled
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.posttrain.config import POSTTRAINED
from windtunnel.prepared import Prepared
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.recipe import Recipe
from windtunnel.train.batches import Batches
from windtunnel.train.stage import AdamW, Stage, Start, optimizer_of
from windtunnel.tunnel.scaling import Decay, ScalingRun, scaling_runs
from windtunnel.tunnel.space import DEFAULT_SPACE, Space, Value, apply, apply_to_shape, shown_value, space_of

_PAPER = "arXiv 2404.06395, appendix A.1"
_SEARCH_KEYS = {"space", "sampler", "prune", "per_round", "on_edge", "stop", "noise", "repeats"}
"""Keys of [tunnel] on which a search depends, where they are stated."""
_CONSTANTS = ("init_std", "scale_emb", "scale_depth", "vocabulary_regime")
"""Keys of [model] that the parametrization takes as they are, where they are stated."""


@dataclass(frozen=True)
class Derived:
    """A value that the recipe did not state, and where it came from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Answered:
    """A batch in sequences that a study of this program found, and in words which study."""

    batch: int
    source: str


@dataclass(frozen=True)
class Program:
    """A recipe, what has been prepared (None before that), the values pinned by an earlier run, and the tunnel's choices.

    ``answered`` is the batch of an earlier study, for which neither the recipe nor an earlier run has one; ``chosen_warmup``
    that of the search, in steps.
    """

    recipe: Recipe
    prepared: Prepared | None = None
    pinned: dict[str, int] | None = None
    choices: dict[str, Value] | None = None
    target: Shape | None = None
    budget_tokens: int | None = None
    answered: Answered | None = None
    chosen_warmup: int | None = None

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def vocab(self) -> int:
        return self.prepared.vocab if self.prepared else self.recipe.tokenizer.vocab

    @property
    def shape(self) -> Shape:
        """The target's shape.

        Raises:
            RecipeError: the recipe gives a budget and no size has been chosen for it yet.
        """
        shape = self.target or self.recipe.target_shape(self.vocab)
        if shape is None:
            raise RecipeError("budget", "the size follows from the budget, and has not been chosen yet")
        shape = shape if shape.vocab == self.vocab else replace(shape, vocab=self.vocab)
        return apply_to_shape(shape, self.choices or {})

    def shape_of(self, size: str) -> Shape:
        """The shape of one of the tunnel's sizes, with what was searched about it."""
        return apply_to_shape(self.recipe.shape_of(size, self.vocab), self.choices or {})

    @property
    def total_tokens(self) -> int:
        """D of a finished model, its decay included."""
        if self.recipe.trunk.tokens is None and self.budget_tokens is not None:
            return self.budget_tokens
        length = self.recipe.trunk.tokens or Length(20, "per_parameter")
        if length.unit == "steps" and self.recipe.trunk.batch_schedule:
            return self.batches.sequences(round(length.value)) * self.recipe.model.row
        return length.tokens(
            parameters=self.shape.body, batch=self.recipe.trunk.batch, row=self.recipe.model.row,
            flops_per_token=self.shape.flops_per_token(self.recipe.model.row).total,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Sequences in a step."""
        row, given = self.recipe.model.row, self.recipe.trunk.batch
        if given:
            return given // row
        if self.pinned:
            return self.pinned["batch"]
        if self.answered:
            return self.answered.batch
        return step_law_batch(self.total_tokens, row)

    @property
    def batches(self) -> Batches:
        """Sequences in each step of the trunk."""
        out, row = Batches(self.batch), self.recipe.model.row
        for change in self.recipe.trunk.batch_schedule:
            if change.after.unit == "steps":
                out = Batches(out.first, (*out.changes, (round(change.after.value), change.batch // row)))
            else:
                out = out.then(self._tokens(change.after) / row, change.batch // row)
        return out

    def _step_at(self, length: Length) -> int:
        """The trunk's step that comes nearest to a length."""
        if length.unit == "steps":
            return round(length.value)
        return self.batches.steps(self._tokens(length) / self.recipe.model.row)

    @property
    def warmup(self) -> int:
        """Steps of warmup; a share of the tokens is pinned by the first run, so that the trunk can be extended."""
        if self.chosen_warmup is not None:
            return self.chosen_warmup
        length = self.recipe.trunk.warmup
        if self.pinned and length.unit == "fraction":
            return self.pinned["warmup"]
        return max(1, self._step_at(length))

    def _tokens(self, length: Length) -> int:
        row = self.recipe.model.row
        return length.tokens(
            whole=self.total_tokens if length.unit == "fraction" else None, parameters=self.shape.body,
            batch=self.batch * row, row=row,
            flops_per_token=self.shape.flops_per_token(row).total,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Steps of a finished model, decay included."""
        return max(2, self.batches.steps(self.total_tokens / self.recipe.model.row))

    def setting(self, *, chosen: bool = True) -> Setting:
        """What all stages share; with the tunnel's choices, or before them."""
        recipe, model = self.recipe, self.recipe.model
        constants = {name: value for name in _CONSTANTS if (value := getattr(model, name)) is not None}
        optimizer = AdamW(
            recipe.optimizer.lr or 0.01, recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.eps,
            recipe.optimizer.weight_decay, recipe.optimizer.clip, recipe.optimizer.decay,
        )  # fmt: skip
        optimizer = optimizer_of(recipe.optimizer.kind, optimizer)
        corpora = self.prepared.hashes() if self.prepared else tuple((name, "") for name in sorted(recipe.corpus))
        parametrization = replace(
            Parametrization.named(model.parametrization, model.base_layers or recipe.family.base_layers), **constants
        )
        setting = Setting(
            corpora=corpora, mixture=tuple(sorted(recipe.mixture.items())), row=model.row, batch=self.batch,
            warmup=self.warmup, seed=recipe.seed, parametrization=parametrization,
            optimizer=optimizer, score=recipe.evaluated, score_tokens=recipe.evaluate.tokens,
            masking=recipe.trunk.masking,
        )  # fmt: skip
        return apply(setting, self.choices) if chosen and self.choices else setting

    @property
    def space(self) -> Space:
        """What the tunnel searches: the recipe's space, or those of the usual hyper-parameters that it leaves open."""
        tunnel = self.recipe.tunnel
        if tunnel is not None and tunnel.space is not None:
            return space_of(tunnel.space.model_dump(mode="python"))
        return tuple(axis for axis in DEFAULT_SPACE if axis.name in self._open)

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that the tunnel searches."""
        return tuple(axis.name for axis in self.space)

    @property
    def _open(self) -> tuple[str, ...]:
        fixed = {"learning_rate": self.recipe.optimizer.lr, **{k: getattr(self.recipe.model, k) for k in
                 ("init_std", "scale_emb", "scale_depth")}}  # fmt: skip
        standard = self.recipe.model.parametrization == "standard"
        open_ones = [name for name, value in fixed.items() if value is None]
        return tuple(name for name in open_ones if not standard or name in ("learning_rate", "init_std"))

    def with_choices(self, choices: dict[str, Value], warmup: int | None = None) -> Program:
        """The program after a search. A searched warmup is kept in steps, so that the trunk can be extended later."""
        if "warmup" not in choices:
            return replace(self, choices=choices)
        steps = warmup or max(1, round(float(choices["warmup"]) * self.steps))
        return replace(self, choices=choices, chosen_warmup=steps)

    def _decay_batch(self, branch: str) -> int:
        """Sequences in a step of a decay branch: as many as the trunk has where it begins."""
        batches, config = self.batches, self.recipe.branch[branch]
        if config.at is not None:
            return batches.at(self._step_at(config.at))
        before = self.total_tokens - self._tokens(config.length)  # what lies before it, if its length is in tokens
        return batches.at(batches.steps(max(1, before) / self.recipe.model.row))

    def decay_steps(self, branch: str) -> int:
        """Updates of a decay branch; of another, how many of the trunk's its decay is as long as."""
        config, batch = self.recipe.branch[branch], self._decay_batch(branch)
        length = config.length
        if length.unit == "steps":
            own = config.batch_schedule[-1].batch if config.batch_schedule else config.batch
            return max(1, round(length.value * own / (batch * self.recipe.model.row) if own else length.value))
        return max(1, round(self._tokens(length) / (batch * self.recipe.model.row)))

    def branch_point(self, branch: str) -> int:
        """The step of the trunk at which a branch begins."""
        at = self.recipe.branch[branch].at
        if at is not None:
            return max(1, self._step_at(at))
        if not self.recipe.trunk.batch_schedule:
            return self.steps - self.decay_steps(branch)
        own = self.decay_steps(branch) * self._decay_batch(branch)
        return self.batches.steps(self.total_tokens / self.recipe.model.row - own)

    @property
    def trunk_steps(self) -> int:
        return max([self.branch_point(name) for name in self.recipe.from_trunk] or [self.steps])

    def trunk(self, finished_at: int | None = None) -> Stage:
        """The trunk's stage; ``finished_at`` shortens it to a step at which it was told to end."""
        setting, steps = self.setting(), finished_at or self.trunk_steps
        every = self.checkpoint_steps
        points = [finished_at] if finished_at else [self.branch_point(name) for name in self.recipe.from_trunk]
        points += [step for name in self.recipe.branch for step in self.soup_points(name, steps)]
        origin = self.prepared.origin if self.prepared else None
        return replace(
            trunk_stage("trunk", self.shape, setting, steps, points, every), keep_last=self.recipe.trunk.keep,
            batch_changes=self.batches.changes, dynamics_every=self.dynamics_steps, recompute=self.recipe.model.recompute,
            start=Start(origin["stage"], origin["step"], fresh=True) if origin else None,
        )  # fmt: skip

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints of the trunk."""
        every = self.recipe.trunk.checkpoint_every
        if every.unit == "steps":
            return max(1, round(every.value))
        schedule, size = self.recipe.trunk.batch_schedule, self.batch * self.recipe.model.row
        return max(1, round(self._tokens(every) / (self.total_tokens / self.steps if schedule else size)))

    @property
    def dynamics_steps(self) -> int:
        """Steps from one look at two consecutive updates to the next; 0 for none."""
        every = self.recipe.trunk.dynamics
        return max(1, round(every.value)) if every is not None else 0

    def soup_points(self, name: str, end: int) -> list[int]:
        """The checkpoints of a trunk of ``end`` steps that a soup averages; none unless the branch is a soup of the trunk."""
        config = self.recipe.branch[name]
        if config.kind != "soup" or config.of != ("trunk",):
            return []
        return [step for i in range(config.last or 4) if (step := end - i * self.checkpoint_steps) > 0]

    def soup(self, name: str, grown: Mapping[str, Stage], trunk: Stage, saved: Collection[int] | None = None) -> Stage:
        """The stage of a soup.

        Args:
            grown: the branches above it.
            trunk: as it was trained.
            saved: its checkpoints, where some exist.

        Raises:
            RecipeError: the trunk has fewer than two of the checkpoints, or fewer than are asked for though nobody ended it
                early; or members differ in shape.
        """
        config = self.recipe.branch[name]
        assert config.of is not None
        if config.of != ("trunk",):
            return averaged(
                name, config, [(grown[member], grown[member].steps) for member in config.of], self.setting()
            )
        points = [step for step in self.soup_points(name, trunk.steps) if saved is None or step in saved]
        # A trunk that was told to end early has fewer; then the soup is of those that there are.
        least = max(2, config.last or 0) if trunk.steps == self.trunk_steps else 2
        if len(points) < least:
            problem = f"expected {least} checkpoints of the trunk or more, found {len(points)}"
            fix = "lower trunk.checkpoint_every, or last"
            raise RecipeError(self.recipe.where(f"branch.{name}.last"), problem, fix)
        return averaged(name, config, [(trunk, step) for step in points], self.setting())

    def branch(self, name: str, finished_at: int | None = None, parent: Stage | None = None) -> Stage:
        """A branch's stage.

        Args:
            finished_at: step of the trunk at which its branches begin, if it was told to end there.
            parent: what a branch of a branch grows from, if that is not as the recipe says.

        Raises:
            RecipeError: it begins at a step that its parent does not have.
        """
        stage = self._branch(name, finished_at, parent)
        starts = [c.at for c in self.recipe.branch.values() if c.parent == name and c.at and c.at.unit == "steps"]
        kept = (step for at in starts if (step := stage.first_step + round(at.value)) <= stage.steps)
        return replace(stage, keep=(*stage.keep, *kept))

    def _branch(self, name: str, finished_at: int | None, parent: Stage | None) -> Stage:
        config, setting = self.recipe.branch[name], self.setting()
        if config.kind == "soup":
            grown = {member: self.branch(member, finished_at) for member in config.of or () if member != "trunk"}
            return self.soup(name, grown, self.trunk(finished_at))
        if config.kind in POSTTRAINED:
            read = self.prepared.corpora if self.prepared else {}
            packed = {corpus: facts["packed"] for corpus, facts in read.items() if "packed" in facts}
            parent = parent or self.branch(config.parent, finished_at)
            at, unknown = self._departs(name, parent), max(1, self.total_tokens // 10)
            return posttrained(name, config, parent, setting, packed, unknown, at)
        if config.parent != "trunk":
            parent = parent or self.branch(config.parent, finished_at)
            return self._extended(name, parent, self._departs(name, parent))
        trunk, at = self.trunk(finished_at), finished_at or self.branch_point(name)
        if config.kind == "long":
            return self._extended(name, trunk, at)
        if config.kind == "moe":
            return upcycled(name, config, trunk, at, setting, self._tokens)
        mixture = tuple(sorted(config.mixture.items())) if config.mixture else None
        floor = config.floor if config.floor is not None else (0.0 if config.half_life else 0.1)
        half_life = self._half_life(name)
        return decay_stage(
            trunk, name, setting, at=at, steps=self.decay_steps(name), form=config.form, floor=floor, half_life=half_life,
            mixture=mixture,
        )  # fmt: skip

    def _departs(self, name: str, parent: Stage) -> int:
        """The step of another branch at which a branch begins: its last, unless one is stated."""
        at = self.recipe.branch[name].at
        if at is None:
            return parent.steps
        guessed = self.prepared is None and parent.kind in POSTTRAINED  # its length is not known before its chats are
        if not guessed and not 1 <= at.value <= parent.own_steps:
            where, words = self.recipe.where(f"branch.{name}.at"), f"1 to {parent.own_steps} steps of '{parent.name}'"
            raise RecipeError(where, f"expected {words}, got {at}", "leave it out for its end")
        return parent.first_step + round(at.value)

    def _extended(self, name: str, parent: Stage, at: int) -> Stage:
        """A long branch, with what is known of its documents' lengths."""
        recipe, context = self.recipe, self.recipe.branch[name].context
        assert context is not None
        least = recipe.long_from(name)
        known = self.prepared.by_length(context.row, least) if self.prepared else {}
        return extended(
            name, recipe.branch[name], parent, at, self.setting(), self._tokens, recipe.long_mixture(name), least, known
        )

    def _half_life(self, branch: str) -> float | None:
        """The half-life of a decay branch in its own steps."""
        length = self.recipe.branch[branch].half_life
        if length is None or length.unit == "steps":
            return length.value if length else None
        return self._tokens(length) / (self._decay_batch(branch) * self.recipe.model.row)

    def decay(self) -> Decay:
        """The decay rule of the branch that the forecast is about, as a share of all tokens: the proxies use the same."""
        name = self.recipe.forecast_branch
        if name is None:
            return Decay()
        config = self.recipe.branch[name]
        half_life = self._half_life(name)
        floor = config.floor if config.floor is not None else (0.0 if half_life else 0.1)
        share = self.decay_steps(name) / self.steps
        if self.recipe.trunk.batch_schedule or config.at:  # steps are not equally long, or the run is a shorter one
            share = self.decay_share(name)
        return Decay(share, config.form, floor, half_life)

    def decay_share(self, branch: str) -> float:
        """The share of a run's tokens that lie in a decay branch, as it is written: its steps would round that of a short run."""
        config = self.recipe.branch[branch]
        if "steps" in (config.length.unit, config.at.unit if config.at else None):
            stage = self.branch(branch)
            return stage.own_tokens / stage.tokens
        own = self._tokens(config.length)
        return own / (self._tokens(config.at) + own if config.at else self.total_tokens)

    def scaling(self) -> list[ScalingRun]:
        """The stages of the scaling study."""
        tunnel = self.recipe.tunnel
        if tunnel is None:
            return []
        sizes = [(size, self.shape_of(size)) for size in tunnel.proxies]
        setting = self.setting()
        runs = []
        for name, shape in sizes:
            tokens = [length.tokens(parameters=shape.body) for length in tunnel.tokens]
            seeds = [setting.seed + 1000 * i for i in range(tunnel.seeds)]
            runs += scaling_runs([(name, shape)], tokens, seeds, setting, self.decay())
        return runs

    @property
    def search_key(self) -> str:
        """Identifies the search: its data, sizes, trials and what it leaves fixed."""
        assert self.recipe.tunnel is not None
        setting = self.setting(chosen=False)
        tunnel = self.recipe.tunnel.model_dump(
            mode="json", include={"trials", "trial_tokens", "search_size", "check_size", "proxies"}
        )
        more = self.recipe.tunnel.model_dump(mode="json", include=_SEARCH_KEYS, exclude_defaults=True)
        usual = AdamW().to_dict()
        # What the recipe had no key for in earlier versions is told only where it is used.
        unusual: dict[str, Any] = {
            name: value for name, value in setting.optimizer.to_dict().items() if usual.get(name) != value
        }
        model = self.recipe.model
        unusual |= {"qk_norm": True} if model.qk_norm else {}
        unusual |= {"tied": False} if not model.tied else {}
        unusual |= (
            {"base_width": self.shape.base_width} if self.shape.base_width != self.recipe.family.base_width else {}
        )
        warmup = replace(self, chosen_warmup=None).warmup  # as before the search, which its own choice does not change
        return content_hash(
            [tunnel, more, list(self.searched), setting.corpora, setting.mixture, setting.row, setting.batch, setting.seed,
             setting.parametrization.to_dict(), warmup, self.vocab, model.family, setting.masking,
             unusual]
        )  # fmt: skip

    def starting_values(self) -> dict[str, Value]:
        """Each searched hyper-parameter as it is before the search: the recipe's value or the paper's."""
        values = self._values(self.setting(chosen=False), None)
        return {name: values[name] for name in self.searched}

    def _values(self, setting: Setting, choices: dict[str, Value] | None) -> dict[str, Value]:
        optimizer, parametrization = setting.optimizer, setting.parametrization
        return {
            "learning_rate": optimizer.learning_rate, "init_std": parametrization.init_std,
            "scale_emb": parametrization.scale_emb, "scale_depth": parametrization.scale_depth,
            "weight_decay": optimizer.weight_decay, "beta2": optimizer.beta2,
            "warmup": (choices or {}).get("warmup", self.warmup / self.steps), "qk_norm": self.shape.qk_norm,
            "optimizer": optimizer.kind, "decay": optimizer.decay,
        }  # fmt: skip

    def derived(self) -> list[Derived]:
        """The values that the recipe left open, with their sources."""
        recipe, out = self.recipe, []
        if recipe.model.size:
            out.append(
                Derived("shape", f"the '{recipe.model.size}' of family '{recipe.model.family}'", recipe.family.rule)
            )
        if recipe.budget is not None:
            out.append(Derived("shape", f"N = {si(self.shape.body)}", f"the budget, by the law '{recipe.budget.law}'"))
        if recipe.trunk.tokens is None:
            source = "20 tokens for each parameter (arXiv 2203.15556)"
            source = f"the budget, by the law '{recipe.budget.law}'" if recipe.budget is not None else source
            out.append(Derived("tokens", si(self.total_tokens), source))
        if recipe.trunk.batch is None:
            source = "0.58·D^0.571 (arXiv 2503.04715), to the next power of two rows"
            if self.pinned:
                source = "kept from the first run, so that the trunk can be extended"
            elif self.answered:
                source = self.answered.source
            out.append(Derived("batch", f"{si(self.batch * recipe.model.row)} tokens", source))
        if recipe.trunk.warmup.unit == "fraction":
            out.append(Derived("warmup", f"{self.warmup} steps", f"{recipe.trunk.warmup} of the tokens"))
        values = self._values(self.setting(), self.choices)
        for name in self.searched:
            if self.choices and name in self.choices:
                source = (
                    f"the tunnel's search on {recipe.tunnel.search_size or recipe.tunnel.proxies[0]}"
                    if recipe.tunnel
                    else ""
                )
            else:
                source = (
                    "the tunnel will choose; until then " + _PAPER if recipe.tunnel and recipe.tunnel.trials else _PAPER
                )
            out.append(Derived(name, shown_value(values[name]), source))
        return out


def step_law_batch(tokens: int, row: int) -> int:
    """Sequences in a step from the tokens of a run: 0.58·D^0.571 tokens (arXiv 2503.04715), to the nearest power of two rows."""
    return power_of_two(0.58 * tokens**0.571 / row)


def power_of_two(rows: float) -> int:
    """The power of two that is nearest by ratio, 1 at least."""
    power = 1
    while power * 1.4142 < rows:
        power *= 2
    return power
