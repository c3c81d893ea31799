"""A longer context grown from a trunk (arXiv 2404.06395, section 7.2). Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from windtunnel.corpus.mixture import DataPlan, Segment, corpus_of
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.train.batches import Changes
from windtunnel.train.growth import Surgery
from windtunnel.train.schedule import Form
from windtunnel.train.stage import Stage


def extended_stage(
    parent: Stage, name: str, setting: Setting, *, at: int, row: int, stable: int, decay: int, batch: int,
    theta: float | None = None, scaling: str | None = None, factor: float | None = None, untie: bool = True,
    form: Form = "exponential", floor: float = 0.1, half_life: float | None = None, mixture: Mixture | None = None,
    packed: tuple[tuple[str, str], ...] = (), long_from: int = 0, changes: Changes = (),
) -> Stage:  # fmt: skip
    """From a checkpoint at step ``at`` of a trunk, or of another such stage that has not decayed: rows of ``row`` tokens,
    positions stretched to reach them, ``batch`` rows in a step, and others from each of ``changes`` on.

    It inherits moments and step count, and goes on at the stable rate for ``stable`` updates before its ``decay``. Longer rows
    are another order of the data: the branch reads its mixture from a plan of its own, which does not know what the trunk has
    read. A curriculum of lengths is a chain of such stages.

    Args:
        theta: a new base frequency (ABF); None keeps the parent's.
        scaling: how positions are stretched besides, see ``model/rope.py``; None keeps the parent's way.
        factor: by how much, counted from where that way of stretching began; None means the ratio of the rows.
        decay: updates of the decay; 0 leaves it to a stage that grows from this one.
        packed: hash of each row index, where documents are packed whole, the long ones and the short ones apart.
        long_from: tokens from which they are long.
        untie: gives a tied model a head of its own, which begins as a copy of the embedding.
    """
    old = parent.shape
    chosen, way = mixture or parent.plan.segments[-1].mixture, scaling or old.rope_scaling
    begun = old.rope_original if way == old.rope_scaling and old.rope_original else parent.plan.row
    stretched = way != "none"
    shape = replace(
        old, tied=old.tied and not untie, max_positions=max(row, old.max_positions), rope_theta=theta or old.rope_theta,
        rope_scaling=way, rope_factor=(factor or row / begun) if stretched else 1.0, rope_original=begun if stretched else 0,
    )  # fmt: skip
    decayed = decay_stage(parent, name, setting, at=at, steps=decay, form=form, floor=floor, half_life=half_life)
    schedule = replace(decayed.schedule, stable_end=at + stable) if decay else parent.schedule
    return replace(
        decayed, kind="long", shape=shape, batch=batch, batch_changes=changes, steps=at + stable + decay, schedule=schedule,
        surgery=Surgery(),
        plan=DataPlan(parent.plan.seed, row, (Segment(0, chosen),), tuple(sorted(packed)), long_from),
        masking="document" if packed else parent.masking, corpora=setting.only({corpus_of(name) for name, _ in chosen}),
    )  # fmt: skip
