"""From a recipe's branch that changes model or objective to its stage: lengths, rates and weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from windtunnel.base.units import Length
from windtunnel.corpus.packing import corrected
from windtunnel.posttrain.config import GrownConfig
from windtunnel.posttrain.dpo import PAPER_RATE, cosine, on_pairs
from windtunnel.posttrain.sft import end_rate, fresh_stage, sft_schedule
from windtunnel.posttrain.soup import soup_stage
from windtunnel.pretrain.config import BranchConfig, ExpertsConfig
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.upcycle import upcycled_stage
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
) -> Stage:
    """The stage of an ``sft``, ``dpo`` or ``adapt`` branch.

    Args:
        packed: ``RowIndex.facts`` of each corpus; empty before the corpora are read.
        unknown: tokens to assume while the rows to read are not known yet.

    Raises:
        RecipeError: the parent's decay ended too low to go on from, and no rate is stated.
    """
    row = parent.plan.row
    mixture = dict(config.mixture or {})
    known = all(corpus in packed for corpus in mixture)
    batch = (config.batch or parent.step_tokens) // row
    steps = _steps(config, mixture, packed if known else {}, batch, row, unknown)
    paper = config.preset == "paper"
    rate = config.lr or (PAPER_RATE if paper else end_rate(parent, f"branch.{name}.lr"))
    warmup = _part(config.warmup or _WARMUP, steps, batch * row)
    decay = min(steps - 1, _part(config.decay or _DECAY, steps, batch * row))
    fill = {corpus: packed[corpus]["fill"] if known else 1.0 for corpus in mixture}
    hashes = tuple((corpus, packed[corpus]["hash"] if known else "") for corpus in mixture)
    floor = 0.1 if config.floor is None else config.floor
    schedule = cosine(steps, warmup, floor) if config.kind == "dpo" else sft_schedule(steps, warmup, decay, floor)
    if config.kind == "dpo":
        fill = dict.fromkeys(mixture, 1.0)  # each row is a pair, however long: shares are of pairs
    stage = fresh_stage(
        parent, name, config.kind, setting, rate=rate, batch=batch, steps=steps, mixture=corrected(mixture, fill),
        packed=hashes, by_role=config.lr_by_role and not paper, schedule=schedule,
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
    step = config.batch or trunk.step_tokens

    def steps(length: Length) -> int:
        return max(1, round(tokens(length) / step))

    floor = config.floor if config.floor is not None else (0.0 if config.half_life else 0.1)
    return upcycled_stage(
        trunk, name, setting, at=at, stable=steps(config.stable or config.length), decay=steps(config.length),
        experts=experts.count, top_k=experts.top_k, batch=step // row, surgery=Surgery(experts.drop, experts.router),
        balance=Balance(experts.balance, experts.z, experts.bias), form=config.form, floor=floor,
        half_life=tokens(config.half_life) / step if config.half_life else None,
        mixture=tuple(sorted(config.mixture.items())) if config.mixture else None,
    )  # fmt: skip
