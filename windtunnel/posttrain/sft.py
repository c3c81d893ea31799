"""Supervised fine-tuning: a branch that goes on from a finished model's weights, on chats. Needs no torch.

As in arXiv 2404.06395 (section 6.2): the base learning rate starts where the parent's decay ended, a short warmup, stable, then
an exponential decay to a tenth. The optimizer is fresh, the data plan its own, and rows hold whole chats.
"""

from __future__ import annotations

from dataclasses import replace

from windtunnel.base.errors import RecipeError
from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Stage, Start

LEAST_SHARE = 1 / 50
"""Below this share of the parent's base learning rate, where its decay ended is no sensible place to start."""


def end_rate(parent: Stage, where: str, at: int | None = None) -> float:
    """The base learning rate at a step of the parent, its last one if none is given, from which a branch goes on.

    Raises:
        RecipeError: it is below 1/50 of the parent's base rate: too low to learn from, so a value must be stated.
    """
    share = parent.schedule.factor(at or parent.steps)
    base = parent.optimizer.learning_rate
    if share < LEAST_SHARE:
        stood = "ended at" if at in (None, parent.steps) else f"stood at step {at} at"
        raise RecipeError(
            where,
            f"expected a learning rate, got none; '{parent.name}' {stood} {base * share:.2g}, below 1/50 of its {base:.2g}",
            f"write for example lr = {base / 10:.1g}",
        )
    return base * share


def fresh_stage(
    parent: Stage, name: str, kind: str, setting: Setting, *, rate: float, schedule: Schedule, steps: int, batch: int,
    mixture: Mixture, packed: tuple[tuple[str, str], ...], by_role: bool = True, at: int | None = None,
) -> Stage:  # fmt: skip
    """A branch from the weights of a stage: fresh moments, steps and data counted from 0, whole documents in rows.

    Args:
        at: step of the parent; without it, its last.
        rate: base learning rate; roles keep their multipliers.
        mixture: weights of rows.
        packed: hash of each corpus' row index.
        by_role: whether roles multiply the rate.
    """
    return replace(
        parent, name=name, kind=kind, open_ended=False, start=Start(parent.key, at or parent.steps, fresh=True), steps=steps,
        keep=(), schedule=schedule, optimizer=replace(parent.optimizer, learning_rate=rate), batch=batch, masking="document",
        plan=DataPlan(parent.plan.seed, setting.row, (Segment(0, mixture),), tuple(sorted(packed))),
        corpora=setting.only({corpus for corpus, _ in mixture}), score=setting.score, score_tokens=setting.score_tokens,
        lr_by_role=by_role, objective="lm", preference=None, lora=None, average=(), surgery=None, batch_changes=(),
        dynamics_every=0,
    )  # fmt: skip


def sft_schedule(steps: int, warmup: int, decay_steps: int, floor: float = 0.1) -> Schedule:
    """Short warmup, stable, exponential decay to a tenth."""
    return Schedule(warmup=warmup, stable_end=steps - decay_steps, decay_steps=decay_steps, floor=floor)
