"""The single studies of a tunnel in the report: what the lab book tells about each, and its figure. Losses in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus
from windtunnel.report.cost import COORDINATES, runs_of
from windtunnel.report.figures import NARROW
from windtunnel.report.story import LN2
from windtunnel.report.svg import SHADES, Axis, Canvas, compact, x_axis, y_axis


@dataclass(frozen=True)
class ValleyCurve:
    """One size of a transfer study, seeds averaged: (base rate, loss above its best in %), rates that diverged, best rate."""

    name: str
    points: tuple[tuple[float, float], ...]
    failed: tuple[float, ...]
    best: float | None
    edge: bool = False


@dataclass(frozen=True)
class TransferPart:
    """One axis under one parametrization: numbers already in the units in which they are shown."""

    parametrization: str
    curves: tuple[ValleyCurve, ...]
    rows: tuple[tuple[str, float, str, str, str], ...]
    """Label, parameters, best base rate, its range over seeds, bits per byte."""
    verdict: str
    at_worst: str
    drift: str
    regret: str
    compute: str
    notes: tuple[str, ...]
    rules: tuple[tuple[str, str, str, str], ...] = ()
    """Of weight decay: name, the power of the factor, what it costs at the target, who says so."""


@dataclass(frozen=True)
class TransferAxis:
    """One axis of the transfer study."""

    axis: str
    rule: str
    seeds: int
    trials: int
    parts: tuple[TransferPart, ...]
    varied: str = "base learning rate"


def read_transfer(book: LabBook, program: str) -> list[TransferAxis]:
    """All axes that were studied, in the order of their names."""
    return [
        TransferAxis(
            fact["axis"], fact["rule"], len(fact["seeds"]), runs_of(fact["cost"]),
            tuple(_part(name, part) for name, part in fact["parametrizations"].items()),
            "weight decay" if fact.get("over") == "weight_decay" else "base learning rate",
        )
        for fact in book.facts(program, "transfer").values()
    ]  # fmt: skip


def _part(name: str, part: Mapping[str, Any]) -> TransferPart:
    rows = []
    for value in part["values"]:
        rates, losses = ([v[key] for v in value.get("valleys", [])] for key in ("rate", "loss"))
        best = f"{_geometric_mean(rates):.3g}" if rates else "–"
        span = f"{min(rates):.3g} – {max(rates):.3g}" if len(rates) > 1 else "–"
        loss = f"{sum(losses) / len(losses) / LN2:.4f}" if losses else "–"
        rows.append((value["label"], float(value["parameters"]), best, span, loss))
    regret = part.get("regret_share")
    lost = "the target diverges at the proxy's best rate" if regret and regret["value"] is None else ""
    return TransferPart(
        name, tuple(_curve(value) for value in part["values"]), tuple(rows), part["verdict"], part["at_worst"],
        _estimate(part.get("drift"), 1, 2), lost or _estimate(regret, 100, 2, " %"),
        _estimate(part.get("compute"), 100, 1, " %"), tuple(part["notes"]),
        tuple((r["name"], minus(f"{r['exponent']:.2g}"), _estimate(r["regret_share"], 100, 2, " %"), r["source"])
              for r in part.get("rules", ())),
    )  # fmt: skip


def _curve(value: Mapping[str, Any]) -> ValleyCurve:
    valleys = value.get("valleys", [])
    means = {
        rate: sum(losses) / len(losses)
        for rate, losses in zip(value["rates"], value["losses"], strict=True)
        if None not in losses
    }
    low = sum(v["loss"] for v in valleys) / len(valleys) if valleys else min(means.values(), default=1.0)
    failed = tuple(rate for rate in value["rates"] if rate not in means)
    points = tuple((rate, 100 * (loss / low - 1)) for rate, loss in means.items())
    best = _geometric_mean([v["rate"] for v in valleys]) if valleys else None
    return ValleyCurve(value["label"], points, failed, best, any(v["edge"] in ("low", "high") for v in valleys))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _estimate(found: Mapping[str, Any] | None, scale: float, digits: int, unit: str = "") -> str:
    """A mean with its interval, as text; a dash where there is none."""
    if not found or found["value"] is None:
        return "–"
    value = f"{scale * found['value']:.{digits}f}{unit}"
    if found["low"] is None or found["high"] is None:
        return minus(value)
    return minus(f"{value} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]")


def transfer_figure(
    curves: Sequence[ValleyCurve], title: str, width: int, *, height: int = 300, varied: str = "base learning rate"
) -> str:
    """One curve a size over what is varied, each above its own best; strokes below mark where the best lies.

    Losses far above are drawn at the upper end as open marks, rates that diverged as crosses.
    """
    left, right, top, base = 44, 12, 34 + 16 * (len(curves) if width < NARROW else 0), height - 44
    right = right if width < NARROW else 104
    canvas = Canvas(width, height, f"{title}: held-out loss over the {varied}, one curve a size")
    rates = [rate for c in curves for rate in (*(r for r, _ in c.points), *c.failed)]
    every = sorted(e for c in curves for _, e in c.points) or [1.0]
    ceiling = max(0.5, min(every[-1], 2.0 * every[int(0.7 * (len(every) - 1))])) * 1.06
    x = Axis.over(rates or [0.01], left, width - right, log=True)
    y = Axis(-0.12 * ceiling, ceiling, base, top)
    y_axis(canvas, y, left, width - right, "loss above the size's best, %", count=4)
    x_axis(canvas, x, base, varied, show=compact, count=4 if width < NARROW else 7)
    for index, curve in enumerate(curves):
        shade = _shade(index, len(curves))
        inside = [(x(r), y(e)) for r, e in curve.points if e <= ceiling]
        canvas.path(inside, f"ql{shade}")
        for place in inside:
            canvas.circle(*place, 3.5, f"qd{shade}")
        for r, e in curve.points:
            if e > ceiling:
                canvas.diamond(x(r), top + 3, 4, "hollow")
        for r in curve.failed:
            canvas.cross(x(r), top + 3)
        if curve.best is not None:
            canvas.line(x(curve.best), y(0), x(curve.best), base, f"ql{shade}")
        place = (left + 6, 30 + 16 * index) if width < NARROW else (width - right + 10, top + 8 + 18 * index)
        canvas.circle(place[0], place[1] - 4, 4, f"qd{shade}")
        best = "" if curve.best is None else f"  {'beyond ' if curve.edge else ''}{curve.best:.3g}"
        canvas.text(place[0] + 9, place[1], curve.name + (best if width < NARROW else ""), "k")
    return canvas.render()


def _shade(index: int, count: int) -> int:
    return SHADES - 1 if count < 2 else round(index * (SHADES - 1) / (count - 1))


_KINDS = {
    "stream": "residual stream", "block": "block outputs", "logits": "logits of scored tokens", "update": "weight updates",
}  # fmt: skip


def read_coordinates(book: LabBook, program: str) -> dict[str, dict[str, Any]]:
    """The coordinate checks of a program by name; none where the study was not run."""
    return book.fact(program, COORDINATES, "width") or {}


def coordinate_columns(checks: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns of ``coordinate_rows``."""
    return ("parametrization", "verdict", *next(iter(checks.values()))["bars"], "sizes at init")


def coordinate_rows(checks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each check: the verdict, the steepest slope of each kind beside its bar, and those before training."""
    rows = []
    for name, check in checks.items():
        kinds = list(check["bars"])
        at_init = [f"{kind} {_steepest(check, kind, init=True)}" for kind in kinds if kind != "logits"]
        cells = [f"{_steepest(check, kind)} (± {check['bars'][kind]:g})" for kind in kinds]
        rows.append((name, _coordinate_verdict(check), *cells, ", ".join(at_init)))
    return rows


def _steepest(check: Mapping[str, Any], kind: str, *, init: bool = False) -> str:
    """The slope of one kind that is farthest from zero among those that are judged."""
    judged = (s["value"] for s in check["slopes"] if s["judged"] and s["kind"] == kind and init == (not s["step"]))
    return minus(f"{max(judged, key=abs):+.3f}")


def _coordinate_verdict(check: Mapping[str, Any]) -> str:
    failed = len(check["failures"])
    return f"{failed} too steep" if failed else "flat"


def coordinate_figure(checks: Mapping[str, Mapping[str, Any]], width: float = 1062, *, alone: bool = True) -> str:
    """Panels for each check: change since initialisation over width, a line a quantity, pale for the first steps; dashed the
    sizes at initialisation.

    Both axes are logarithmic; under a parametrization that carries over the lines lie flat. ``alone``: an SVG file of its own.
    """
    across = 2 if width < NARROW else len(_KINDS)
    tall, left, top = 190, 46, 52 if alone else 20
    panel, down = (width - left) / across - 44, tall + 52
    block = down * math.ceil(len(_KINDS) / across) + 32
    canvas = Canvas(
        width, block * len(checks) + top, "Change of what the network computes over its width: " + "; ".join(checks)
    )
    if alone:
        steps = " ".join(str(step) for step in next(iter(checks.values()))["steps"] if step)
        canvas.text(0, 4, f"dashed: size at initialisation; pale to dark: change after {steps} steps", "m")
    for row, (name, check) in enumerate(checks.items()):
        head = top + block * row
        canvas.text(0, head - 12, f"{name}: {_coordinate_verdict(check)}", "b")
        for place, (kind, words) in enumerate(_KINDS.items()):
            start, upper = left + (panel + 44) * (place % across), head + down * (place // across)
            _panel(canvas, check, kind, words, (start, start + panel, upper + 22, upper + tall))
    return canvas.render(alone=alone)


def _panel(
    canvas: Canvas, check: Mapping[str, Any], kind: str, words: str, place: tuple[float, float, float, float]
) -> None:
    left, right, top, base = place
    mine = [q for q, name in enumerate(check["quantities"]) if _kind(check, name) == kind]
    trained = sum(step > 0 for step in check["steps"])
    values = [
        value for of_width in check["changes"] for of_step in of_width for q, value in enumerate(of_step) if q in mine
    ]
    canvas.text(left, top - 8, words, "m")
    if not values:
        return
    x = Axis.over(check["widths"], left, right, log=True)
    y = Axis.over(values, base, top, log=True)
    y_axis(canvas, y, left, right, "", count=4, show=compact)
    x_axis(canvas, x, base, "width", show=compact, count=4)
    styles = (f"ql{_shade(order, trained)}" for order in range(trained))
    for s, step in enumerate(check["steps"]):
        style = next(styles) if step else "l1 dash"
        for q in mine:
            canvas.path([(x(w), y(check["changes"][i][s][q])) for i, w in enumerate(check["widths"])], style)


def _kind(check: Mapping[str, Any], quantity: str) -> str:
    return next(slope["kind"] for slope in check["slopes"] if slope["quantity"] == quantity)
