"""What a verb returns: data for programs, and the same shown for people. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class View:
    """``data`` is JSON; ``parts`` are lines and tables in the order in which a person reads them."""

    data: dict[str, Any]
    parts: tuple[RenderableType, ...]

    def to_dict(self) -> dict[str, Any]:
        return self.data

    def __rich__(self) -> RenderableType:
        return Group(*self.parts)


def line(text: str, style: str = "") -> Text:
    """One line of text, taken literally."""
    return Text(text, style=style)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: Sequence[int] = ()
) -> Table:
    """A plain table; columns whose index is in ``right`` are aligned right."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def blocks(values: Sequence[float], width: int = 60) -> str:
    """A curve as one line of block characters, scaled from 0 to its maximum."""
    marks = " ▁▂▃▄▅▆▇█"
    if not values:
        return ""
    chosen = [values[min(len(values) - 1, i * len(values) // width)] for i in range(min(width, len(values)))]
    top = max(chosen) or 1.0
    return "".join(marks[round(8 * max(0.0, v) / top)] for v in chosen)
