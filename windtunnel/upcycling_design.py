"""What an upcycled mixture of experts is compared with: one trunk a seed, two continuations of it, branches of several lengths.

Both continuations start from the same checkpoint, moments and data position included, read the same text in the same order and
batch, and end with decays of the same share; only the model differs. The branches of one continuation are decays that leave it
at different steps, so that a longer one costs only what it adds. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from windtunnel.base.errors import RecipeError, UserError
from windtunnel.pretrain.branch import decay_stage
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.train.stage import Stage

WORD = "upcycling"
"""The study's name; it begins those of its runs."""
Axis = Literal["tokens", "FLOPs", "seconds"]
AXES: tuple[Axis, ...] = ("tokens", "FLOPs", "seconds")
SHARES = (0.25, 0.5, 1.0)
"""Lengths at which the experts are finished, as shares of the whole branch."""
_LEAST = 8
_SEED_STEP = 1000


@dataclass(frozen=True)
class Continuation:
    """One side: its stable run, and the decays that leave it, by the updates that both parts make together."""

    stable: Stage
    decays: dict[int, Stage]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.stable, *self.decays.values()


@dataclass(frozen=True)
class Seed:
    """One seed: its trunk and the two continuations of it."""

    trunk: Stage
    experts: Continuation
    dense: Continuation


def moe_branch(recipe: Recipe, name: str | None) -> str:
    """The branch of experts that is asked about: the named one, or the only one.

    Raises:
        UserError: there is none, or several and none is named.
    """
    found = [branch for branch, config in recipe.branch.items() if config.kind == "moe"]
    if name is not None and name not in found:
        raise UserError(
            "--branch", f"expected a branch of kind 'moe' ({', '.join(found) or 'none'}), got {name[:60]!r}"
        )
    if not found:
        fix = 'add [branch.experts] with kind = "moe"'
        raise RecipeError(recipe.where("branch"), "expected a branch of kind 'moe', found none", fix)
    if name is None and len(found) > 1:
        raise UserError("--branch", f"expected one of {', '.join(found)}, got none", "name the branch to compare")
    return name or found[0]


@dataclass(frozen=True)
class Design:
    """The lengths of both sides in updates after the checkpoint.

    ``whole`` is the recipe's branch of experts, from which shape, batch, text, decay and length come; ``ratios`` are the tokens
    that the dense side reads for each of the experts' at equal tokens, FLOPs and seconds.
    """

    whole: Stage
    trunk: Stage
    ratios: Mapping[Axis, float]

    @classmethod
    def of(cls, program: Program, branch: str, speeds: tuple[float, float]) -> Design:
        """The design of a recipe's branch.

        Args:
            speeds: tokens a second of the dense model and of the experts.
        """
        trunk, whole = both(program, branch)
        dense, experts = (stage.shape.flops_per_token(stage.plan.row).total for stage in (trunk, whole))
        return cls(whole, trunk, {"tokens": 1.0, "FLOPs": experts / dense, "seconds": speeds[0] / speeds[1]})

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the experts' branches, rising."""
        return tuple(sorted({max(2, round(share * self.whole.own_steps)) for share in SHARES}))

    def dense_steps(self, axis: Axis, length: int) -> int:
        """The dense length that costs as much as one of the experts'."""
        return max(2, round(self.ratios[axis] * length))

    @property
    def dense_lengths(self) -> tuple[int, ...]:
        """Lengths of the dense branches, rising: those of the experts, and where they cost as much as the experts' longest and,
        if that is shorter than any, shortest."""
        first, last = self.lengths[0], self.lengths[-1]
        costs = {self.dense_steps(axis, last) for axis in AXES}
        shorter = {steps for axis in AXES if (steps := self.dense_steps(axis, first)) < first}
        return tuple(sorted({*self.lengths, *costs, *shorter}))

    def seed(self, program: Program, branch: str, number: int, score: Iterable[str]) -> Seed:
        """The stages of one seed, counted from 1: the recipe's own seed may have chosen its hyper-parameters."""
        own = _with_seed(program, program.recipe.seed + _SEED_STEP * number)
        trunk, whole = both(own, branch)
        scored = tuple(dict.fromkeys(score))
        return Seed(
            trunk,
            _continuation(own, "experts", whole, trunk, self.lengths, scored),
            _continuation(own, "dense", dense_twin(whole, trunk), trunk, self.dense_lengths, scored),
        )


def _with_seed(program: Program, seed: int) -> Program:
    return replace(program, recipe=program.recipe.model_copy(update={"seed": seed}))


def both(program: Program, branch: str) -> tuple[Stage, Stage]:
    """The stable trunk up to the branch point, and the recipe's branch of experts as one stage.

    Its steps count as the trunk's with another batch from the branch point on, if it has one.

    Raises:
        UserError: the branch is too short to be cut into lengths.
    """
    whole = program.branch(branch)
    if whole.own_steps < _LEAST:
        problem = f"expected {_LEAST} updates or more in its stable part and decay, got {whole.own_steps}"
        raise RecipeError(program.recipe.where(f"branch.{branch}.tokens"), problem, "ask for more tokens")
    at, trunk = whole.first_step, program.trunk()
    changes = trunk.batches.until(at)
    if whole.batch != trunk.batches.at(at):
        changes = (*changes, (at, whole.batch))
    word = f"{WORD}-trunk-s{trunk.seed}"
    trunk = replace(trunk, name=word, steps=at, keep=(at,), save_every=None, dynamics_every=0)
    return trunk, replace(whole, batch=trunk.batch, batch_changes=changes)


def dense_twin(whole: Stage, trunk: Stage) -> Stage:
    """The same branch without experts."""
    return replace(whole, kind="trunk", shape=trunk.shape, surgery=None, balance=None)


def _continuation(
    program: Program, side: str, whole: Stage, trunk: Stage, lengths: Iterable[int], score: tuple[str, ...]
) -> Continuation:
    """The stable run of one side up to its last decay, and the decays; each has the share of its length that the recipe's has."""
    at, setting, asked = whole.first_step, program.setting(), whole.schedule
    falls = {n: min(n - 1, max(1, round(n * asked.decay_steps / whole.own_steps))) for n in lengths}
    points = tuple(sorted({at + n - fall for n, fall in falls.items()}))
    stable = replace(
        whole, name=f"{WORD}-{side}-s{whole.seed}", open_ended=True, steps=points[-1], keep=points, score=(),
        schedule=trunk.schedule, save_every=None, dynamics_every=0,
    )  # fmt: skip
    decays: dict[int, Stage] = {}
    for n, fall in falls.items():
        half_life = asked.half_life and asked.half_life * fall / asked.decay_steps
        made = decay_stage(
            stable, f"{WORD}-{side}-{n}-s{whole.seed}", replace(setting, score=score), at=at + n - fall, steps=fall,
            form=asked.form, floor=asked.floor, half_life=half_life,
        )  # fmt: skip
        decays[n] = replace(made, kind="moe" if made.shape.experts > 1 else "decay", surgery=None)
    return Continuation(stable, decays)
