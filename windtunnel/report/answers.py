"""What a lab book tells about post-training: answers, preferences and text before and after, ready to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.report.figures import NARROW, thin
from windtunnel.report.programme import Row
from windtunnel.report.story import losses
from windtunnel.report.svg import Axis, Canvas, x_axis, y_axis

PRESETS = {
    True: "Roles multiply the base rate (muP), so that it carries over between widths like every other rate here.",
    False: "Every tensor trains at the same rate, without the roles' multipliers of muP, as the paper's DPO stage did.",
}
_EASY = 0.85
"""A source that a model gets right this often before DPO leaves too little to gain."""


@dataclass(frozen=True)
class Measured:
    """One measure in words, before and after, each a number or None."""

    what: str
    before: float | None
    after: float | None
    kind: str = "share"
    low: float | None = None
    high: float | None = None
    count: int | None = None

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Beta:
    """One strength of the pull to the reference: accuracy on held-out pairs, divergence, change of bits per byte, averaged."""

    beta: float
    accuracy: float
    divergence: float
    tax: float | None
    chosen: bool


@dataclass(frozen=True)
class Grown:
    """One post-trained branch: its measures by group, how it was trained, and its curves over steps."""

    name: str
    parent: str
    kind: str
    rate: str
    objective: str
    answers: tuple[Measured, ...]
    tax: tuple[Measured, ...]
    preferences: tuple[Measured, ...]
    drift: tuple[Measured, ...]
    divergence: tuple[tuple[str, dict[str, Any]], ...]
    curves: dict[str, tuple[tuple[float, float], ...]]
    sweep: tuple[Beta, ...] = ()
    members: int = 0
    """Checkpoints that a soup averages."""


def read_grown(book: LabBook, program: str, runs: Sequence[Row]) -> list[Grown]:
    """The post-trained branches of a program's tree that were measured."""
    facts, by_id, out = book.facts(program, "model"), {run["id"]: run for run in runs}, []
    for run in runs:
        found = facts.get(run["id"].partition("/")[2], {}).get("answering")
        if found is not None and run["status"] == "done":
            out.append(_grown(book, run, by_id.get(run["parent"]), found))
    return out


def _grown(book: LabBook, run: Row, parent: Row | None, found: dict[str, Any]) -> Grown:
    config = run["config"]
    chats, pairs = set(found["stops"]) | set(found.get("preferences", {})), found.get("preferences", {})
    before = losses(book, parent["id"]) if parent is not None else {}
    after = losses(book, run["id"])
    loss = [Measured(f"loss on {name}", before.get(name), after[name], "bits") for name in sorted(after)]
    own = [m for m in loss if m.what.removeprefix("loss on ") in chats]
    preference = config.get("preference")
    words = f"{preference['loss']} with β = {preference['beta']:g}" if preference else "next token of the answers"
    if preference and preference["smoothing"]:
        words += f", label smoothing {preference['smoothing']:g}"
    by_role = config.get("lr_by_role", True)
    return Grown(
        str(run["name"]), str(parent["name"]) if parent is not None else "", str(run["kind"]),
        f"base learning rate {config['optimizer']['learning_rate']:.3g}. {PRESETS[by_role]}", words,
        (*own, *_answers(found)), tuple(m for m in loss if m not in own), _preferences(pairs), _drift(found, pairs),
        tuple(found.get("divergence", {}).items()), _curves(book, run["id"]), _sweep(book, run, before),
        len(config.get("average") or ()),
    )  # fmt: skip


def _both(what: str, found: dict[str, Any], key: str, kind: str = "share") -> Measured:
    one, two = found["before"], found["after"]
    return Measured(what, one[key], two[key], kind, two.get("low"), two.get("high"), two.get("count"))


def _answers(found: dict[str, Any]) -> list[Measured]:
    exact = found["exact"]
    by_task = {
        task: {when: exact[when]["tasks"][task] for when in ("before", "after")} for task in exact["after"]["tasks"]
    }
    ends = {"computed questions": {when: exact[when]["stops"] for when in ("before", "after")}, **found["stops"]}
    return [
        *(_both(f"right: {task}", both, "accuracy") for task, both in by_task.items()),
        *(_both(f"ends by itself: {name}", both, "ended") for name, both in ends.items()),
        *(_both(f"ends by itself at temperature 1 (not counted): {name}", both, "ended")
          for name, both in found.get("sampled_stops", {}).items()),
        *(_both(f"tokens of an answer: {name}", {w: {"tokens": both[w]["tokens"]} for w in both}, "tokens", "number")
          for name, both in ends.items()),
    ]  # fmt: skip


def _preferences(pairs: dict[str, Any]) -> tuple[Measured, ...]:
    rows = [_both(name, both, "accuracy") for name, both in pairs.items()]
    return tuple(sorted(rows, key=lambda row: row.before is not None and row.before > _EASY))


def _drift(found: dict[str, Any], pairs: dict[str, Any]) -> tuple[Measured, ...]:
    rows = []
    for name, both in pairs.items():
        for which in ("chosen", "rejected"):
            values = {when: {"value": both[when][f"{which}_sum"]} for when in both}
            rows.append(_both(f"log-likelihood of the {which} answer: {name}", values, "value", "number"))
    return tuple(rows)


def _sweep(book: LabBook, run: Row, before: dict[str, float]) -> tuple[Beta, ...]:
    rows = (book.fact(run["program"], "study", f"beta-{run['name']}") or {"rows": []})["rows"]
    out = []
    for row in rows:
        accuracy = [both["after"]["accuracy"] for both in row["preferences"].values()]
        moved = [found["per_answer"] for found in row["divergence"].values()]
        tax = [value - before[name] for name, value in row["bits_per_byte"].items() if name in before]
        own = row["run"] == run["id"].partition("/")[2]
        out.append(Beta(row["beta"], _mean(accuracy) or 0.0, _mean(moved) or 0.0, _mean(tax), own))
    return tuple(out)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _curves(book: LabBook, run: str) -> dict[str, tuple[tuple[float, float], ...]]:
    out = {}
    for name in ("margin", "accuracy", "drift"):
        steps, values = book.metrics(run, name)
        pairs = tuple((float(s), v) for s, v in zip(steps, values, strict=True) if v == v)
        if pairs:
            out[name] = pairs
    return out


def easy(row: Measured) -> bool:
    """Whether a source was too easy before DPO for its gain to count."""
    return row.before is not None and row.before > _EASY


_LANES = {
    "margin": "margin of rewards",
    "accuracy": "share of training pairs with a positive margin",
    "drift": "log-likelihood of the better answer against the reference, nats",
}


def preference_figure(grown: Grown, width: int) -> str:
    """Margin, accuracy and drift over the steps of a branch that learns from pairs, one lane each."""
    narrow = width < NARROW
    lane, left, right = (118 if narrow else 130), 50, width - 12
    shown = [name for name in _LANES if name in grown.curves]
    canvas = Canvas(width, lane * len(shown) + 44, f"Margin, accuracy and drift of {grown.name} over its steps")
    steps = [step for name in shown for step, _ in grown.curves[name]]
    x = Axis(0, max([1.0, *steps]), left, right)
    for i, name in enumerate(shown):
        top, bottom = lane * i + 28, lane * (i + 1) - 14
        pairs = thin(grown.curves[name], 80 if narrow else 160)
        y = Axis.over([v for _, v in pairs], bottom, top, margin=0.1)
        y_axis(canvas, y, left, right, _LANES[name], count=3)
        canvas.path([(x(s), y(v)) for s, v in pairs], f"l{i}")
    x_axis(canvas, x, lane * len(shown) - 4, "step", count=4 if narrow else 7)
    return canvas.render()
