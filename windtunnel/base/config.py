"""The base of every recipe table: strict, frozen, and with the field types that recipes share. Needs no torch."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from windtunnel.base.errors import RecipeError
from windtunnel.base.units import Length, parse_count

T = TypeVar("T")


class Config(BaseModel):
    """A table of a recipe: an unknown key or a value of another type is an error, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=False)


def refuse(problem: str, fix: str = "") -> PydanticCustomError:
    """The error for a validator to raise: a clause (``expected …, got …``) and the way out."""
    return PydanticCustomError("windtunnel", "{problem}", {"problem": problem, "fix": fix})


def _length(value: object) -> object:
    try:
        return Length.parse(value)
    except RecipeError as error:
        raise refuse(error.problem, error.fix) from None


def _count(value: object) -> object:
    try:
        return parse_count(value)
    except RecipeError as error:
        raise refuse(error.problem, error.fix) from None


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def exact(length: Length) -> int | str:
    """A length as recipes write it, without the rounding that ``str`` does for people."""
    if length.unit == "fraction":
        return f"{100 * length.value:.15g}%"
    if length.unit == "per_parameter":
        return f"{length.value:.15g}N"
    return round(length.value) if length.unit == "tokens" else f"{round(length.value)} {length.unit}"


LengthValue = Annotated[Length, BeforeValidator(_length), PlainSerializer(exact)]
"""``6.4M``, ``500 steps``, ``64 sequences``, ``1e18 flops``, ``10%`` or ``20N``."""

Count = Annotated[int, BeforeValidator(_count)]
"""A positive whole number, also as ``6.4M`` or ``3e6``."""

Tuple = Annotated[tuple[T, ...], BeforeValidator(_tuple)]
"""A list in TOML."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

Weights = Annotated[dict[str, Positive], Field(min_length=1)]
"""Corpus name to weight: the share of tokens follows the weights, whatever they add up to."""
