"""The charts of the report as SVG strings. Each takes plain numbers and a width: 720 for a page, 340 for a phone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windtunnel.base.units import minus
from windtunnel.report.svg import (
    SERIES,
    SHADES,
    Axis,
    Canvas,
    compact,
    counts,
    plain,
    spread,
    text_width,
    x_axis,
    y_axis,
)  # fmt: skip

NARROW = 500
"""Figures narrower than this put labels above rows instead of beside them."""
BITS = "bits per byte"


@dataclass(frozen=True)
class Band:
    """A forecast in bits per byte."""

    value: float
    low50: float
    high50: float
    low90: float
    high90: float


def hero_figure(expected: Band, outcome: float | None, naive: Mapping[str, float], width: int) -> str:
    """The sealed forecast's intervals, the outcome's dot and the naive forecasts, one row each on one axis."""
    narrow = width < NARROW
    left, right, row = (8, 12, 62) if narrow else (172, 108, 52)
    rows = ["Sealed forecast", "Outcome", *naive]
    height = 16 + row * len(rows) + 46
    canvas = Canvas(width, height, "The sealed forecast with its intervals, the outcome and two naive forecasts")
    values = [expected.low90, expected.high90, *naive.values(), *([outcome] if outcome is not None else [])]
    x = Axis.over(values, left, width - right, margin=0.08)
    base = 16 + row * len(rows)
    x_axis(canvas, x, base, f"held-out loss, {BITS} (lower is better)", grid=10, count=4 if narrow else 6)
    middle = [16 + row * (i + 0.5) + (8 if narrow else 0) for i in range(len(rows))]
    if outcome is not None:
        canvas.line(x(outcome), 10, x(outcome), base, "hair")
    for y, name in zip(middle, rows, strict=True):
        canvas.text(0 if not narrow else left, y + (5 if not narrow else -19), name, "b" if y < middle[2] else "m")

    def say(y: float, value: float | None, note: str, style: str = "b") -> None:
        """The number of a row: in the right column, or on a phone at the right end of the row's label."""
        text = "not yet known" if value is None else f"{value:.4f}"
        if narrow:
            canvas.text(width - right, y - 19, f"{text} · {note}" if note else text, style, "end")
        else:
            canvas.text(width, y + (0 if note else 5), text, style, "end")
            canvas.text(width, y + 15, note, "k", "end")

    y = middle[0]
    canvas.rect(x(expected.low90), y - 11, x(expected.high90) - x(expected.low90), 22, "band", 4)
    canvas.rect(x(expected.low50), y - 11, x(expected.high50) - x(expected.low50), 22, "core", 2)
    canvas.line(x(expected.value), y - 14, x(expected.value), y + 14, "tick")
    say(y, expected.value, "" if narrow else f"{expected.low90:.4f} – {expected.high90:.4f}", "b a")
    if outcome is not None:
        canvas.circle(x(outcome), middle[1], 8, "dot")
    say(middle[1], outcome, "" if narrow or outcome is None else "measured")
    for y, (_, value) in zip(middle[2:], naive.items(), strict=True):
        canvas.diamond(x(value), y, 6.5, "hollow")
        say(y, value, f"{off(value, outcome)}" if outcome is not None else "", "m")
    return canvas.render()


def off(value: float, outcome: float) -> str:
    """How far a forecast lies from the outcome, in percent with a sign."""
    return minus(f"{100 * (value / outcome - 1):+.2f} %")


@dataclass(frozen=True)
class Cloud:
    """Trials of one size: pairs (value, loss in bits per byte), number of the best; ``curve`` joins the points."""

    name: str
    points: tuple[tuple[float, float], ...]
    failed: tuple[float, ...] = ()
    curve: bool = False


def valley_figure(
    clouds: Sequence[Cloud], chosen: float, name: str, width: int, *, height: int = 280, title: bool = True,
    labels: Sequence[str] = (),
) -> str:  # fmt: skip
    """Loss over one hyper-parameter, each size measured from its own best; the line is the lower edge of the points.

    With ``labels`` the points stand at 1, 2, … for one word each, and no line joins them.

    Losses above the highest third of the range are drawn at its upper end as an open mark: what they say is "not here".
    """
    left, top = 44, 34 if title else 16
    canvas = Canvas(width, height, f"Held-out loss over {name}")
    best = [min(loss for _, loss in cloud.points) for cloud in clouds]
    excess = [[(v, 100 * (loss / low - 1)) for v, loss in c.points] for c, low in zip(clouds, best, strict=True)]
    every = sorted(e for points in excess for _, e in points)
    ceiling = max(1.0, min(every[-1], 1.6 * every[int(0.75 * (len(every) - 1))])) * 1.06
    places = [v for c in clouds for v, _ in c.points] + [f for c in clouds for f in c.failed]
    x = Axis(0.4, len(labels) + 0.6, left, width - 10) if labels else Axis.over(places, left, width - 10, log=True)
    y = Axis(-0.06 * ceiling, ceiling, height - 44, top)
    y_axis(canvas, y, left, width - 10, "loss above the size's best, %" if title else "", count=4)
    if labels:
        for place, word in enumerate(labels, 1):
            canvas.text(x(place), height - 28, word, "k", "middle")
        canvas.text(width - 10, height - 8, name, "k", "end")
    else:
        x_axis(canvas, x, height - 44, name, show=compact, count=4 if width < NARROW else 7)
    canvas.line(x(chosen), top - 2, x(chosen), height - 44, "guide")
    if title:
        side = "end" if x(chosen) > width * 0.7 else "start"
        canvas.text(x(chosen) + (5 if side == "start" else -5), top + 24, f"chosen {chosen:.3g}", "a k", side)
    for index, (cloud, points) in enumerate(zip(clouds, excess, strict=True)):
        style = 1 if cloud.curve else 0
        inside = [(v, e) for v, e in points if e <= ceiling]
        edge = inside if cloud.curve or labels else lower_edge(inside)
        if not labels:
            canvas.path([(x(v), y(e)) for v, e in sorted(edge)], f"l{style}" if cloud.curve else "edge")
        for v, e in points:
            if e > ceiling:
                canvas.raw_path(_up(x(v), top + 3), "hollow")
            elif e == 0:
                canvas.circle(x(v), y(e), 5.5, "best" if not index else f"d{style}")
            else:
                canvas.circle(x(v), y(e), 4, f"d{style}" if cloud.curve else "faint")
        for v in cloud.failed:
            canvas.cross(x(v), top + 4)
    return canvas.render()


def _up(x: float, y: float) -> str:
    return f"M{x - 4:.1f} {y + 5:.1f}L{x:.1f} {y - 3:.1f}L{x + 4:.1f} {y + 5:.1f}Z"


def lower_edge(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull over a logarithmic first coordinate."""
    hull: list[tuple[float, float]] = []
    for v, e in sorted(points):
        while len(hull) > 1:
            (x1, y1), (x2, y2) = ((math.log(a), b) for a, b in hull[-2:])
            if (x2 - x1) * (e - y1) - (y2 - y1) * (math.log(v) - x1) > 0:
                break
            hull.pop()
        hull.append((v, e))
    return hull


@dataclass(frozen=True)
class Curve:
    """One size of the law figure: measured points and the law's curve, (tokens, bits per byte)."""

    name: str
    points: tuple[tuple[float, float], ...]
    line: tuple[tuple[float, float], ...]


def law_figure(
    curves: Sequence[Curve], target: Curve | None, expected: Band, tokens: float, outcome: float | None, width: int
) -> str:
    """The proxies' points, the law through them, and its reach to the target. Sizes from pale (small) to strong (large)."""
    narrow = width < NARROW
    left, right, top, height = 44, 62 if narrow else 118, 34, 330
    canvas = Canvas(width, height, "Held-out loss over training tokens for each size, with the fitted law")
    shown = [*curves, *([target] if target else [])]
    values = [p for c in shown for p in (*c.points, *c.line)]
    x = Axis.over([p[0] for p in values] + [tokens], left, width - right, log=True, margin=0.05)
    losses = [p[1] for p in values] + [expected.low90, expected.high90, *([outcome] if outcome is not None else [])]
    y = Axis.over(losses, height - 44, top, log=True, margin=0.05)
    y_axis(canvas, y, left, width - right, f"held-out loss, {BITS}")
    x_axis(canvas, x, height - 44, "training tokens, decay included", show=counts, count=4 if narrow else 7)
    ends: list[tuple[float, str, str]] = []
    for i, curve in enumerate(curves):
        shade = SHADES - 1 if len(curves) < 2 else round(i * (SHADES - 2) / (len(curves) - 1))
        canvas.path([(x(d), y(v)) for d, v in curve.line], f"ql{shade}")
        for d, v in curve.points:
            canvas.circle(x(d), y(v), 4, f"qd{shade}")
        tail = (curve.line or curve.points)[-1]
        ends.append((y(tail[1]) + 4, curve.name, "k"))
    if target:
        canvas.path([(x(d), y(v)) for d, v in target.line], "l0 dash")
        ends.append((y(target.line[-1][1]) + 4, target.name if narrow else f"{target.name}, the target", "a b k"))
    canvas.rect(x(tokens) - 7, y(expected.high90), 14, y(expected.low90) - y(expected.high90), "band", 3)
    canvas.rect(x(tokens) - 7, y(expected.high50), 14, y(expected.low50) - y(expected.high50), "core", 2)
    canvas.line(x(tokens) - 10, y(expected.value), x(tokens) + 10, y(expected.value), "tick")
    if outcome is not None:
        canvas.circle(x(tokens), y(outcome), 5, "dot")
    for place, (_, name, style) in zip(spread([e[0] for e in ends], 14, top, height - 48), ends, strict=True):
        canvas.text(width - right + 8, place, name, style)
    return canvas.render()


def change_figure(rows: Sequence[tuple[str, str, Sequence[float | None]]], names: Sequence[str], width: int) -> str:
    """For each corpus a bar per branch: loss relative to the reference branch, in percent; left of zero is better."""
    narrow = width < NARROW
    left, right = (0, 0) if narrow else (210, 8)
    bar, lead = 14, 26 if narrow else 10
    block = lead + (bar + 4) * len(names) + 8
    height = 26 + block * len(rows) + 40
    canvas = Canvas(width, height, "Change of held-out loss on each corpus against the branch on the trunk's own data")
    found = [v for _, _, values in rows for v in values if v is not None] or [0.0]
    low, high = min(0.0, *found), max(0.0, *found)
    room = 0.24 * (high - low or 1)
    x = Axis(low - room, high + room, left + 2, width - right - 2)
    base = 22 + block * len(rows)
    x_axis(canvas, x, base, "change of held-out loss, %", grid=22, count=4 if narrow else 6)
    canvas.line(x(0), 16, x(0), base, "ax")
    canvas.text(x(0) - 8, 11, "◂ better", "k", "end")
    canvas.text(x(0) + 8, 11, "worse ▸", "k")
    for i, (name, note, values) in enumerate(rows):
        top = 22 + block * i
        middle = top + lead + ((bar + 4) * len(names)) / 2
        if narrow:
            canvas.text(left, top + 17, name, "b")
            canvas.text(left + text_width(name) + 12, top + 17, note, "k")
        else:
            canvas.text(0, middle - 1, name, "b")
            canvas.text(0, middle + 14, note, "k")
        for k, value in enumerate(values):
            y = top + lead + (bar + 4) * k
            if value is None:
                continue
            canvas.rect(min(x(0), x(value)), y, abs(x(value) - x(0)), bar, f"f{(k + 1) % SERIES}", 2)
            text = minus(f"{value:+.1f} %")
            outward = -1 if value < 0 else 1
            canvas.text(x(value) + 5 * outward, y + 11, text, "k b", "end" if value < 0 else "start")
    return canvas.render()


def share_figure(rows: Sequence[tuple[str, float, str]], width: int) -> str:
    """Horizontal bars with their value written beside them."""
    narrow = width < NARROW
    left = 0 if narrow else 190
    block = 44 if narrow else 28
    canvas = Canvas(width, block * len(rows) + 6, "; ".join(f"{name}: {text}" for name, _, text in rows))
    room = max((text_width(text) for _, _, text in rows), default=0) + 12
    top = max((value for _, value, _ in rows), default=0) or 1
    for i, (name, value, text) in enumerate(rows):
        y = block * i + (24 if narrow else 6)
        canvas.text(0, y - 7 if narrow else y + 12, name)
        length = max(2.0, (width - left - room) * value / top)
        canvas.rect(left, y, length, 15, "f0", 2)
        canvas.text(left + length + 7, y + 12, text, "m")
    return canvas.render()


def compare_figure(curves: dict[str, tuple[list[float], list[float]]], xlabel: str, ylabel: str) -> str:
    """Several curves over one axis as a file of its own, with labels at the curves' ends.

    Args:
        curves: name to (x values, y values); values that are not finite are left out.
        xlabel, ylabel: axis titles with units.
    """
    lines = {name: _finite(*pair) for name, pair in curves.items()}
    lines = {name: pairs for name, pairs in lines.items() if pairs}
    room = min(240.0, max((text_width(name) for name in lines), default=0) + 18)
    width, height, left, top = 720 + room, 440, 54, 36
    canvas = Canvas(width, height, f"{ylabel} over {xlabel}: {', '.join(lines)}")
    if not lines:
        canvas.text(left, height / 2, "no values recorded", "m")
        return canvas.render(alone=True)
    x = Axis.over([a for pairs in lines.values() for a, _ in pairs], left, 720, margin=0.0)
    y = Axis.over(_settled([[b for _, b in pairs] for pairs in lines.values()]), height - 48, top)
    y_axis(canvas, y, left, 720, ylabel)
    large = max(abs(x.low), abs(x.high)) >= 10_000
    x_axis(canvas, x, height - 48, xlabel, count=7, show=counts if large else plain(x.ticks(7)))
    ends = spread([y(min(max(pairs[-1][1], y.low), y.high)) + 4 for pairs in lines.values()], 15, top, height - 52)
    for i, ((name, pairs), end) in enumerate(zip(lines.items(), ends, strict=True)):
        style = f"l{i % SERIES}" + (" dash" if i >= SERIES else "")
        inside = [(x(a), y(b)) for a, b in thin(pairs, 160) if y.low <= b <= y.high]
        canvas.path(inside, style)
        if len(inside) == 1:
            canvas.circle(*inside[0], 4, f"d{i % SERIES}")
        canvas.text(730, end, name, f"f{i % SERIES} b")
    return canvas.render(alone=True)


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]


def _settled(series: Sequence[Sequence[float]]) -> list[float]:
    """Values without the steep fall of the first twentieth of long curves, which would flatten all that follows."""
    return [v for values in series for v in (values[len(values) // 20 :] if len(values) >= 40 else values)]


def thin(pairs: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points: means of neighbours, so that a curve keeps its level while its noise shrinks."""
    if len(pairs) <= most:
        return list(pairs)
    bounds = [round(i * len(pairs) / most) for i in range(most + 1)]
    groups = [pairs[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    return [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]
