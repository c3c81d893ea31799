"""The tables ``[trunk]`` and ``[branch.NAME]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import Config, Count, LengthValue, Tuple, Weights
from windtunnel.base.units import Length
from windtunnel.train.schedule import Form


class BatchChange(Config):
    """One change of the trunk's batch."""

    after: LengthValue = Field(
        description="tokens of the trunk, or steps, after which the batch changes; no share, so that the trunk can be extended",
        examples=["1B"],
    )
    batch: Count = Field(description="tokens in a step from there on, a multiple of model.row", examples=["4M"])


class TrunkConfig(Config):
    """The one run at a stable learning rate from which every branch grows."""

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
    batch_schedule: Tuple[BatchChange] = Field(
        default=(),
        description="where the batch grows, at the same learning rate: the paper's 1.2B went from 2M to 4M tokens; branches keep "
        "the batch of where they begin, and the tunnel's models the first one",
        examples=[[{"after": "100B", "batch": "4M"}]],
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


class BranchConfig(Config):
    """A finished model: the trunk's checkpoint at one point, decayed on a mixture of data."""

    kind: Literal["decay"] = Field(default="decay", description="what grows here", examples=["decay"])
    parent: str = Field(default="trunk", description="what it grows from", examples=["trunk"])
    at: LengthValue | None = Field(
        default=None,
        description="tokens of the trunk at which it begins; without it, trunk.tokens less its own tokens",
        examples=["5.4M"],
    )
    tokens: LengthValue | None = Field(
        default=None,
        description="its length; a share is of trunk.tokens; without it, a decay takes 10%",
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

    @property
    def length(self) -> Length:
        """Its tokens, stated or not."""
        return self.tokens or Length(0.1, "fraction")
