"""Search spaces: named hyper-parameters, on a logarithmic axis or as a choice between words. Needs no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from windtunnel.base.errors import RecipeError
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.train.stage import optimizer_of

Value = float | str
"""A number, a word, or (as a bool, which Python counts among the numbers) a yes or no."""
Values = dict[str, Value]


class Limits(NamedTuple):
    """Between which ends values of an axis make sense, and whether it is the distance to one that is searched."""

    low: float
    high: float
    complement: bool = False


LIMITS = {
    "learning_rate": Limits(1e-9, 10.0),
    "init_std": Limits(1e-6, 100.0),
    "scale_emb": Limits(1e-4, 1e4),
    "scale_depth": Limits(1e-4, 1e4),
    "weight_decay": Limits(1e-6, 10.0),
    "beta2": Limits(0.1, 0.999999, complement=True),
    "warmup": Limits(1e-4, 0.5),
}
"""The axes by name. ``beta2`` is searched on the logarithm of 1 − β₂; ``warmup`` is a share of a run's steps."""
KNOWN = tuple(LIMITS)
CHOICES: dict[str, tuple[Value, ...]] = {
    "qk_norm": (False, True),
    "optimizer": ("adamw", "muon"),
    "decay": ("plain", "independent"),
}
"""The choices by name, with all that each can be."""
REFERENCE_RATE = 0.01
"""Learning rate at which a searched weight decay is equally strong in both forms: the paper's base rate."""


@dataclass(frozen=True)
class Axis:
    """One searched hyper-parameter between two positive ends, both included, on a log axis.

    Raises:
        RecipeError: the name is unknown, the ends are in the wrong order, or values there make no sense.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        where = f"tunnel.space.{self.name}"
        if self.name not in LIMITS:
            raise RecipeError("tunnel.space", f"expected one of {', '.join(KNOWN)}, got {self.name!r}")
        if not 0 < self.low < self.high < math.inf:
            raise RecipeError(
                where, f"expected 0 < low < high, got {self.low:g} and {self.high:g}", "write the lower end first"
            )
        limits = LIMITS[self.name]
        if self.low < limits.low or self.high > limits.high:
            got = f"{self.low:g} and {self.high:g}"
            raise RecipeError(
                where, f"expected values between {limits.low:g} and {limits.high:g}, got {got}", "narrow the range"
            )

    def inner(self, value: float) -> float:
        """What lies on the logarithmic axis: the value, or its distance to one."""
        return 1 - value if LIMITS[self.name].complement else value

    def outer(self, inner: float) -> float:
        """The value to a place on the axis, with four significant digits there, kept inside the range."""
        short = float(f"{inner:.4g}")
        value = round(1 - short, 12) if LIMITS[self.name].complement else short
        return min(max(value, self.low), self.high)

    @property
    def length(self) -> float:
        """Logarithm of the far end over the near one; negative where the distance to one is searched."""
        return math.log(self.inner(self.high) / self.inner(self.low))

    def place(self, value: float) -> float:
        """Where a value lies on the axis: 0 at the low end, 1 at the high one."""
        return math.log(self.inner(value) / self.inner(self.low)) / self.length

    def near_edge(self, value: float, share: float = 0.05) -> str:
        """``"low"`` or ``"high"`` if a value lies within that share of the axis from an end, else an empty string."""
        place = self.place(value)
        return "low" if place < share else "high" if place > 1 - share else ""

    def wider(self, side: str) -> Axis:
        """The axis with half of its length more on one side, as far as values make sense."""
        limits, grow = LIMITS[self.name], math.exp(self.length / 2)
        if side == "low":
            end = self.outer_far(self.inner(self.low) / grow)
            return replace(self, low=min(self.low, max(limits.low, end)))
        end = self.outer_far(self.inner(self.high) * grow)
        return replace(self, high=max(self.high, min(limits.high, end)))

    def outer_far(self, inner: float) -> float:
        """The value to a place on the axis beyond its range, with three significant digits."""
        short = float(f"{inner:.3g}")
        return round(1 - short, 12) if LIMITS[self.name].complement else short


@dataclass(frozen=True)
class Choice:
    """One searched hyper-parameter that is one of several words.

    Raises:
        RecipeError: the name or an option is unknown, or there are not two different options.
    """

    name: str
    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        where = f"tunnel.space.{self.name}"
        if self.name not in CHOICES:
            raise RecipeError("tunnel.space", f"expected one of {', '.join((*KNOWN, *CHOICES))}, got {self.name!r}")
        unknown = [option for option in self.options if option not in CHOICES[self.name]]
        if unknown:
            raise RecipeError(where, f"expected options among {CHOICES[self.name]}, got {unknown[0]!r}", "leave it out")
        if len(set(self.options)) < 2 or len(set(self.options)) < len(self.options):
            got = ", ".join(map(str, self.options))
            raise RecipeError(where, f"expected two different options or more, got [{got}]", "leave the axis out")


Space = tuple[Axis | Choice, ...]

DEFAULT_SPACE: tuple[Axis, ...] = (
    Axis("learning_rate", 0.002, 0.08),
    Axis("init_std", 0.03, 0.3),
    Axis("scale_emb", 2.0, 40.0),
    Axis("scale_depth", 0.4, 4.0),
)
"""Around the optimum of arXiv 2404.06395, appendix A.1 (0.01, 0.1, 12, 1.4), a factor of three to eight each way."""


def space_of(table: Mapping[str, Any]) -> Space:
    """A space from names and ``[low, high]`` or a list of options, as a recipe has them.

    Raises:
        RecipeError: there is no axis, or one makes no sense.
    """
    given = {name: value for name, value in table.items() if value is not None}
    if not given:
        raise RecipeError(
            "tunnel.space", "expected one axis or more, got none", "write for example learning_rate = [0.002, 0.08]"
        )
    return tuple(
        Choice(name, tuple(value)) if name in CHOICES else Axis(name, float(value[0]), float(value[1]))
        for name, value in given.items()
    )


def to_dicts(space: Space) -> list[dict[str, Any]]:
    """A space as JSON."""
    return [asdict(axis) for axis in space]


def from_dicts(raw: list[dict[str, Any]]) -> Space:
    """Reads what ``to_dicts`` wrote."""
    return tuple(Choice(one["name"], tuple(one["options"])) if "options" in one else Axis(**one) for one in raw)


def inside(space: Space, values: Values) -> Values:
    """The values of a space's axes, each moved to the nearest point that the space holds."""
    out: Values = {}
    for axis in space:
        value = values[axis.name]
        if isinstance(axis, Choice):
            out[axis.name] = value if value in axis.options else axis.options[0]
        else:
            out[axis.name] = min(max(float(value), axis.low), axis.high)
    return out


def grid(space: Space, number: int) -> list[Values]:
    """The whole grid of ``number`` points: as many places on each axis, ends included, times all options of the choices.

    Raises:
        RecipeError: no grid of the space has that many points.
    """
    axes = [axis for axis in space if isinstance(axis, Axis)]
    sizes: list[int] = []
    for places in range(2, 1001):
        sizes.append(math.prod(places if isinstance(axis, Axis) else len(axis.options) for axis in space))
        if sizes[-1] >= number or not axes:
            break
    if sizes[-1] != number:
        near = " or ".join(str(size) for size in sizes[-2:])
        what = f"expected the size of a grid over {len(space)} axes, got {number}"
        raise RecipeError("tunnel.trials", what, f"write {near}, or another sampler")
    lines = [
        [axis.outer(axis.inner(axis.low) * math.exp(axis.length * i / (len(sizes)))) for i in range(len(sizes) + 1)]
        if isinstance(axis, Axis)
        else list(axis.options)
        for axis in space
    ]
    names = [axis.name for axis in space]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*lines)]


def shown_value(value: Value) -> str:
    """A hyper-parameter as people read it: four digits, yes or no, or the word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"


def edges(space: Space, values: Values) -> dict[str, str]:
    """The numeric axes on whose edge a point lies, each with the side: ``{"learning_rate": "high"}``."""
    found = {a.name: a.near_edge(float(values[a.name])) for a in space if isinstance(a, Axis)}
    return {name: side for name, side in found.items() if side}


def apply_to_shape(shape: Shape, values: Mapping[str, Value]) -> Shape:
    """A shape with what was searched about it."""
    return replace(shape, qk_norm=bool(values["qk_norm"])) if "qk_norm" in values else shape


def apply(setting: Setting, values: Mapping[str, Value], steps: int | None = None) -> Setting:
    """A setting with searched values put where they belong.

    A searched ``decay`` "independent" takes the weight decay times ``REFERENCE_RATE``: at that learning rate both forms are
    equally strong, so that one axis serves both.

    Args:
        steps: length of the run, of which ``warmup`` is a share; without it the warmup stays as it is.
    """
    optimizer = {name: values[name] for name in ("learning_rate", "weight_decay", "beta2") if name in values}
    constants = {name: values[name] for name in ("init_std", "scale_emb", "scale_depth") if name in values}
    if "warmup" in values and steps is not None:
        setting = replace(setting, warmup=max(1, round(float(values["warmup"]) * steps)))
    made = replace(setting.optimizer, **optimizer)  # pyright: ignore[reportArgumentType]
    if "decay" in values:
        share = made.weight_decay * (REFERENCE_RATE if values["decay"] == "independent" else 1.0)
        made = replace(made, decay=str(values["decay"]), weight_decay=share)  # pyright: ignore[reportArgumentType]
    return replace(
        setting,
        optimizer=optimizer_of(str(values["optimizer"]), made) if "optimizer" in values else made,
        parametrization=replace(setting.parametrization, **constants),  # pyright: ignore[reportArgumentType]
    )
