"""What the lab book tells about longer contexts: hidden keys found by length and depth, loss by position, loss in short rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.report.story import losses
from windtunnel.report.svg import SHADES, Canvas


@dataclass(frozen=True)
class LongContext:
    """One long branch. ``short`` has a corpus, bits per byte before and after in short rows, and of the trunk's ``plain`` decay,
    where there is one; ``positions`` a corpus and its parts (from, to, nats a token before and after, tokens); ``cells`` the
    retrieval by task."""

    name: str
    row: int
    short_row: int
    short: tuple[tuple[str, float, float, float | None], ...]
    positions: tuple[tuple[str, tuple[Mapping[str, Any], ...]], ...]
    cells: Mapping[str, tuple[Mapping[str, Any], ...]]
    plain: str = ""

    @property
    def count(self) -> int:
        """Items in a cell."""
        return next((cell["count"] for cells in self.cells.values() for cell in cells), 0)


def read_contexts(book: LabBook, program: str) -> list[LongContext]:
    """All long branches that were measured."""
    return [
        _context(book, folder.rpartition("-")[0] or folder, fact["context"], plain_decay(book, f"{program}/{folder}"))
        for folder, fact in book.facts(program, "model").items()
        if fact.get("context")
    ]


def plain_decay(book: LabBook, run: str) -> Mapping[str, Any] | None:
    """The decay of the same trunk on the trunk's own data that has read about as much as a run, the nearest in tokens: what a
    longer context is held to, since a checkpoint that has not decayed stands higher. None where its trunk has none."""
    own = book.run(run)
    if own is None:
        return None
    line, parent = set[str](), own["parent"]
    while parent and parent not in line and (row := book.run(parent)) is not None:
        line.add(parent)
        parent = row["parent"]
    found = [
        one for one in book.runs(program=own["program"], kind="decay", status="done", study="") if one["parent"] in line
    ]
    plain = [one for one in found if len({str(s["mixture"]) for s in one["config"]["plan"]["segments"]}) == 1]
    return min(reversed(plain), key=lambda one: abs(one["tokens"] - own["tokens"]), default=None)


def _context(
    book: LabBook, name: str, found: Mapping[str, Any], plain: Mapping[str, Any] | None
) -> LongContext:  # fmt: skip
    other = losses(book, plain["id"]) if plain else {}
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for cell in found["retrieval"]:
        cells.setdefault(cell["task"], []).append(cell)
    return LongContext(
        name, found["row"], found["short_row"],
        tuple((corpus, both["before"], both["after"], other.get(corpus)) for corpus, both in found["short"].items()),
        tuple((corpus, tuple(parts)) for corpus, parts in found["positions"].items()),
        {task: tuple(own) for task, own in cells.items()}, str(plain["name"]) if plain else "",
    )  # fmt: skip


def in_short_rows(one: LongContext) -> str:
    """What the longer context cost in short rows, as one line: bits per byte, means over the corpora."""
    count = max(1, len(one.short))
    before, after = sum(row[1] for row in one.short) / count, sum(row[2] for row in one.short) / count
    plain = [row[3] for row in one.short if row[3] is not None]
    said = f"{one.name}: bits per byte in rows of {one.short_row:,}: {before:.4f} before, {after:.4f} after"
    if not plain or len(plain) < len(one.short):
        return said
    mean = sum(plain) / len(plain)
    return f"{said}, {mean:.4f} of the plain decay '{one.plain}' ({100 * (after / mean - 1):+.1f} % against it)"


def heat_map(cells: Mapping[str, Sequence[Mapping[str, Any]]], row: int, width: int) -> str:
    """One map a task: lengths from left to right, depths from top to bottom, the share of keys found in each cell.

    Darker cells found more. A line stands before the lengths that lie beyond the trained row.
    """
    left, cell_high, gap = 44, 24, 52
    lengths = sorted({cell["length"] for own in cells.values() for cell in own})
    depths = sorted({cell["depth"] for own in cells.values() for cell in own})
    wide = (width - left - 8) / max(1, len(lengths))
    high = gap + cell_high * len(depths)
    canvas = Canvas(
        width, high * len(cells) + 8, "Share of hidden keys found, by length of the context and depth of the key"
    )
    for number, (task, own) in enumerate(cells.items()):
        top = high * number + 18
        canvas.text(left, top - 5, task, "b")
        for cell in own:
            x = left + wide * lengths.index(cell["length"])
            y = top + cell_high * depths.index(cell["depth"])
            shade = round(cell["found"] * (SHADES - 1))
            canvas.rect(x + 1, y + 1, wide - 2, cell_high - 2, f"qf{shade}")
            canvas.text(x + wide / 2, y + cell_high / 2 + 4, f"{100 * cell['found']:.0f} %", "k", "middle")
        for place, depth in enumerate(depths):
            canvas.text(left - 6, top + cell_high * (place + 0.5) + 4, f"{100 * depth:.0f} %", "k", "end")
        for place, length in enumerate(lengths):
            canvas.text(left + wide * (place + 0.5), top + cell_high * len(depths) + 14, f"{length:,}", "k", "middle")
        if beyond := [place for place, length in enumerate(lengths) if length > row]:
            x = left + wide * beyond[0]
            canvas.line(x, top - 2, x, top + cell_high * len(depths) + 2, "hair")
    return canvas.render()
