"""The keys of ``[branch.NAME]`` that post-training adds: kinds ``sft`` and ``dpo``. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import LengthValue, Positive
from windtunnel.pretrain.config import BranchConfig

POSTTRAINED = ("sft", "dpo")


class GrownConfig(BranchConfig):
    """A finished model of any kind: decayed from the trunk, or post-trained from another branch."""

    kind: Literal["decay", "sft", "dpo"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="decay",
        description="what grows here: decay (from the trunk), sft (chats) or dpo (pairs of answers) from another branch",
        examples=["sft"],
    )
    epochs: Positive | None = Field(
        default=None,
        description="sft, dpo: how many times the mixture's rows are read; without it and tokens, 2 (dpo: 1)",
        examples=[2],
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        lt=10,
        allow_inf_nan=False,
        description="sft, dpo: base learning rate; without it, where the parent's ended",
        examples=[0.001],
    )
    lr_by_role: bool = Field(
        default=True,
        description="sft, dpo: whether roles multiply the rate (muP); without, all tensors train at lr",
        examples=[True],
    )
    warmup: LengthValue | None = Field(
        default=None, description="sft, dpo: linear rise; a share is of its own tokens; without it, 3%", examples=["3%"]
    )
    decay: LengthValue | None = Field(
        default=None,
        description="sft, dpo: length of the decay at its end; a share is of its own tokens; without it, 50%",
        examples=["50%"],
    )
