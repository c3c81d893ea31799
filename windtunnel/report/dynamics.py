"""The dynamics of a run as one figure: what happens to gradients, path and weights, with the learning rate beneath."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.report.figures import thin
from windtunnel.report.svg import SERIES, Axis, Canvas, compact, spread, text_width, x_axis, y_axis

Pairs = Sequence[tuple[float, float]]
_PANEL, _GAP, _LEFT = 104, 44, 58
PANELS = (
    ("norm", "gradient norm ‖g‖", False), ("max", "largest |g|", False), ("cosine", "cos(g(t), g(t+1))", False),
    ("d1", "slope along the path D1", False), ("d2", "second derivative along the path D2", False),
    ("curvature", "curvature of the path K", True), ("sharpness", "sharpness along the gradient", False),
)  # fmt: skip
"""Key of a step's numbers, title, whether the axis is logarithmic (and the size is drawn, without its sign)."""


def dynamics_figure(seen: Mapping[str, Any], decay_from: int | None, title: str, width: int = 720) -> str:
    """One panel a quantity over one axis of steps, as an SVG file of its own.

    Args:
        seen: ``train.dynamics.second_pass``.
        decay_from: the last step of the stable rate, which a line marks.
    """
    panels = [(words, log, {"": _series(seen["steps"], key, log)}) for key, words, log in PANELS]
    span = "in an update" if seen["sampling"]["window"] == 1 else "between snapshots"
    panels.append((f"largest |ΔW| {span}", False, moves_by_kind(seen["moves"])))
    panels.append(("learning rate", False, {"": [(float(s), float(r)) for s, r in seen["rates"]]}))
    panels = [panel for panel in panels if any(panel[2].values())]
    names = [name for _, _, lines in panels for name in lines]
    right = width - max(text_width(name, 11) for name in names) - 18
    height = 30 + (_PANEL + _GAP) * len(panels) + 20
    canvas = Canvas(width, height, f"{title}: gradients, path and weights by step, with the learning rate beneath")
    x = Axis(seen["first"], seen["last"], _LEFT, right)
    canvas.text(0, 8, title, "b")
    for index, (words, log, lines) in enumerate(panels):
        top = 42 + (_PANEL + _GAP) * index
        base = top + _PANEL
        _panel(canvas, x, (top, base), words, log, lines)
        if index + 1 == len(panels):
            x_axis(canvas, x, base, "step", count=7)
        else:
            canvas.line(_LEFT, base, right, base, "ax")
    if decay_from is not None and seen["first"] < decay_from < seen["last"]:
        canvas.line(x(decay_from), 42, x(decay_from), height - _GAP - 20, "hair")
        canvas.text(x(decay_from) + 5, 30, "the decay begins", "k")
    return canvas.render(alone=True)


MEASURES = {
    "norm": "gradient norm", "max": "largest |g|", "cosine": "cos(g(t), g(t+1))", "d1": "D1", "d2": "D2",
    "curvature": "curvature K", "sharpness": "sharpness",
}  # fmt: skip


def read_dynamics(book: LabBook, program: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Runs whose updates were watched and what was seen of each: by a second pass, else by its probe."""
    found = {**book.facts(program, "dynamics-live"), **book.facts(program, "dynamics")}
    return [(folder.rpartition("-")[0] or folder, fact) for folder, fact in found.items()]


def phase_columns(fact: Mapping[str, Any]) -> tuple[str, ...]:
    """Titles of ``phase_rows``."""
    words = list(fact["phases"])
    titles = {
        "before": "before the decay" if len(words) > 1 else "all of it",
        "decay": "in the decay",
        "late": "its last quarter",
    }
    return ("", *(titles[word] for word in words))


def phase_rows(fact: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Learning rate and every quantity in each phase of a run."""
    words = list(fact["phases"])
    rates = (fact["rate"][word] for word in words)
    shown = [key for key in MEASURES if any(fact["phases"][word].get(key) is not None for word in words)]
    rows = [(MEASURES[key], *level_cells(fact["phases"], key)) for key in shown]
    return [("learning rate", *(f"{rate:.3g}" if rate is not None else "–" for rate in rates)), *rows]


def level_cells(phases: Mapping[str, Mapping[str, float | None]], key: str) -> list[str]:
    """A quantity in each phase."""
    return [f"{value:.3g}" if (value := levels.get(key)) is not None else "–" for levels in phases.values()]


def moves_by_kind(moves: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The largest change of any entry between snapshots, by the matrix's place in a block, all layers together."""
    out: dict[str, list[tuple[float, float]]] = {}
    for move in moves:
        kinds: dict[str, float] = {}
        for name, value in move["largest"].items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            kinds[kind] = max(kinds.get(kind, 0.0), value)
        for kind, value in kinds.items():
            out.setdefault(kind, []).append((float(move["step"]), value))
    return out


def _series(steps: Sequence[Mapping[str, Any]], key: str, log: bool) -> list[tuple[float, float]]:
    found = [(float(s["step"]), float(s[key])) for s in steps if s.get(key) is not None]
    return [(step, abs(value)) for step, value in found if value] if log else found


def _panel(
    canvas: Canvas, x: Axis, place: tuple[float, float], words: str, log: bool, lines: Mapping[str, Pairs]
) -> None:
    top, base = place
    smooth = {name: _means(pairs, log) for name, pairs in lines.items() if pairs}
    values = [v for pairs in smooth.values() for _, v in pairs]
    y = Axis.over(values, base, top, log=log)
    y_axis(canvas, y, x.start, x.end, "", count=3, show=compact if log else None)
    canvas.text(x.start, top - 8, words, "m")
    if not log and y.low < 0 < y.high:
        canvas.line(x.start, y(0), x.end, y(0), "ax")
    ends = spread([y(pairs[-1][1]) + 4 for pairs in smooth.values()], 11, top + 2, base + 6)
    for i, ((name, pairs), end) in enumerate(zip(smooth.items(), ends, strict=True)):
        canvas.path([(x(step), y(value)) for step, value in pairs], f"l{i % SERIES}")
        if name:
            canvas.text(x.end + 8, end, name, f"k f{i % SERIES}")


def _means(pairs: Pairs, log: bool) -> Pairs:
    """Means of neighbours, geometric on a logarithmic axis, so that a noisy series shows its level."""
    if not log:
        return thin(pairs, 120)
    return [(step, math.exp(value)) for step, value in thin([(s, math.log(v)) for s, v in pairs], 120)]
