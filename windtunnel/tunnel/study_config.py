"""The tables of a recipe for single studies: ``[tunnel.transfer]``, ``[tunnel.batch]``. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from windtunnel.base.config import Config, Count, LengthValue, Positive, Tuple, refuse
from windtunnel.base.units import Length
from windtunnel.model.config import Dimension
from windtunnel.model.parametrization import Name

TransferAxis = Literal["width", "depth", "batch", "horizon", "size"]


def _distinct(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise refuse(f"expected each value once, got {', '.join(map(str, values))}", "leave the second one out")
    return values


def _rising(factors: tuple[int, ...]) -> tuple[int, ...]:
    if factors[0] != 1 or list(factors) != sorted(set(factors)):
        raise refuse(
            f"expected rising factors from 1, got {', '.join(map(str, factors))}", "write for example [1, 2, 4, 8]"
        )
    return factors


class TransferConfig(Config):
    """The transfer study: the best learning rate at several values of one axis after another, from one base shape."""

    axes: Annotated[Tuple[TransferAxis], AfterValidator(_distinct)] = Field(
        default=("width",),
        min_length=1,
        description="what is varied, one at a time; size takes tunnel.proxies, as in the paper's figure 3",
        examples=[["width", "depth"]],
    )
    over: Literal["learning_rate", "weight_decay"] = Field(
        default="learning_rate",
        description="whose best value is looked for at each size: the base learning rate, or plain weight decay at the "
        "recipe's rate, for which rules are compared",
        examples=["weight_decay"],
    )
    factors: Annotated[Tuple[Annotated[int, Field(ge=1, le=1024)]], AfterValidator(_rising)] = Field(
        default=(1, 2, 4, 8),
        min_length=2,
        max_length=12,
        description="values of an axis as multiples of the base shape's, batch or tokens",
        examples=[[1, 2, 4, 8]],
    )
    width: Dimension | None = Field(
        default=None, description="width of the base shape; without it, the base width", examples=[32]
    )
    layers: Dimension = Field(default=2, description="layers of the base shape", examples=[2])
    tokens: Count | None = Field(
        default=None,
        description="tokens of a trial; without it, ten for each parameter of the base shape",
        examples=["300k"],
    )
    rates: int = Field(
        default=5,
        ge=3,
        le=25,
        description="values of each grid at first; a grid grows while its best one is near an end",
        examples=[5],
    )
    spacing: Literal["sqrt2", "2"] = Field(
        default="sqrt2", description="ratio of neighbouring values", examples=["sqrt2"]
    )
    centre: dict[Name, Positive] = Field(
        default_factory=dict,
        description="parametrization = the middle of its first grid; without it, the searched or the recipe's value",
        examples=[{"mup": 0.012}],
    )
    seeds: int = Field(
        default=1, ge=1, le=20, description="seeds of each trial; two or more give intervals", examples=[3]
    )
    parametrizations: Annotated[Tuple[Name], AfterValidator(_distinct)] = Field(
        default=(),
        description="parametrizations that are compared; without it, the recipe's own",
        examples=[["mup", "standard"]],
    )
    batch_rule: Literal["sqrt", "none"] | None = Field(
        default=None,
        description="learning rate along the batch axis: times √factor, or as it is; without it, what the parametrization's "
        "table makes of all constants, and √factor where that has no rule (mup, standard)",
        examples=["sqrt"],
    )
    horizon_exponent: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="learning rate along the horizon axis: divided by factor to this power; without it, what the "
        "parametrization's table makes of all constants: nothing under mup and standard",
        examples=[0.3],
    )


def _growing(factors: tuple[float, ...]) -> tuple[float, ...]:
    if factors[0] != 1 or list(factors) != sorted(set(factors)):
        raise refuse(
            f"expected rising factors from 1, got {', '.join(map(str, factors))}", "write for example [1, 2, 4]"
        )
    return factors


class BatchConfig(Config):
    """The batch study: the paper's protocol (several sizes times several batches), and branches with a larger batch."""

    sizes: Annotated[Tuple[str] | None, AfterValidator(lambda v: v and _distinct(v))] = Field(
        default=None,
        min_length=1,
        max_length=12,
        description="sizes that are trained; without it, tunnel.proxies; three or more give the law an interval",
        examples=[["0.02M", "0.05M", "0.1M"]],
    )
    batches: Annotated[Tuple[Count] | None, AfterValidator(lambda v: v and _distinct(v))] = Field(
        default=None,
        min_length=3,
        max_length=24,
        description="tokens in a step, multiples of model.row; without it, trunk.batch times 1/4 to 8 in six steps",
        examples=[[512, 1024, 2048, 4096, 8192, 16384]],
    )
    tokens: Tuple[LengthValue] = Field(
        default=(Length(10, "per_parameter"), Length(20, "per_parameter"), Length(40, "per_parameter")),
        min_length=2,
        max_length=12,
        description="lengths of the finished runs, decay included; in tokens, or as 20N",
        examples=[["10N", "20N", "40N"]],
    )
    seeds: int = Field(default=1, ge=1, le=20, description="seeds of each trunk", examples=[2])
    rate_rule: Literal["sqrt", "none"] = Field(
        default="sqrt",
        description="base learning rate of another batch than trunk.batch: times √factor, or as it is (the paper)",
        examples=["sqrt"],
    )
    levels: int = Field(
        default=5, ge=2, le=50, description="losses of each size at which batches are compared", examples=[5]
    )
    factors: Annotated[Tuple[Positive], AfterValidator(_growing)] = Field(
        default=(1, 2, 4),
        min_length=2,
        max_length=8,
        description="multiples of trunk.batch with which branches go on from checkpoints, to find the critical batch",
        examples=[[1, 2, 4]],
    )
    branch_tokens: Positive = Field(
        default=0.25,
        le=4,
        description="length of these branches as a share of the tokens before them",
        examples=[0.25],
    )
    tolerance: Positive = Field(
        default=0.05,
        le=1,
        description="how much more compute a larger batch may cost before it counts as too large",
        examples=[0.05],
    )
