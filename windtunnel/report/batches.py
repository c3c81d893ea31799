"""The batch study in the report: equal-loss curves over the batch, and the best batch over the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.laws.batch_fit import BatchRun, levels, tokens_to_reach
from windtunnel.report.figures import NARROW
from windtunnel.report.svg import SHADES, Axis, Canvas, counts, x_axis, y_axis


@dataclass(frozen=True)
class LossLevel:
    """One size at one loss in nats per token: (batch, tokens to get there), and the best of them if it lies inside."""

    parameters: float
    loss: float
    points: tuple[tuple[float, float], ...]
    best: tuple[float, float] | None


@dataclass(frozen=True)
class BatchView:
    """What the report says of the study."""

    fact: Mapping[str, Any]
    levels: tuple[LossLevel, ...]
    sizes: tuple[float, ...]
    minima: tuple[tuple[str, ...], ...]
    """Parameters, loss, best batch, tokens, cost of half, cost of double, as text."""
    branches: tuple[tuple[str, ...], ...]
    """Parameters, tokens, batch, cost of each factor, critical batch, noise scale, as text."""
    factors: tuple[str, ...]


def read_batch(book: LabBook, program: str) -> BatchView | None:
    """The study of a program, or None."""
    fact = book.fact(program, "batch", "batch")
    if not fact:
        return None
    runs = [BatchRun(c["parameters"], c["batch"], tuple((d, v) for d, v in c["points"])) for c in fact["curves"]]
    minima = fact["law"].get("minima", [])
    found = []
    for size in sorted({run.parameters for run in runs}):
        mine = [run for run in runs if run.parameters == size]
        for loss in _losses(mine, minima, size):
            points = [(run.batch, d) for run in mine if (d := tokens_to_reach(run.points, loss)) is not None]
            best = next(((m["batch"], m["tokens"]) for m in minima if _is(m, size, loss) and not m["edge"]), None)
            if len(points) > 1:
                found.append(LossLevel(size, loss, tuple(points), best))
    branches = fact["branches"]
    return BatchView(
        fact, tuple(found), tuple(sorted({run.parameters for run in runs})),
        tuple((si(m["parameters"]), f"{m['loss']:.3f}", *_minimum(m)) for m in minima),
        tuple(
            (si(b["parameters"]), si(b["tokens"]), si(b["batch"]),
             *(_percent(c) for f, c in zip(b["factors"], b["costs"], strict=True) if f != 1), _critical(b),
             si(b["noise_scale"]) if b["noise_scale"] else "–")
            for b in branches
        ),
        tuple(f"×{f:g}" for f in branches[0]["factors"] if f != 1) if branches else (),
    )  # fmt: skip


def _is(minimum: Mapping[str, Any], size: float, loss: float) -> bool:
    return minimum["parameters"] == size and abs(minimum["loss"] - loss) < 1e-9


def _losses(runs: Sequence[BatchRun], minima: Sequence[Mapping[str, Any]], size: float) -> list[float]:
    return [m["loss"] for m in minima if m["parameters"] == size] or levels(runs)


def _minimum(m: Mapping[str, Any]) -> tuple[str, ...]:
    if m["edge"]:
        side = "smallest" if m["edge"] == "small" else "largest"
        return (f"{side} that was tried", si(m["tokens"]), "–", "–")
    return si(m["batch"]), si(m["tokens"]), _percent(m["half"]), _percent(m["double"])


def _percent(share: float | None) -> str:
    return "never" if share is None else minus(f"{100 * share:+.1f} %")


def _critical(branch: Mapping[str, Any]) -> str:
    if branch["critical"] is None:
        return "undecided"
    return f"{'at least ' if branch['beyond'] else ''}{si(branch['critical'])}"


def equal_loss_figure(view: BatchView, width: int, *, height: int = 320) -> str:
    """Tokens to a loss over the batch, a line for each size and loss, a ring at its lowest point. Both axes logarithmic."""
    left, right, top, base = 52, 12, 34 + 16 * (len(view.sizes) if width < NARROW else 0), height - 44
    right = right if width < NARROW else 90
    canvas = Canvas(width, height, "Tokens needed to reach a loss over the batch, one line for each size and loss")
    places = [p for level in view.levels for p in level.points] or [(1.0, 1.0), (2.0, 2.0)]
    x = Axis.over([b for b, _ in places], left, width - right, log=True)
    y = Axis.over([d for _, d in places], base, top, log=True)
    y_axis(canvas, y, left, width - right, "tokens to reach the loss", count=6, show=counts)
    x_axis(canvas, x, base, "batch, tokens", show=counts, count=4 if width < NARROW else 9)
    for level in view.levels:
        shade = _shade(view.sizes.index(level.parameters), len(view.sizes))
        canvas.path([(x(b), y(d)) for b, d in level.points], f"ql{shade}")
        for b, d in level.points:
            canvas.circle(x(b), y(d), 2.5, f"qd{shade}")
        if level.best is not None:
            canvas.diamond(x(level.best[0]), y(level.best[1]), 5, "best")
    _key(canvas, view.sizes, left, top, width, right)
    return canvas.render()


def law_figure(view: BatchView, width: int, *, height: int = 300) -> str:
    """The best batch over the loss: minima, the line through them with its range, and the paper's for comparison."""
    left, right, top, base = 52, 12, 34 + 16 * (len(view.sizes) if width < NARROW else 0), height - 44
    right = right if width < NARROW else 90
    canvas = Canvas(width, height, "The best batch over the loss, with the fitted line")
    inside = [level for level in view.levels if level.best is not None]
    law = view.fact["law"]
    losses = [level.loss for level in inside] or [1.0, 2.0]
    reach = [min(losses) * 0.97, max(losses) * 1.03]
    lines = [(loss, law["coefficient"] / loss ** law["exponent"]) for loss in reach] if "coefficient" in law else []
    batches = [level.best[0] for level in inside if level.best] + [b for _, b in lines] or [1.0, 2.0]
    x = Axis.over(reach, left, width - right, log=True)
    y = Axis.over(batches, base, top, log=True)
    y_axis(canvas, y, left, width - right, "best batch, tokens", count=6, show=counts)
    x_axis(canvas, x, base, "loss, nats per token", count=4 if width < NARROW else 7)
    canvas.path([(x(loss), y(b)) for loss, b in lines], "trunk dash")
    for level in inside:
        shade = _shade(view.sizes.index(level.parameters), len(view.sizes))
        assert level.best is not None
        canvas.circle(x(level.loss), y(level.best[0]), 4.5, f"qd{shade}")
    _key(canvas, view.sizes, left, top, width, right)
    return canvas.render()


def _key(canvas: Canvas, sizes: Sequence[float], left: float, top: float, width: int, right: float) -> None:
    for index, size in enumerate(sizes):
        narrow = width < NARROW
        place = (left + 6, 30 + 16 * index) if narrow else (width - right + 10, top + 8 + 18 * index)
        canvas.circle(place[0], place[1] - 4, 4, f"qd{_shade(index, len(sizes))}")
        canvas.text(place[0] + 9, place[1], f"N = {si(size)}", "k")


def _shade(index: int, count: int) -> int:
    return SHADES - 1 if count < 2 else round(index * (SHADES - 1) / (count - 1))


def has_law(view: BatchView) -> bool:
    """Whether there are minima inside the grid to draw a line through."""
    return any(level.best is not None for level in view.levels) and math.isfinite(
        view.fact["law"].get("exponent", math.nan)
    )
