"""Runs side by side. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import write_bytes
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import duration, si
from windtunnel.home import Home
from windtunnel.recipe import differences
from windtunnel.report.figures import compare_figure
from windtunnel.train.batches import Batches
from windtunnel.views import View, line, table


def open_book(home: Path) -> LabBook:
    """The lab book of a home, for reading."""
    return LabBook(Home(home).labbook, readonly=True)


def find_run(book: LabBook, name: str, where: str = "run") -> dict[str, Any]:
    """The row of a run: by id, PROGRAM/NAME, NAME if only one program has it, or folder; of several, the latest.

    Raises:
        UserError: there is none, or several programs have one of that name.
    """
    rows = book.runs()
    program, slash, short = name.partition("/")
    found = [row for row in rows if name in (row["id"], row["folder"])]
    found = found or [row for row in rows if slash and (row["program"], row["name"]) == (program, short)]
    found = found or [row for row in rows if row["name"] == name or Path(row["folder"]).name == Path(name).name]
    programs = sorted({row["program"] for row in found})
    if not found:
        raise UserError(where, f"expected a run of this home, got {name[:80]!r}", "windtunnel status lists them")
    if len(programs) > 1:
        raise UserError(
            where,
            f"{len(programs)} programs have a run {name[:80]!r}",
            "write " + " or ".join(f"{p}/{name}" for p in programs),
        )
    return found[-1]


def compare(home: Path, runs: Sequence[str], *, out: Path | None = None) -> View:
    """Differences of what two or more runs depend on, their losses, and their curves at equal tokens and equal seconds."""
    book = open_book(home)
    rows = [find_run(book, name) for name in runs]
    names = [f"{row['program']}/{row['name']}" for row in rows]
    parts: list[RenderableType] = []
    changed = [
        str(d)
        for row in rows[1:]
        for d in differences(readable(rows[0]["config"]), readable(row["config"]))
        if d.key not in ("name", "keep")
    ]
    parts.append(table((f"differs from {names[0]}",), [(text,) for text in changed] or [("nothing",)]))
    scores = [{s["corpus"]: s for s in book.scores(row["id"]) if s["name"] == "bits_per_byte"} for row in rows]
    corpora = sorted(set().union(*scores))
    noise, source = seed_noise_of(book, rows)
    cells = [(corpus, *(_cell(s.get(corpus), noise) for s in scores)) for corpus in corpora]
    note = (
        f"± is 1.96 seed standard deviations ({100 * noise:.2f} %, {source})"
        if noise
        else "one seed: no interval known"
    )
    parts.append(table(("held-out bits per byte", *names), cells, right=tuple(range(1, len(names) + 1))))
    parts.append(line(note))
    curves = {name: _curve(book, row) for name, row in zip(names, rows, strict=True)}
    parts += _at_equal(names, curves)
    figure = out or Home(home).program(rows[0]["program"]) / "compare.svg"
    tokens = {name: ([t for t, _, _ in curve], [loss for _, _, loss in curve]) for name, curve in curves.items()}
    write_bytes(figure, compare_figure(tokens, "tokens", "training loss, nats per token").encode())
    parts.append(line(f"figure: {figure}"))
    data = {
        "runs": names,
        "differences": changed,
        "scores": [{c: s["value"] for c, s in x.items()} for x in scores],
        "figure": str(figure),
    }
    return View(data, tuple(parts))


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage with its hashes cut to ten digits and its data plan as one line a segment."""
    plan = config["plan"]
    segments = {
        f"from sequence {segment['start']:,}": ", ".join(f"{name} {weight:g}" for name, weight in segment["mixture"])
        for segment in plan["segments"]
    }
    start = config["start"]
    return {
        **config,
        "corpora": {name: key[:10] for name, key in config["corpora"].items()},
        "plan": {**{name: value for name, value in plan.items() if name != "segments"}, "mixture": segments},
        "start": start and {**start, "stage": start["stage"][:10]},
    }


def _cell(score: Mapping[str, Any] | None, noise: float | None) -> str:
    if score is None:
        return ""
    return f"{score['value']:.4f}" + (f" ± {1.96 * noise * score['value']:.4f}" if noise else "")


def seed_noise_of(book: LabBook, rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Relative standard deviation from seed to seed, as the program's forecast recorded it, and where it comes from."""
    found = [f["forecast"] for row in rows for f in book.facts(row["program"], "forecast").values()]
    if not found:
        return None, ""
    largest = max(found, key=lambda forecast: forecast["noise"])
    seeds = len({point["seed"] for point in largest["points"]})
    return largest["noise"], f"{seeds} seeds of the proxies" if seeds > 1 else "assumed, the proxies have one seed"


def _curve(book: LabBook, row: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(tokens, seconds, loss) along a run, the loss averaged over about 40 stretches."""
    steps, values = book.metrics(row["id"], "loss")
    batches, length = Batches.of(row["config"]), row["config"]["plan"]["row"]
    first = row["config"]["start"]["step"] if row["config"]["start"] else 0
    pace = (row["seconds"] or 0.0) / max(1, (row["steps"] or 0) - first)
    size = max(1, len(values) // 40)
    out = []
    for i in range(0, len(values) - size + 1, size):
        part = [v for v in values[i : i + size] if v == v]
        if part:
            out.append(
                (
                    batches.sequences(steps[i + size - 1]) * length,
                    (steps[i + size - 1] - first) * pace,
                    sum(part) / len(part),
                )
            )
    return out


def _at_equal(names: list[str], curves: dict[str, list[tuple[float, float, float]]]) -> list[RenderableType]:
    """Training losses at the same tokens and at the same seconds: the most that all runs have reached."""
    parts: list[RenderableType] = []
    for index, what in ((0, "tokens"), (1, "seconds")):
        ends = [curve[-1][index] for curve in curves.values() if curve]
        if len(ends) < len(names) or min(ends) <= 0:
            continue
        at = min(ends)
        losses = [min(curves[n], key=lambda point: abs(point[index] - at))[2] for n in names]
        shown = si(at) if index == 0 else duration(at)
        parts.append(
            table(
                (f"training loss at {shown} {what if index == 0 else ''}".strip(), *names),
                [("nats per token", *(f"{v:.4f}" for v in losses))],
            )
        )
    return parts
