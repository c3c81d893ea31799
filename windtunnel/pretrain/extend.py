"""A longer context grown from a trunk (arXiv 2404.06395, section 7.2). Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.train.growth import Surgery
from windtunnel.train.schedule import Form
from windtunnel.train.stage import Stage


def extended_stage(
    trunk: Stage, name: str, setting: Setting, *, at: int, row: int, stable: int, decay: int, batch: int,
    theta: float | None = None, scaling: str = "none", factor: float | None = None, untie: bool = True,
    form: Form = "exponential", floor: float = 0.1, half_life: float | None = None, mixture: Mixture | None = None,
) -> Stage:  # fmt: skip
    """From a checkpoint at step ``at``: rows of ``row`` tokens, positions stretched to reach them, ``batch`` rows in a step.

    It inherits moments and step count, and goes on at the stable rate for ``stable`` updates before its ``decay``. Longer rows
    are another order of the data: the branch reads its mixture from a plan of its own, which does not know what the trunk has
    read.

    Args:
        theta: a new base frequency (ABF); None keeps the trunk's.
        scaling: how positions are stretched besides, see ``model/rope.py``.
        factor: by how much; None means the ratio of the rows.
        untie: gives a tied model a head of its own, which begins as a copy of the embedding.
    """
    decayed = decay_stage(trunk, name, setting, at=at, steps=decay, form=form, floor=floor, half_life=half_life)
    chosen = mixture or trunk.plan.segments[-1].mixture
    stretched = scaling != "none"
    shape = replace(
        trunk.shape, tied=trunk.shape.tied and not untie, max_positions=max(row, trunk.shape.max_positions),
        rope_theta=theta or trunk.shape.rope_theta, rope_scaling=scaling,
        rope_factor=(factor or row / trunk.plan.row) if stretched else 1.0, rope_original=trunk.plan.row if stretched else 0,
    )  # fmt: skip
    return replace(
        decayed, kind="long", shape=shape, batch=batch, steps=at + stable + decay,
        plan=DataPlan(trunk.plan.seed, row, (Segment(0, chosen),)), corpora=setting.only({corpus for corpus, _ in chosen}),
        schedule=replace(decayed.schedule, stable_end=at + stable), surgery=Surgery(),
    )  # fmt: skip
