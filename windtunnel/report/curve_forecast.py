"""The picture of a whole-curve forecast: the said curve with its band, the proxies, the run once it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from windtunnel.report.figures import thin
from windtunnel.report.svg import SHADES, Axis, Canvas, counts, spread, x_axis, y_axis

Line = Sequence[tuple[float, float]]


def curve_forecast_figure(
    value: Line, low: Line, high: Line, rate: Line, proxies: Mapping[str, Sequence[Line]], name: str, outcome: Line = (),
) -> str:  # fmt: skip
    """A figure of its own: training loss above, learning rate beneath.

    Args:
        value, low, high: the forecast and the ends of its 90 % band, (tokens, nats per token).
        rate: the target's learning rate, (tokens, rate).
        proxies: curves behind the law by size, smallest first.
        name: of the target.
        outcome: what the run did.
    """
    width, left, right, top, bottom = 780, 54, 650, 30, 350
    canvas = Canvas(width, 480, f"Forecast of the whole loss curve of {name}, with its 90 % band")
    x = Axis(0, max(d for d, _ in value) * 1.01, left, right)
    begin = outcome[0][0] if outcome else 0.1 * value[-1][0]
    shown = [v for line in (value, low, high, outcome) for d, v in line if d >= begin]
    shown += [v for lines in proxies.values() for line in lines for d, v in line if d >= begin]
    y = Axis.over(shown, bottom, top, margin=0.05)
    y_axis(canvas, y, left, right, "training loss, nats per token")
    edge = [(x(d), y(v)) for d, v in high if d >= begin] + [(x(d), y(v)) for d, v in reversed(low) if d >= begin]
    canvas.raw_path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in edge) + "Z", "band")
    ends: list[tuple[float, str, str]] = []
    for i, (size, lines) in enumerate(proxies.items()):
        shade = SHADES - 1 if len(proxies) < 2 else round(i * (SHADES - 2) / (len(proxies) - 1))
        for line in lines:
            canvas.path([(x(d), y(v)) for d, v in line if y.low <= v <= y.high], f"ql{shade}")
        last = max((line[-1] for line in lines), key=lambda pair: pair[0])
        ends.append((y(min(max(last[1], y.low), y.high)) + 4, size, "k"))
    canvas.path([(x(d), y(v)) for d, v in outcome if y.low <= v <= y.high], "trunk")
    canvas.path([(x(d), y(v)) for d, v in value if d >= begin and y.low <= v <= y.high], "l0")
    ends.append((y(value[-1][1]) + 4, f"{name}, forecast", "a b k"))
    if outcome:
        ends.append((y(min(max(outcome[-1][1], y.low), y.high)) + 4, "as trained", "b k"))
    for place, (_, words, style) in zip(spread([e[0] for e in ends], 14, top, bottom - 4), ends, strict=True):
        canvas.text(right + 8, place, words, style)
    z = Axis(0, max(v for _, v in rate) * 1.08, 440, 385)
    y_axis(canvas, z, left, right, "learning rate", count=2)
    canvas.path([(x(d), z(v)) for d, v in thin(rate, 400)], "l0")
    x_axis(canvas, x, 440, "training tokens", count=7, show=counts)
    return canvas.render(alone=True)
