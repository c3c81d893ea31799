"""Values with intervals, one row each, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from windtunnel.base.units import minus
from windtunnel.report.svg import Axis, Canvas, text_width, x_axis

_ROW = 30


@dataclass(frozen=True)
class Value:
    """A named number with its interval, if there is one."""

    name: str
    value: float
    low: float | None
    high: float | None


def values_figure(
    rows: Sequence[Value],
    title: str,
    width: int = 720,
    *,
    alone: bool = False,
    digits: int = 2,
    band: float | None = None,
) -> str:
    """A dot and a bar for each, over one axis on which zero is marked, and the stretch of ``band`` on both sides of it."""
    left = max([text_width(row.name) for row in rows] + [40]) + 16
    right, base = width - 90, 18 + _ROW * len(rows)
    canvas = Canvas(width, base + 46, f"{title}: {', '.join(row.name for row in rows)}")
    if not rows:
        canvas.text(0, 20, "nothing was measured", "m")
        return canvas.render(alone=alone)
    ends = [v for row in rows for v in (row.value, row.low, row.high, band, band and -band) if v is not None]
    x = Axis.over([0.0, *ends], left, right, margin=0.08)
    if band is not None:
        canvas.rect(x(-band), 6, x(band) - x(-band), base - 6, "band", 0)
    x_axis(canvas, x, base, title, grid=10)
    canvas.line(x(0), 6, x(0), base, "hair")
    for index, row in enumerate(rows):
        y = 18 + _ROW * (index + 0.5)
        canvas.text(0, y + 4, row.name, "b")
        if row.low is not None and row.high is not None:
            canvas.rect(x(row.low), y - 6, x(row.high) - x(row.low), 12, "core", 3)
        canvas.circle(x(row.value), y, 4.5, "dot")
        canvas.text(width, y + 4, minus(f"{row.value:+.{digits}f}"), "m", "end")
    return canvas.render(alone=alone)
