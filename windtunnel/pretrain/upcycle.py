"""A mixture of experts grown from a trunk by sparse upcycling (arXiv 2404.06395, section 7.3). Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.train.batches import Changes
from windtunnel.train.growth import Balance, Surgery
from windtunnel.train.schedule import Form
from windtunnel.train.stage import Stage


def upcycled_stage(
    trunk: Stage, name: str, setting: Setting, *, at: int, stable: int, decay: int, experts: int, top_k: int = 2,
    batch: int | None = None, surgery: Surgery | None = None, balance: Balance | None = None, form: Form = "exponential",
    floor: float = 0.1, half_life: float | None = None, mixture: Mixture | None = None, changes: Changes = (),
) -> Stage:  # fmt: skip
    """Every MLP of a trunk's checkpoint at step ``at`` becomes ``experts`` copies of itself, of which a token takes ``top_k``.

    The branch goes on at the stable learning rate for ``stable`` updates, in which experts part ways, and then decays for
    ``decay`` more. It inherits moments, step count and data position, and reads on in the trunk's data or in a mixture of its
    own, ``batch`` sequences in a step, and from each of ``changes``, counted as the trunk's steps go on, so many more or fewer.
    """
    decayed = decay_stage(
        trunk, name, setting, at=at, steps=decay, form=form, floor=floor, half_life=half_life, mixture=mixture
    )
    return replace(
        decayed, kind="moe", shape=replace(trunk.shape, experts=experts, top_k=top_k), batch=batch or trunk.batches.at(at),
        batch_changes=changes, steps=at + stable + decay, schedule=replace(decayed.schedule, stable_end=at + stable),
        surgery=surgery or Surgery(), balance=balance or Balance(),
    )  # fmt: skip
