"""Branches of a trunk. A decay branch continues it, moments and data position included. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.train.schedule import Form
from windtunnel.train.stage import Stage, Start


def decay_stage(
    trunk: Stage, name: str, setting: Setting, *, at: int, steps: int, form: Form = "exponential", floor: float = 0.1,
    half_life: float | None = None, mixture: Mixture | None = None,
) -> Stage:  # fmt: skip
    """A decay of ``steps`` updates from step ``at`` of a trunk.

    Without a mixture it reads on in the trunk's own data (A-1 of arXiv 2404.06395, section 5) and equals, bit for bit, the
    uninterrupted run of the same schedule. With one it changes the data from its first step (A-2) and still rereads nothing
    that the trunk has consumed. It keeps the batch that the trunk had at ``at``.
    """
    plan = (
        trunk.plan
        if mixture is None or mixture == setting.mixture
        else trunk.plan.extended(trunk.batches.sequences(at), mixture)
    )
    names = {corpus for segment in plan.segments for corpus, _ in segment.mixture}
    return replace(
        trunk, name=name, kind="decay", open_ended=False, start=Start(trunk.key, at), steps=at + steps, keep=(),
        schedule=replace(
            trunk.schedule, stable_end=at, decay_steps=steps, form=form, floor=floor, half_life=half_life
        ),
        plan=plan, corpora=setting.only(names), score=setting.score, batch_changes=trunk.batches.until(at),
        score_tokens=setting.score_tokens,
    )  # fmt: skip


def whole_run(branch: Stage) -> Stage:
    """The same schedule and data as one uninterrupted run from the seed: the reference that a branch must equal."""
    return replace(branch, start=None)
