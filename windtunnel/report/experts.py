"""What the lab book tells about experts: which share of the tokens each of them got, over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.report.figures import NARROW, thin
from windtunnel.report.programme import first_step, tokens_at
from windtunnel.report.svg import SERIES, Axis, Canvas, counts, spread, x_axis, y_axis

Curve = tuple[tuple[float, float], ...]
_NAMED = 16
"""Up to so many experts have their number at the end of their line."""


@dataclass(frozen=True)
class Loads:
    """One run with experts, over the tokens that it has read itself: ``experts`` the load of each, 1 for an even share, mean over
    layers; ``uneven`` the standard deviation over experts, relative, mean over layers; ``busiest`` the largest load in any."""

    name: str
    experts: tuple[Curve, ...]
    uneven: Curve
    busiest: Curve

    @property
    def at_end(self) -> tuple[float, float]:
        """Unevenness and largest load, means over the last tenth of the steps."""
        last = max(1, len(self.uneven) // 10)
        uneven, busiest = (sum(v for _, v in curve[-last:]) / last for curve in (self.uneven, self.busiest))
        return uneven, busiest


def read_loads(book: LabBook, runs: Sequence[dict[str, Any]]) -> list[Loads]:
    """The runs that have recorded where their tokens went."""
    return [_loads(book, [run]) for run in runs if _recorded(book, run)]


def read_loads_along(book: LabBook, chain: Sequence[dict[str, Any]]) -> Loads | None:
    """Runs of which each grows from the one before, as one run from where the first began; None where one recorded nothing."""
    return _loads(book, chain) if chain and all(_recorded(book, run) for run in chain) else None


def _recorded(book: LabBook, run: dict[str, Any]) -> bool:
    return "load_cv" in book.metric_names(run["id"])


def _loads(book: LabBook, chain: Sequence[dict[str, Any]]) -> Loads:
    before = tokens_at(chain[0], first_step(chain[0]))
    ends = [*(first_step(run) for run in chain[1:]), math.inf]

    def curve(name: str) -> Curve:
        read = [
            (tokens_at(run, s) - before, v)
            for run, end in zip(chain, ends, strict=True)
            for s, v in zip(*book.metrics(run["id"], name), strict=True)
            if s <= end and v == v
        ]
        return tuple(read)

    experts = tuple(curve(f"load_{e}") for e in range(int(chain[-1]["config"]["shape"]["experts"])))
    return Loads(str(chain[-1]["name"]), experts, curve("load_cv"), curve("load_max"))


def load_figure(loads: Loads, width: int) -> str:
    """Each expert's load over tokens, and beneath it how uneven the loads are."""
    narrow = width < NARROW
    left, right = 44, width - 34
    top, base = 24, 24 + (170 if narrow else 210)
    low_top, low_base = base + 44, base + 114
    canvas = Canvas(width, low_base + 44, "Share of the tokens that each expert got, relative to an even one")
    bins = 60 if narrow else 120
    lines = [thin(curve, bins) for curve in loads.experts]
    x = Axis(0, max([d for line in lines for d, _ in line] + [1.0]), left, right)
    y = Axis.over([1.0, *(v for line in lines for _, v in line)], base, top, margin=0.08)
    y_axis(canvas, y, left, right, "load of each expert, 1 for an even share")
    canvas.line(left, y(1.0), right, y(1.0), "hair")
    ends = spread([y(line[-1][1]) + 4 for line in lines], 11, top + 2, base + 6)
    for e, (line, end) in enumerate(zip(lines, ends, strict=True)):
        canvas.path([(x(d), y(v)) for d, v in line], f"l{e % SERIES}" + (" dash" if e >= SERIES else ""))
        if len(lines) <= _NAMED:
            canvas.text(right + 8, end, str(e), f"k f{e % SERIES}")
    uneven = thin(loads.uneven, bins)
    z = Axis(0, max(v for _, v in uneven) * 1.08 or 1.0, low_base, low_top)
    y_axis(canvas, z, left, right, "standard deviation of the loads", count=2)
    canvas.path([(x(d), z(v)) for d, v in uneven], "trunk")
    x_axis(canvas, x, low_base, "tokens of this branch", count=4 if narrow else 7, show=counts)
    return canvas.render()
