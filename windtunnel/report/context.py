"""What the lab book tells about longer contexts: hidden keys found by length and depth, loss by position, loss in short rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.report.svg import SHADES, Canvas


@dataclass(frozen=True)
class LongContext:
    """One long branch. ``short`` has a corpus, bits per byte before and after in short rows; ``positions`` a corpus and its
    parts (from, to, nats a token before and after, tokens); ``cells`` the retrieval by task."""

    name: str
    row: int
    short_row: int
    short: tuple[tuple[str, float, float], ...]
    positions: tuple[tuple[str, tuple[Mapping[str, Any], ...]], ...]
    cells: Mapping[str, tuple[Mapping[str, Any], ...]]

    @property
    def count(self) -> int:
        """Items in a cell."""
        return next((cell["count"] for cells in self.cells.values() for cell in cells), 0)


def read_contexts(book: LabBook, program: str) -> list[LongContext]:
    """All long branches that were measured."""
    return [
        _context(folder.rpartition("-")[0] or folder, fact["context"])
        for folder, fact in book.facts(program, "model").items()
        if fact.get("context")
    ]


def _context(name: str, found: Mapping[str, Any]) -> LongContext:
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for cell in found["retrieval"]:
        cells.setdefault(cell["task"], []).append(cell)
    return LongContext(
        name, found["row"], found["short_row"],
        tuple((corpus, both["before"], both["after"]) for corpus, both in found["short"].items()),
        tuple((corpus, tuple(parts)) for corpus, parts in found["positions"].items()),
        {task: tuple(own) for task, own in cells.items()},
    )  # fmt: skip


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
