"""The picture of a whole-curve forecast: the said curve with its band, the proxies, the run once it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windtunnel.report.figures import NARROW, thin
from windtunnel.report.svg import SHADES, Axis, Canvas, counts, spread, x_axis, y_axis

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class CurvePicture:
    """A forecast of a whole curve as it is drawn and told: losses in nats per token over tokens.

    ``value``, ``low``, ``high`` are the forecast and the ends of its 90 % band, ``rate`` the target's learning rate (empty if not
    known), ``proxies`` the curves behind the law by size, smallest first, ``outcome`` what the run did.
    """

    branch: str
    name: str
    value: Line
    low: Line
    high: Line
    rate: Line
    proxies: Mapping[str, Sequence[Line]]
    outcome: Line = ()
    hash: str = ""
    kind: str = ""
    when: str = ""
    about: str = ""
    score: Mapping[str, float] | None = None

    def draw(self, width: int = 780, *, alone: bool = False) -> str:
        """Training loss above, learning rate beneath; ``alone`` for a file of its own."""
        narrow = width < NARROW
        left, right, top, bottom = 54, width - (112 if narrow else 130), 30, 250 if narrow else 350
        begin = self.outcome[0][0] if self.outcome else 0.1 * self.value[-1][0]
        shown = [v for line in (self.value, self.low, self.high, self.outcome) for d, v in line if d >= begin]
        shown += [v for lines in self.proxies.values() for line in lines for d, v in line if d >= begin]
        base = bottom + 90 if self.rate else bottom
        canvas = Canvas(width, base + 40, f"Forecast of the whole loss curve of {self.name}, with its 90 % band")
        x = Axis(0, max(d for d, _ in self.value) * 1.01, left, right)
        y = Axis.over(shown, bottom, top, margin=0.05)
        y_axis(canvas, y, left, right, "training loss, nats per token")
        ends = self._curves(canvas, x, y, begin)
        for place, (_, words, style) in zip(spread([e[0] for e in ends], 14, top, bottom - 4), ends, strict=True):
            canvas.text(right + 8, place, words, style)
        if self.rate:
            z = Axis(0, max(v for _, v in self.rate) * 1.08, base, bottom + 35)
            y_axis(canvas, z, left, right, "learning rate", count=2)
            canvas.path([(x(d), z(v)) for d, v in thin(self.rate, 400)], "l0")
        x_axis(canvas, x, base, "training tokens", count=3 if narrow else 7, show=counts)
        return canvas.render(alone=alone)

    def _curves(self, canvas: Canvas, x: Axis, y: Axis, begin: float) -> list[tuple[float, str, str]]:
        """Draws band, proxies, outcome and forecast; height, words and style of the name at each one's end."""

        def inside(line: Line) -> list[tuple[float, float]]:
            return [(x(d), y(v)) for d, v in line if y.low <= v <= y.high]

        def end(line: Line) -> float:
            return y(min(max(line[-1][1], y.low), y.high)) + 4

        edge = [(x(d), y(v)) for d, v in self.high if d >= begin]
        edge += [(x(d), y(v)) for d, v in reversed(self.low) if d >= begin]
        canvas.raw_path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in edge) + "Z", "band")
        ends: list[tuple[float, str, str]] = []
        for i, (size, lines) in enumerate(self.proxies.items()):
            shade = SHADES - 1 if len(self.proxies) < 2 else round(i * (SHADES - 2) / (len(self.proxies) - 1))
            for line in lines:
                canvas.path(inside(line), f"ql{shade}")
            ends.append((end(max(lines, key=lambda line: line[-1][0])), size, "k"))
        canvas.path(inside(self.outcome), "trunk")
        canvas.path(inside([pair for pair in self.value if pair[0] >= begin]), "l0")
        ends.append((y(self.value[-1][1]) + 4, f"{self.name}, forecast", "a b k"))
        return [*ends, *([(end(self.outcome), "as trained", "b k")] if self.outcome else [])]
