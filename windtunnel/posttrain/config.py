"""The keys of ``[branch.NAME]`` that post-training adds: kinds ``sft``, ``dpo``, ``adapt`` and ``soup``. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import Config, LengthValue, Positive, Tuple
from windtunnel.pretrain.config import BranchConfig
from windtunnel.train.preference import Preference, PreferenceLoss, Reference

POSTTRAINED = ("sft", "dpo", "adapt")
"""Kinds that train on rows of whole documents, from the weights of another branch."""
_DEFAULTS = {"dpo": (0.1, 0.0), "dpo-normalised": (5.0, 0.0), "simpo": (2.0, 0.8)}
"""beta and margin: arXiv 2305.18290 (appendix B), 2411.15124 (table 17), 2405.14734 (section 3 and appendix B)."""


class LoraConfig(Config):
    """Low-rank adapters beside the hidden matrices, which stay as they are (arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1, le=4096, description="inner dimension of an adapter", examples=[8])
    alpha: Positive = Field(
        default=16.0, description="an adapter's output is multiplied by alpha / rank", examples=[16.0]
    )


class GrownConfig(BranchConfig):
    """A finished model of any kind: grown from the trunk, or post-trained from another branch."""

    kind: Literal["decay", "moe", "long", "sft", "dpo", "adapt", "soup"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="decay",
        description="what grows here: decay, moe (a mixture of experts) or long (a longer context) from the trunk; long from "
        "another long one; from another branch sft (chats), dpo (pairs of answers) or adapt (text); soup (weights averaged)",
        examples=["sft"],
    )
    epochs: Positive | None = Field(
        default=None,
        description="sft, dpo, adapt: how many times the mixture's rows are read; without it and tokens, 2 (dpo: 1)",
        examples=[2],
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        lt=10,
        allow_inf_nan=False,
        description="sft, dpo, adapt: base learning rate; without it, where the parent's ended",
        examples=[0.001],
    )
    lr_by_role: bool = Field(
        default=True,
        description="sft, dpo, adapt: whether roles multiply the rate (muP); without, all tensors train at lr",
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
    reference: Reference | None = Field(
        default=None,
        description="dpo: precomputed scores all pairs once and holds no second model; live keeps the frozen parent in memory "
        "and asks it in every step; without it, precomputed",
        examples=["live"],
    )
    beta: Positive | None = Field(
        default=None,
        description="dpo: strength of the pull to the reference; without it, 0.1 (dpo-normalised: 5, simpo: 2)",
        examples=[0.1],
    )
    betas: Tuple[Positive] | None = Field(
        default=None,
        min_length=1,
        description="dpo: also try these, as a small study in the report",
        examples=[[0.03, 0.1, 0.3]],
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
        default=None,
        description="sft, dpo, adapt: linear rise; a share is of its own tokens; without it, 3%",
        examples=["3%"],
    )
    decay: LengthValue | None = Field(
        default=None,
        description="sft, adapt: length of the decay at its end; a share is of its own tokens; without it, 50%",
        examples=["50%"],
    )

    lora: LoraConfig | None = Field(
        default=None,
        description="sft, dpo, adapt: train low-rank adapters and merge them at every checkpoint",
        examples=[{"rank": 8, "alpha": 16.0}],
    )
    of: Tuple[str] | None = Field(
        default=None,
        min_length=1,
        description="soup: branches to average, or the trunk",
        examples=[["chat", "aligned"]],
    )
    weights: Tuple[Positive] | None = Field(
        default=None, description="soup: one for each of its members; without it, equal ones", examples=[[0.7, 0.3]]
    )
    last: int | None = Field(
        default=None,
        ge=2,
        le=1000,
        description="soup of the trunk: how many of its last checkpoints; without it, 4",
        examples=[4],
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
            self.reference or "precomputed",
        )
