"""The batch study: which trials it needs. Needs no torch; the driver trains them, ``laws/batch_fit.py`` reads them.

The protocol of arXiv 2404.06395, appendix A.2: several sizes times several batches, each brought to several losses. As here
every length ends with its own decay, a trunk with a branch for each length takes the place of one cosine run. The critical
batch is looked for as in arXiv 2505.23971: from a checkpoint, go on with a multiple of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from windtunnel.base.units import si
from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.train.stage import Stage
from windtunnel.tunnel.scaling import Decay, ScalingRun, scaling_runs

_USUAL = (0.25, 0.5, 1, 2, 4, 8)
"""Multiples of the recipe's batch that are tried where it names none: six, as the paper has."""


@dataclass(frozen=True)
class Cell:
    """One size with one batch (in sequences) and seed: a trunk, and a decay branch for each length."""

    size: str
    batch: int
    seed: int
    run: ScalingRun


def usual_batches(base: int) -> tuple[int, ...]:
    """Batches around a base, all in sequences."""
    return tuple(dict.fromkeys(max(1, round(factor * base)) for factor in _USUAL))


def with_batch(setting: Setting, batch: int, exponent: float) -> Setting:
    """The setting with another batch: the base learning rate times factor^exponent, the warmup as many tokens as before."""
    factor = batch / setting.batch
    rate = float(f"{setting.optimizer.learning_rate * factor**exponent:.4g}")
    return replace(
        setting, batch=batch, warmup=max(1, round(setting.warmup / factor)),
        optimizer=replace(setting.optimizer, learning_rate=rate),
    )  # fmt: skip


def cells(
    sizes: Sequence[tuple[str, Shape]], batches: Sequence[int], lengths: Sequence[Sequence[int]], seeds: Sequence[int],
    setting: Setting, decay: Decay, exponent: float,
) -> list[Cell]:  # fmt: skip
    """All trunks and branches of a study.

    Args:
        batches: in sequences.
        lengths: tokens of the finished runs of each size.
        exponent: of the learning rate in the batch.
    """
    out = []
    for (size, shape), tokens in zip(sizes, lengths, strict=True):
        for batch in batches:
            own = with_batch(setting, batch, exponent)
            shortest = decay.split(own.steps(min(tokens)))[0]
            own = replace(own, warmup=max(1, min(own.warmup, shortest // 2)))
            for seed in seeds:
                name = f"{size}-b{si(own.step_tokens)}"
                (run,) = scaling_runs([(name, shape)], list(tokens), [seed], own, decay)
                out.append(Cell(size, batch, seed, run))
    return out


def branch_points(run: ScalingRun) -> list[int]:
    """Steps of a trunk at which its decays begin."""
    return sorted(branch.first_step for _, branch in run.branches)


def go_on(trunk: Stage, setting: Setting, *, at: int, factor: float, tokens: int, exponent: float) -> Stage:
    """A branch that goes on from a checkpoint with a multiple of its batch: half of it stable, half decay.

    Args:
        tokens: about how many it reads.
        exponent: of the learning rate in the batch.
    """
    batch = max(1, round(factor * trunk.batch))
    steps = max(4, round(tokens / (batch * trunk.plan.row)))
    decay = steps // 2
    rate = float(f"{trunk.optimizer.learning_rate * factor**exponent:.4g}")
    branch = decay_stage(trunk, f"{trunk.name}-{at}x{factor:g}", setting, at=at, steps=steps)
    return replace(
        branch, batch_changes=((at, batch),) if batch != trunk.batch else (), save_final=False,
        optimizer=replace(trunk.optimizer, learning_rate=rate),
        schedule=replace(branch.schedule, stable_end=at + steps - decay, decay_steps=decay),
    )  # fmt: skip
