"""From a recipe's branch that changes model or objective to its stage: lengths, rates and weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.base.units import Length
from windtunnel.corpus.packing import corrected, shared_by_length
from windtunnel.posttrain.config import GrownConfig
from windtunnel.posttrain.dpo import PAPER_RATE, cosine, on_pairs
from windtunnel.posttrain.sft import end_rate, fresh_stage, sft_schedule
from windtunnel.posttrain.soup import soup_stage
from windtunnel.pretrain.config import BranchConfig, ExpertsConfig
from windtunnel.pretrain.extend import extended_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.upcycle import upcycled_stage
from windtunnel.train.batches import Batches, Changes
from windtunnel.train.growth import Balance, Surgery
from windtunnel.train.lora import Lora
from windtunnel.train.stage import Stage

_WARMUP, _DECAY = Length(0.03, "fraction"), Length(0.5, "fraction")


def posttrained(
    name: str,
    config: GrownConfig,
    parent: Stage,
    setting: Setting,
    packed: Mapping[str, Mapping[str, Any]],
    unknown: int,
    at: int | None = None,
) -> Stage:
    """The stage of an ``sft``, ``dpo`` or ``adapt`` branch.

    Args:
        packed: ``RowIndex.facts`` of each corpus; empty before the corpora are read.
        unknown: tokens to assume while the rows to read are not known yet.
        at: step of the parent at which it begins; without it, the last.

    Raises:
        RecipeError: the parent's decay ended too low to go on from, and no rate is stated.
    """
    row = setting.row
    mixture = dict(config.mixture or {})
    known = all(corpus in packed for corpus in mixture)
    batch = (config.batch or parent.batches.at(at or parent.steps) * parent.plan.row) // row
    steps = _steps(config, mixture, packed if known else {}, batch, row, unknown)
    paper = config.preset == "paper"
    rate = config.lr or (PAPER_RATE if paper else end_rate(parent, f"branch.{name}.lr", at))
    warmup = _part(config.warmup or _WARMUP, steps, batch * row)
    decay = min(steps - 1, _part(config.decay or _DECAY, steps, batch * row))
    fill = {corpus: packed[corpus]["fill"] if known else 1.0 for corpus in mixture}
    hashes = tuple((corpus, packed[corpus]["hash"] if known else "") for corpus in mixture)
    floor = 0.1 if config.floor is None else config.floor
    schedule = cosine(steps, warmup, floor) if config.kind == "dpo" else sft_schedule(steps, warmup, decay, floor)
    if config.kind == "dpo":
        # Shares are of pairs, however long: a row counts by the pairs in it.
        fill = {corpus: packed[corpus]["documents"] / packed[corpus]["rows"] if known else 1.0 for corpus in mixture}
    stage = fresh_stage(
        parent, name, config.kind, setting, rate=rate, batch=batch, steps=steps, mixture=corrected(mixture, fill),
        packed=hashes, by_role=config.lr_by_role and not paper, schedule=schedule, at=at,
    )  # fmt: skip
    if config.lora is not None:
        stage = replace(stage, lora=Lora(config.lora.rank, config.lora.alpha))
    return stage if config.preference is None else on_pairs(stage, config.preference)


def averaged(name: str, config: GrownConfig, members: list[tuple[Stage, int]], setting: Setting) -> Stage:
    """The stage of a ``soup`` branch.

    Raises:
        RecipeError: members of different shapes.
    """
    return soup_stage(name, members, setting, config.weights)


def _steps(
    config: GrownConfig, mixture: Mapping[str, float], packed: Mapping[str, Mapping[str, Any]], batch: int, row: int,
    unknown: int,
) -> int:  # fmt: skip
    if config.tokens is not None:
        rows = config.tokens.tokens(whole=unknown * 10, batch=batch * row, row=row) / row
    elif packed:
        rows = (config.epochs or (1.0 if config.kind == "dpo" else 2.0)) * sum(
            packed[corpus]["rows"] for corpus in mixture
        )
    else:
        rows = unknown / row
    return max(2, round(rows / batch))


def _part(length: Length, steps: int, step_tokens: int) -> int:
    """A part of the stage in steps, one at least."""
    return max(1, round(length.tokens(whole=steps * step_tokens, batch=step_tokens) / step_tokens))


def upcycled(
    name: str, config: BranchConfig, trunk: Stage, at: int, setting: Setting, tokens: Callable[[Length], int]
) -> Stage:
    """The stage of a ``moe`` branch that begins at step ``at`` of the trunk."""
    experts, row = config.experts or ExpertsConfig(), trunk.plan.row
    pace = Pace.of(name, config, (config.batch or trunk.batches.at(at) * row) // row, row, tokens)
    stable, decay = pace.parts(config.stable or config.length, config.length)
    return upcycled_stage(
        trunk, name, setting, at=at, stable=stable, decay=decay, experts=experts.count, top_k=experts.top_k,
        surgery=Surgery(experts.drop, experts.router), balance=balance_of(experts), batch=pace.batches.first,
        changes=pace.after(at), **_fall(config, pace, stable),
    )  # fmt: skip


def balance_of(experts: ExpertsConfig) -> Balance:
    """What a recipe says about keeping its experts equally busy."""
    return Balance(experts.balance, experts.z, experts.bias)


def extended(
    name: str, config: BranchConfig, parent: Stage, at: int, setting: Setting, tokens: Callable[[Length], int],
    mixture: Mapping[str, float], long_from: int, lengths: Mapping[str, Mapping[str, Any]],
) -> Stage:  # fmt: skip
    """The stage of a ``long`` branch that begins at step ``at`` of the trunk or of another long branch.

    Args:
        mixture: of corpora.
        long_from: tokens from which a document counts as long.
        lengths: ``length_facts`` of the corpora; empty before they are read.

    Raises:
        DataError: it asks for long documents, and there are none.
        RecipeError: it states no batch, and its parent's does not divide into its rows.
    """
    context = config.context
    assert context is not None
    whole, packed = tuple(sorted(mixture.items())), ()
    if context.long_share is not None:
        if lengths and not any(facts["long"] for facts in lengths.values()):
            most = max(facts["longest"] for facts in lengths.values())
            raise DataError(
                f"branch.{name}.context.long_share",
                f"expected documents of {long_from} tokens or more in {', '.join(mixture)}, the longest has {most}",
                "lower long_from, or name a corpus of longer ones",
            )
        whole = shared_by_length(mixture, context.long_share, lengths)
        parts = (part.partition(":") for part, _ in whole)
        packed = tuple((f"{c}:{p}", lengths[c][p]["hash"] if c in lengths else "") for c, _, p in parts)
    inherited = parent.batches.at(at) * parent.plan.row
    if config.batch is None and inherited % context.row:
        problem = f"expected a multiple of context.row = {context.row}, got the {inherited} tokens of '{parent.name}'"
        fix = f"write batch = {max(1, round(inherited / context.row)) * context.row}"
        raise RecipeError(f"branch.{name}.batch", problem, fix)
    pace = Pace.of(name, config, (config.batch or inherited) // context.row, context.row, tokens)
    stable, decay = pace.parts(config.stable, config.length if config.decays else None)
    return extended_stage(
        parent, name, setting, at=at, row=context.row, packed=packed, long_from=long_from if packed else 0,
        batch=pace.batches.first, changes=pace.after(at), stable=stable, decay=decay, theta=context.theta,
        scaling=context.scaling, factor=context.factor, untie=context.untie, **{**_fall(config, pace, stable), "mixture": whole},
    )  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """The batch of a branch as a function of its own steps, and what its lengths are in them. Lengths in steps are its own."""

    name: str
    batches: Batches
    row: int
    tokens: Callable[[Length], int]

    @classmethod
    def of(cls, name: str, config: BranchConfig, first: int, row: int, tokens: Callable[[Length], int]) -> Pace:
        """With the changes that the branch's table states, counted from its beginning."""
        pace = cls(name, Batches(first), row, tokens)
        for change in config.batch_schedule or ():
            after, changes = pace.updates(change.after), pace.batches.changes
            pace = replace(pace, batches=Batches(first, (*changes, (after, change.batch // row))))
        return pace

    def updates(self, length: Length, begun: int = 0) -> int:
        """Updates of a length that begins after ``begun`` of them, one at least."""
        if length.unit == "steps":
            return max(1, round(length.value))
        if not self.batches.changes:
            return max(1, round(self.tokens(length) / (self.batches.first * self.row)))
        return max(1, self.batches.steps(self.batches.sequences(begun) + self.tokens(length) / self.row) - begun)

    def parts(self, stable: Length | None, decay: Length | None) -> tuple[int, int]:
        """Updates of the stable part and of the decay.

        Raises:
            RecipeError: a change of the batch comes after both.
        """
        first = self.updates(stable) if stable else 0
        second = self.updates(decay, first) if decay else 0
        late = [step for step, _ in self.batches.changes if step >= first + second]
        if late:
            raise RecipeError(
                f"branch.{self.name}.batch_schedule",
                f"expected changes before its last step, {first + second}, got one after step {late[0]}",
            )
        return first, second

    def after(self, at: int) -> Changes:
        """The changes as the parent's steps go on."""
        return tuple((at + step, batch) for step, batch in self.batches.changes)


def _fall(config: BranchConfig, pace: Pace, stable: int) -> dict[str, Any]:
    """How the rate falls after ``stable`` updates, and on which data."""
    floor, half_life = config.floor if config.floor is not None else (0.0 if config.half_life else 0.1), None
    if config.half_life is not None:
        step = pace.batches.at(stable + 1) * pace.row
        steps = config.half_life.unit == "steps"
        half_life = config.half_life.value if steps else pace.tokens(config.half_life) / step
    return {
        "form": config.form, "floor": floor, "half_life": half_life,
        "mixture": tuple(sorted(config.mixture.items())) if config.mixture else None,
    }  # fmt: skip


def generations(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Branches in groups that can be trained side by side: each group grows from those before it."""
    depth: dict[str, int] = {}
    for stage in stages:
        parents = [member.stage for member in stage.average] or ([stage.start.stage] if stage.start else [])
        depth[stage.key] = max((depth.get(parent, -1) + 1 for parent in parents), default=0)
    return [[s for s in stages if depth[s.key] == level] for level in range(max(depth.values(), default=-1) + 1)]


_LAST, _SHARE = 20, 0.01
Losses = tuple[Sequence[int], Sequence[float]]
"""Steps and the loss of each."""


def regained(stage: Stage, own: Losses, dense: Losses) -> dict[str, float]:
    """Where a mixture with columns drawn anew stands after 1 % of its steps, beside the dense model that it grew from.

    Both are means in nats a token: ``dense`` over the trunk's last 20 steps up to the branch point, ``own`` over as many steps
    up to 1 % of the branch's own, or over those that there are.
    """
    at = stage.first_step
    until = at + max(1, round(_SHARE * stage.own_steps))
    before = [loss for step, loss in zip(*dense, strict=True) if at - _LAST < step <= at]
    after = [loss for step, loss in zip(*own, strict=True) if max(at, until - _LAST) < step <= until]
    return {"step": until, "dense": sum(before) / max(1, len(before)), "own": sum(after) / max(1, len(after))}
