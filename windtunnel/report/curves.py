"""The picture of a training programme: trunk and branches as a tree over their loss and learning-rate curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from windtunnel.report.figures import NARROW, thin
from windtunnel.report.svg import SERIES, Axis, Canvas, counts, number, x_axis, y_axis

_LANE = 34


@dataclass(frozen=True)
class Limb:
    """The trunk or a branch: where it begins and ends in tokens, its curves over tokens, and the limb that it grows from."""

    name: str
    note: str
    start: float
    end: float
    loss: tuple[tuple[float, float], ...]
    rate: tuple[tuple[float, float], ...]
    parent: int | None = None


def tree_figure(limbs: Sequence[Limb], width: int) -> str:
    """Three lanes on one axis of tokens: the tree, the training loss, the learning rate. The first limb is the trunk."""
    narrow = width < NARROW
    left, right = 44, width - 14
    tree_top, loss_top = 24, 24 + _LANE * len(limbs) + 34
    loss_bottom = loss_top + (170 if narrow else 230)
    rate_top, rate_bottom = loss_bottom + 40, loss_bottom + 110
    canvas = Canvas(width, rate_bottom + 44, "The trunk and its branches with their training loss and learning rate")
    last = max([limb.end for limb in limbs] + [1.0])
    x = Axis(0, last * 1.01, left, right)
    _tree(canvas, limbs, x, tree_top)
    settled = [v for limb in limbs for d, v in limb.loss if d >= 0.04 * last] or [v for li in limbs for _, v in li.loss]
    if settled:
        y = Axis.over(settled, loss_bottom, loss_top, margin=0.08)
        y_axis(canvas, y, left, right, "training loss, nats per token")
        for i, limb in enumerate(limbs):
            pairs = thin(limb.loss, _bins(limb, last, 70 if narrow else 140))
            canvas.path([(x(d), y(v)) for d, v in pairs if y.low <= v <= y.high], _style(i))
    rates = [v for limb in limbs for _, v in limb.rate]
    if rates:
        z = Axis(0, max(rates) * 1.08, rate_bottom, rate_top)
        y_axis(canvas, z, left, right, "learning rate", count=2)
        for i, limb in enumerate(limbs):
            canvas.path([(x(d), z(v)) for d, v in thin(limb.rate, 200)], _style(i))
    for limb in limbs[1:]:
        canvas.line(x(limb.start), tree_top + 8, x(limb.start), rate_bottom, "hair")
    x_axis(canvas, x, rate_bottom, "training tokens", count=4 if narrow else 7, show=counts)
    return canvas.render()


def _bins(limb: Limb, last: float, most: int) -> int:
    """Means over equal stretches of tokens on every limb, so that all are smoothed alike."""
    return max(8, round(most * (limb.end - limb.start) / last))


def _style(index: int) -> str:
    return "trunk" if index == 0 else f"l{(index - 1) % SERIES}" + (" dash" if index > SERIES else "")


def _tree(canvas: Canvas, limbs: Sequence[Limb], x: Axis, top: float) -> None:
    for i, limb in enumerate(limbs):
        y = top + _LANE * i + 12
        begin, end = x(limb.start), x(limb.end)
        if limb.parent is not None:
            source = top + _LANE * limb.parent + 12
            bend = min(24.0, max(6.0, (end - begin) / 2))
            canvas.raw_path(
                f"M{number(begin)} {number(source)}C{number(begin)} {number(y)} {number(begin)} {number(y)} "
                f"{number(begin + bend)} {number(y)}L{number(end)} {number(y)}",
                _style(i),
            )
            canvas.circle(begin, source, 3.5, "dot")
        else:
            canvas.line(begin, y, end, y, "trunk")
        dot = "dot" if i == 0 else f"d{(i - 1) % SERIES}"
        canvas.circle(end, y, 5.5, dot)
        # Branches end at the right, so their words stand left of where they begin, over nothing but the grid.
        if limb.parent is None:
            canvas.text(x.start, y - 11, limb.name, "b")
            canvas.text(x.start + 8 + 7.2 * len(limb.name), y - 11, limb.note, "k")
        else:
            canvas.text(begin - 12, y + 5, f"{limb.name} · {limb.note}" if limb.note else limb.name, "k", "end")
