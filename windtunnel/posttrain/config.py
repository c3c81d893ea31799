"""The keys of ``[branch.NAME]`` that post-training adds: kinds ``sft`` and ``dpo``. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import LengthValue, Positive
from windtunnel.pretrain.config import BranchConfig
from windtunnel.train.preference import Preference, PreferenceLoss

POSTTRAINED = ("sft", "dpo")
_DEFAULTS = {"dpo": (0.1, 0.0), "dpo-normalised": (5.0, 0.0), "simpo": (2.0, 0.8)}
"""beta and margin: arXiv 2305.18290 (appendix B), 2411.15124 (table 17), 2405.14734 (section 3 and appendix B)."""


class GrownConfig(BranchConfig):
    """A finished model of any kind: grown from the trunk, or post-trained from another branch."""

    kind: Literal["decay", "moe", "long", "sft", "dpo"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="decay",
        description="what grows here: decay, moe (a mixture of experts) or long (a longer context) from the trunk, long from "
        "another long one, sft (chats) or dpo (pairs of answers) from another branch",
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
    preset: Literal["paper"] | None = Field(
        default=None,
        description="dpo: paper is lr = 1e-5 with lr_by_role = false (arXiv 2404.06395)",
        examples=["paper"],
    )
    loss: PreferenceLoss | None = Field(
        default=None,
        description="dpo: dpo, dpo-normalised (by the answer's tokens) or simpo (no reference); without it, dpo",
        examples=["dpo"],
    )
    beta: Positive | None = Field(
        default=None,
        description="dpo: strength of the pull to the reference; without it, 0.1 (dpo-normalised: 5, simpo: 2)",
        examples=[0.1],
    )
    smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        allow_inf_nan=False,
        description="dpo: share of pairs assumed to be the wrong way round; without it, 0",
        examples=[0.1],
    )
    margin: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="dpo: by how much rewards should differ; without it, 0 (simpo: 0.8)",
        examples=[0.8],
    )
    warmup: LengthValue | None = Field(
        default=None, description="sft, dpo: linear rise; a share is of its own tokens; without it, 3%", examples=["3%"]
    )
    decay: LengthValue | None = Field(
        default=None,
        description="sft, dpo: length of the decay at its end; a share is of its own tokens; without it, 50%",
        examples=["50%"],
    )

    @property
    def preference(self) -> Preference | None:
        """What a dpo branch minimises."""
        if self.kind != "dpo":
            return None
        loss = self.loss or "dpo"
        beta, margin = _DEFAULTS[loss]
        return Preference(
            loss,
            beta if self.beta is None else self.beta,
            self.smoothing or 0.0,
            margin if self.margin is None else self.margin,
        )
