"""The tables ``[trunk]`` and ``[branch.NAME]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import Config, Count, LengthValue, Positive, Weights
from windtunnel.base.units import Length
from windtunnel.train.schedule import Form


class TrunkConfig(Config):
    """The one run at a stable learning rate from which every branch grows."""

    start: str | None = Field(
        default=None,
        min_length=1,
        description="a finished model of this home, PROGRAM/RUN, whose weights it starts from; tokenizer and shape have to be "
        "its own; without it, from fresh weights",
        examples=["evening/same"],
    )
    tokens: LengthValue | None = Field(
        default=None,
        description="D, the length of a finished model's training, its decay included: the trunk itself ends where the decay "
        "begins; without it, from the budget or 20N",
        examples=["6.4M"],
    )
    batch: Count | None = Field(
        default=None,
        description="tokens in a step, a multiple of model.row; without it, from the tunnel or a named law",
        examples=["4096"],
    )
    warmup: LengthValue = Field(
        default=Length(0.01, "fraction"),
        description="linear rise of the learning rate; a share is of trunk.tokens",
        examples=["1%"],
    )
    mixture: Weights | None = Field(
        default=None,
        description="corpus = weight; token shares follow the weights; needed when there are several corpora",
        examples=[{"wiki": 2, "books": 1}],
    )
    masking: Literal["document", "causal"] = Field(
        default="document",
        description="whether a token attends only to its own document, or to all earlier tokens of its row",
        examples=["document"],
    )
    checkpoint_every: LengthValue = Field(
        default=Length(0.05, "fraction"),
        description="distance of checkpoints; a share is of trunk.tokens",
        examples=["5%"],
    )
    keep: int = Field(
        default=3, ge=1, le=10_000, description="newest checkpoints that stay; branch points always stay", examples=[3]
    )


class ExpertsConfig(Config):
    """A mixture of experts in the place of every MLP, each grown from a copy of it."""

    count: int = Field(default=8, ge=2, le=1024, description="experts in a layer", examples=[8])
    top_k: int = Field(default=2, ge=1, le=1024, description="experts that a token passes through", examples=[2])
    drop: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of each expert's inner columns drawn anew (drop-upcycling); 0 copies the MLP whole",
        examples=[0.5],
    )
    router: Positive = Field(
        default=1.0, description="factor on the deviation of the fresh router's weights", examples=[0.1]
    )
    balance: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="weight of the Switch balancing loss", examples=[0.01]
    )
    z: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of the router's z-loss", examples=[0.001]
    )
    bias: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="how far a step moves the bias by which experts are chosen, towards an even load; 0 has none",
        examples=[0.001],
    )


class BranchConfig(Config):
    """A finished model: the trunk's checkpoint at one point, decayed on a mixture of data."""

    kind: Literal["decay", "moe"] = Field(
        default="decay",
        description="what grows here: a decay of the trunk, or a mixture of experts (moe)",
        examples=["decay"],
    )
    parent: str = Field(default="trunk", description="what it grows from", examples=["trunk"])
    at: LengthValue | None = Field(
        default=None,
        description="tokens of the trunk at which it begins; without it, trunk.tokens less its own tokens",
        examples=["5.4M"],
    )
    tokens: LengthValue | None = Field(
        default=None,
        description="its length, of moe that of its decay; a share is of trunk.tokens; without it, a decay takes 10%",
        examples=["10%"],
    )
    form: Form = Field(default="exponential", description="how the learning rate falls", examples=["exponential"])
    floor: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the learning rate at which it ends; without it, 0.1, or wherever the half-life leads",
        examples=[0.1],
    )
    half_life: LengthValue | None = Field(
        default=None,
        description="exponential only: halve the rate every so often, as the paper does, instead of aiming at a floor",
        examples=["5000 steps"],
    )
    mixture: Weights | None = Field(
        default=None,
        description="corpus = weight; without it, the trunk's: the branch that the forecast is about",
        examples=[{"wiki": 1, "chats": 1}],
    )
    batch: Count | None = Field(
        default=None, description="tokens in a step; without it, the trunk's", examples=["4096"]
    )
    stable: LengthValue | None = Field(
        default=None,
        description="moe only: tokens at the stable rate before its decay; a share is of trunk.tokens; without it, as many as "
        "the decay's",
        examples=["10%"],
    )
    experts: ExpertsConfig | None = Field(
        default=None, description="moe only: its experts", examples=[{"count": 8, "top_k": 2}]
    )

    @property
    def length(self) -> Length:
        """Its tokens, stated or not; of a branch with a stable part, those of its decay."""
        return self.tokens or Length(0.1, "fraction")
