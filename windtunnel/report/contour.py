"""L(N, D) as a map: lines of equal loss, the runs that it was fitted to, and the line of best use of compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from windtunnel.report.svg import SHADES, Axis, Canvas, counts, linear_ticks, x_axis, y_axis

_GRID = 61


def contour_figure(
    loss: Callable[[float, float], float],
    points: Sequence[tuple[float, float]],
    best: Sequence[tuple[float, float]],
    *,
    band: Sequence[tuple[float, float, float]] = (),
    target: Mapping[str, tuple[float, float]] | None = None,
    unit: str = "nats per byte",
    width: int = 720,
    alone: bool = True,
) -> str:
    """An SVG, with its own style where it stands alone.

    Args:
        loss: the law, N and D to loss.
        points: runs: N, D.
        best: N and D of the compute-optimal line, by rising compute.
        band: N and the limits of the 90 % interval of the best D.
        target: runs to mark by name: N, D.
        unit: of the losses.
    """
    height, left, right, top = 0.68 * width, 64, 132, 22
    marked = dict(target or {})
    sizes = [p[0] for p in points] + [p[0] for p in marked.values()]
    lengths = [p[1] for p in points] + [p[1] for p in marked.values()]
    canvas = Canvas(width, height, f"Loss ({unit}) over parameters and tokens, with the compute-optimal line")
    x = Axis.over(sizes, left, width - right, log=True, margin=0.12)
    y = Axis.over(lengths, height - 48, top, log=True, margin=0.12)
    y_axis(canvas, y, left, width - right, "training tokens", show=counts)
    x_axis(canvas, x, height - 48, "non-embedding parameters", show=counts, count=6)
    _band(canvas, x, y, band)
    rows = [[loss(_at(x, i), _at(y, j)) for i in range(_GRID)] for j in range(_GRID)]
    _levels(canvas, x, y, rows)
    inside = [(x(n), y(d)) for n, d in best if x.low <= n <= x.high and y.low <= d <= y.high]
    canvas.path(inside, "l1 dash")
    if inside:
        canvas.text(inside[-1][0] + 6, inside[-1][1] + 14, "best use of compute", "f1 b")
    for n, d in points:
        canvas.circle(x(n), y(d), 4, "dot")
    for name, (n, d) in marked.items():
        canvas.diamond(x(n), y(d), 7, "best")
        canvas.text(x(n) + 10, y(d) + 4, name, "b")
    return canvas.render(alone=alone)


def _at(axis: Axis, index: float) -> float:
    """The value at a column or row of the grid."""
    return axis.low * (axis.high / axis.low) ** (index / (_GRID - 1))


def _band(canvas: Canvas, x: Axis, y: Axis, band: Sequence[tuple[float, float, float]]) -> None:
    shown = [(n, low, high) for n, low, high in band if x.low <= n <= x.high]
    if len(shown) < 2:
        return

    def clip(value: float) -> float:
        return y(min(max(value, y.low), y.high))

    edge = [(x(n), clip(low)) for n, low, _ in shown] + [(x(n), clip(high)) for n, _, high in reversed(shown)]
    canvas.raw_path("M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in edge) + "Z", "band")


def _levels(canvas: Canvas, x: Axis, y: Axis, rows: Sequence[Sequence[float]]) -> None:
    """Lines of equal loss by marching squares on the grid, equally spaced in the logarithm of the loss, labelled right."""
    values = [v for row in rows for v in row]
    low, high = math.log(min(values)), math.log(max(values))
    levels = [math.exp(v) for v in linear_ticks(low, high, 9) if low < v < high]
    for index, level in enumerate(levels):
        shade = f"ql{min(SHADES - 1, index * SHADES // max(1, len(levels)))}"
        crossings = segments(rows, level)
        for pair in crossings:
            canvas.path([(x(_at(x, i)), y(_at(y, j))) for i, j in pair], shade)
        ends = [p for pair in crossings for p in pair if p[0] >= _GRID - 1 - 1e-9]
        if ends:
            canvas.text(x.end + 6, y(_at(y, ends[0][1])) + 4, f"{level:.3g}", "k")


def segments(rows: Sequence[Sequence[float]], level: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Where a grid of values crosses a level: line segments in units of columns and rows, at most two for each cell."""
    found: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for j in range(len(rows) - 1):
        for i in range(len(rows[0]) - 1):
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
            heights = [rows[b][a] - level for a, b in corners]
            cuts: list[tuple[float, float]] = []
            for k in range(4):
                (ax, ay), (bx, by) = corners[k], corners[(k + 1) % 4]
                va, vb = heights[k], heights[(k + 1) % 4]
                if (va > 0) != (vb > 0):
                    share = va / (va - vb)
                    cuts.append((ax + share * (bx - ax), ay + share * (by - ay)))
            found += [(cuts[k], cuts[k + 1]) for k in range(0, len(cuts) - 1, 2)]
    return found
