"""A small writer of SVG charts: scales, ticks, axes, text that cannot collide.

Colours come from CSS variables, so that one figure serves light, dark and print; a figure that stands alone carries its own
style. No script, no external reference, every text escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from windtunnel.base.units import minus, si

SERIES = 6
"""Series colours: the Okabe–Ito palette, which people with any common colour blindness can tell apart."""
SHADES = 6

FIGURE_CSS = """
:root{--paper:#fff;--ink:#1d2329;--soft:#5d6873;--line:#c3cad1;--grid:#e9edf0;--accent:#0b6a8f;--band:#cfe3ec;--core:#7db4cc;
--s0:#0b6a8f;--s1:#c8560a;--s2:#0f8564;--s3:#a8558a;--s4:#8a6d00;--s5:#4f6d8f;
--q0:#a9b8c4;--q1:#8aa6b8;--q2:#6a93ab;--q3:#4a7f9c;--q4:#2b6a8b;--q5:#0d5575}
@media (prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e7ebee;--soft:#9aa6b0;--line:#48525b;--grid:#262d33;
--accent:#62bde0;--band:#1d3d4b;--core:#2f7491;--s0:#62bde0;--s1:#f0924a;--s2:#4cc5a0;--s3:#dd94c2;--s4:#d9bb4e;--s5:#9db6d3;
--q0:#566069;--q1:#5f7887;--q2:#688fa4;--q3:#72a5bf;--q4:#80bcd8;--q5:#98d4ee}}
svg.fig{display:block;width:100%;height:auto;overflow:visible}
svg.fig text{font:12px/1.2 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--ink);
font-variant-numeric:tabular-nums;paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg.fig .k{font-size:11px;fill:var(--soft)}
svg.fig .b{font-weight:650}
svg.fig .big{font-size:15px;font-weight:650}
svg.fig .m{fill:var(--soft)}
svg.fig .a{fill:var(--accent)}
svg.fig .ax{stroke:var(--line);fill:none}
svg.fig .gr{stroke:var(--grid);fill:none}
svg.fig .hair{stroke:var(--ink);stroke-dasharray:2 3;opacity:.55;fill:none}
svg.fig .guide{stroke:var(--accent);stroke-dasharray:2 3;fill:none}
svg.fig .band{fill:var(--band)}
svg.fig .core{fill:var(--core)}
svg.fig .tick{stroke:var(--accent);stroke-width:2.5;fill:none}
svg.fig .dot{fill:var(--ink);stroke:var(--paper);stroke-width:2}
svg.fig .hollow{fill:var(--paper);stroke:var(--soft);stroke-width:1.8}
svg.fig .faint{fill:var(--soft);fill-opacity:.45}
svg.fig .cross{stroke:var(--soft);stroke-width:1.6;fill:none}
svg.fig .best{fill:var(--accent);stroke:var(--paper);stroke-width:1.5}
svg.fig .edge{stroke:var(--soft);stroke-width:1.2;fill:none;opacity:.75}
svg.fig .trunk{stroke:var(--ink);stroke-width:1.8;fill:none;stroke-linejoin:round}
svg.fig .dash{stroke-dasharray:5 4}
""" + "".join(
    f"svg.fig .l{i}{{stroke:var(--s{i});stroke-width:1.9;fill:none;stroke-linejoin:round}}svg.fig .f{i}{{fill:var(--s{i})}}"
    f"svg.fig .d{i}{{fill:var(--s{i});stroke:var(--paper);stroke-width:1.5}}"
    for i in range(SERIES)
) + "".join(
    f"svg.fig .ql{i}{{stroke:var(--q{i});stroke-width:1.6;fill:none}}svg.fig .qf{i}{{fill:var(--q{i})}}"
    f"svg.fig .qd{i}{{fill:var(--q{i});stroke:var(--paper);stroke-width:1.2}}"
    for i in range(SHADES)
)  # fmt: skip

Pairs = Sequence[tuple[float, float]]


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text is in pixels, on the generous side."""
    return 0.57 * size * len(text)


@dataclass
class Canvas:
    """Collects shapes and renders one SVG element."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list[str])

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(
            f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" class="{style}"/>'
        )

    def path(self, points: Pairs, style: str) -> None:
        """Straight segments through the points."""
        if len(points) > 1:
            self.raw_path("M" + "L".join(f"{number(x)} {number(y)}" for x, y in points), style)

    def raw_path(self, data: str, style: str) -> None:
        self.parts.append(f'<path d="{data}" class="{style}"/>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, radius: float = 2) -> None:
        self.parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(height)}"'
            f' rx="{number(radius)}" class="{style}"/>'
        )

    def circle(self, x: float, y: float, radius: float, style: str) -> None:
        self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{style}"/>')

    def diamond(self, x: float, y: float, radius: float, style: str) -> None:
        corners = ((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y))
        self.raw_path("M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "Z", style)

    def cross(self, x: float, y: float, radius: float = 3.5) -> None:
        self.line(x - radius, y - radius, x + radius, y + radius, "cross")
        self.line(x - radius, y + radius, x + radius, y - radius, "cross")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        look = f' class="{style}"' if style else ""
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{where}{look}>{escape(text)}</text>')

    def render(self, *, alone: bool = False) -> str:
        """The element; ``alone`` adds namespace, size and style for a file of its own."""
        pad = 18 if alone else 0
        width, height = number(self.width + 2 * pad), number(self.height + 2 * pad)
        size = f'width="{width}" height="{height}" ' if alone else ""
        style = f"<style>{FIGURE_CSS}svg.fig{{background:var(--paper)}}</style>" if alone else ""
        space = 'xmlns="http://www.w3.org/2000/svg" ' if alone else ""
        return (
            f'<svg {space}{size}class="fig" viewBox="{-pad} {-pad} {width} {height}" role="img">'
            f"<title>{escape(self.label)}</title>{style}{''.join(self.parts)}</svg>"
        )


@dataclass(frozen=True)
class Axis:
    """Maps data between ``low`` and ``high`` to pixels between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return self.start + place * (self.end - self.start)

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.06
    ) -> Axis:
        """An axis over values with a margin on both sides; a single value gets room around it."""
        low, high = min(values), max(values)
        if log:
            pad = (high / low) ** margin if high > low else 1.25
            return cls(low / pad, high * pad, start, end, True)
        pad = (high - low) * margin if high > low else abs(low) * 0.05 or 1.0
        return cls(low - pad, high + pad, start, end)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range, about ``count`` of them."""
        if self.log and self.high / self.low > 4:
            steps = (1, 2, 5) if math.log10(self.high / self.low) * 3 <= count + 1 else (1, 3) if (
                math.log10(self.high / self.low) * 2 <= count + 1) else (1,)  # fmt: skip
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
        return linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(ticks: Sequence[float]) -> Callable[[float], str]:
    """A formatter with the same, smallest sufficient number of decimals for all ticks."""
    decimals = max((len(f"{t:.6f}".rstrip("0").partition(".")[2]) for t in ticks), default=0)
    return lambda value: minus(f"{value:.{decimals}f}")


def compact(value: float) -> str:
    """A small number as people write it: 0.005, 12, 1.4."""
    return f"{value:g}"


def counts(value: float) -> str:
    """Tokens or parameters: 1.6M."""
    return "0" if value == 0 else si(value)


def x_axis(
    canvas: Canvas, axis: Axis, y: float, title: str, *, count: int = 5, show: Callable[[float], str] | None = None,
    grid: float | None = None,
) -> None:  # fmt: skip
    """Ticks under the line at ``y`` and the title below them; ``grid`` is the height up to which grid lines go."""
    ticks = axis.ticks(count)
    label = show or plain(ticks)
    canvas.line(min(axis.start, axis.end), y, max(axis.start, axis.end), y, "ax")
    last = -math.inf
    for tick in ticks:
        x = axis(tick)
        if grid is not None:
            canvas.line(x, grid, x, y, "gr")
        canvas.line(x, y, x, y + 4, "ax")
        half = text_width(label(tick), 11) / 2
        if x - half >= last + 4:
            canvas.text(x, y + 16, label(tick), "k", "middle")
            last = x + half
    canvas.text((axis.start + axis.end) / 2, y + 33, title, "m", "middle")


def y_axis(
    canvas: Canvas, axis: Axis, x: float, right: float, title: str, *, count: int = 5,
    show: Callable[[float], str] | None = None,
) -> None:  # fmt: skip
    """Grid lines with values left of ``x``; the title stands upright above the axis."""
    ticks = axis.ticks(count)
    label = show or plain(ticks)
    for tick in ticks:
        canvas.line(x, axis(tick), right, axis(tick), "gr")
        canvas.text(x - 7, axis(tick) + 4, label(tick), "k", "end")
    if title:
        canvas.text(0, min(axis.start, axis.end) - 12, title, "m")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart, near the wanted ones and in their order, inside the limits where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for _ in range(60):
        moved = False
        for k in range(len(placed) - 1):
            short = gap - (placed[k + 1] - placed[k])
            if short > 1e-6:
                placed[k] -= short / 2
                placed[k + 1] += short / 2
                moved = True
        if placed and placed[0] < low:
            placed[0] = low
        if placed and placed[-1] > high:
            placed[-1] = high
        if not moved:
            break
    out = [0.0] * len(placed)
    for position, index in zip(placed, order, strict=True):
        out[index] = position
    return out
