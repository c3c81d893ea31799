"""The trunk: one run at stable learning rate, with a checkpoint at every branch point. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.train.schedule import Form, Schedule
from windtunnel.train.stage import Stage


def trunk_stage(
    name: str,
    shape: Shape,
    setting: Setting,
    steps: int,
    branch_points: Iterable[int] = (),
    save_every: int | None = None,
) -> Stage:
    """Warmup and a stable learning rate, open-ended: asking for more steps later extends it and redoes nothing.

    The last step is always a branch point. No score is taken at stable learning rate: rankings there mislead.
    """
    return Stage(
        name=name, kind="trunk", shape=shape, parametrization=setting.parametrization, optimizer=setting.optimizer,
        schedule=Schedule(warmup=setting.warmup),
        plan=DataPlan(seed=setting.seed, row=setting.row, segments=(Segment(0, setting.mixture),)),
        corpora=setting.only({corpus for corpus, _ in setting.mixture}),
        batch=setting.batch, steps=steps, seed=setting.seed, masking=setting.masking, open_ended=True,
        keep=tuple(sorted({*branch_points, steps})), save_every=save_every,
    )  # fmt: skip


def scheduled_stage(name: str, shape: Shape, setting: Setting, steps: int, schedule: Schedule) -> Stage:
    """A whole run under a schedule of its own, judged by its held-out loss at the end. Leaves no checkpoint."""
    return replace(
        trunk_stage(name, shape, setting, steps), kind="trial", schedule=schedule, open_ended=False, keep=(), save_final=False,
        score=setting.score, score_tokens=setting.score_tokens,
    )  # fmt: skip


def trial_stage(
    name: str,
    shape: Shape,
    setting: Setting,
    steps: int,
    decay_steps: int,
    form: Form = "exponential",
    floor: float = 0.1,
) -> Stage:
    """A whole small run from warmup to the end of its decay, judged by its held-out loss there. Leaves no checkpoint."""
    schedule = Schedule(
        warmup=setting.warmup, stable_end=steps - decay_steps, decay_steps=decay_steps, form=form, floor=floor
    )
    return scheduled_stage(name, shape, setting, steps, schedule)
