"""Search spaces: named hyper-parameters with ranges on a logarithmic axis. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from windtunnel.base.errors import RecipeError
from windtunnel.pretrain.setting import Setting

KNOWN = ("learning_rate", "init_std", "scale_emb", "scale_depth")


@dataclass(frozen=True)
class Axis:
    """One searched hyper-parameter between two positive ends, both included, on a log axis."""

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.name not in KNOWN:
            raise RecipeError("tunnel.space", f"expected one of {', '.join(KNOWN)}, got {self.name!r}")
        if not 0 < self.low < self.high < math.inf:
            raise RecipeError(f"tunnel.space.{self.name}", f"expected 0 < low < high, got {self.low} and {self.high}")

    def near_edge(self, value: float, share: float = 0.05) -> str:
        """``"low"`` or ``"high"`` if a value lies within that share of the axis from an end, else an empty string."""
        place = math.log(value / self.low) / math.log(self.high / self.low)
        return "low" if place < share else "high" if place > 1 - share else ""


Space = tuple[Axis, ...]

DEFAULT_SPACE: Space = (
    Axis("learning_rate", 0.002, 0.08),
    Axis("init_std", 0.03, 0.3),
    Axis("scale_emb", 2.0, 40.0),
    Axis("scale_depth", 0.4, 4.0),
)
"""Around the optimum of arXiv 2404.06395, appendix A.1 (0.01, 0.1, 12, 1.4), a factor of three to eight each way."""


def apply(setting: Setting, values: dict[str, float]) -> Setting:
    """A setting with searched values put where they belong."""
    values = dict(values)
    optimizer = setting.optimizer
    if "learning_rate" in values:
        optimizer = replace(optimizer, learning_rate=values.pop("learning_rate"))
    return replace(setting, optimizer=optimizer, parametrization=replace(setting.parametrization, **values))
