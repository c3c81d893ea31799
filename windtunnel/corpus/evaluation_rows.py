"""Rows that score whole held-out documents: each predicted token once, end of text included.

A document's tokens are divided into non-overlapping windows of at most ``row`` predictions; a window sees only itself. Windows
are packed into rows (first row with room, in order), with a document number each, so that masking keeps them apart. The
sum of losses over all rows divided by ln 2 times ``Scored.bytes`` is bits per byte, whatever the row, batch or world size
(up to what a longer window lets the model see).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from windtunnel.corpus.loader import Rows, empty_rows, fill_row
from windtunnel.corpus.store import HeldOut

_OPEN_ROWS = 64
_Window = tuple[int, int, int]
"""First token, predictions, bytes (of the whole document at its first window, 0 at the others)."""


@dataclass(frozen=True)
class Scored:
    """What is scored: whole documents, their predicted tokens and the UTF-8 bytes of their scored text."""

    documents: int
    tokens: int
    bytes: int


def scored(heldout: HeldOut, limit_tokens: int | None = None) -> Scored:
    """What ``scoring_rows`` scores with the same limit."""
    documents = _documents(heldout, limit_tokens)
    end = int(heldout.offsets[documents])
    tokens = end - documents if heldout.mask is None else int(heldout.mask[:end].sum())
    return Scored(documents, tokens, int(heldout.bytes[:documents].sum()))


def scoring_rows(heldout: HeldOut, row: int, limit_tokens: int | None = None, batch: int = 16) -> Iterator[Rows]:
    """The rows, ``batch`` at a time; the last is filled up with rows that score nothing, so that all have one shape.

    Args:
        heldout: of a corpus.
        row: predictions in a row.
        limit_tokens: at most this many tokens, as whole documents from the front, but one document at least.
        batch: rows in each item.
    """
    bins = _packed(heldout, row, limit_tokens)
    pending: list[list[_Window]] = []
    for windows in bins:
        pending.append(windows)
        if len(pending) == batch:
            yield _filled(heldout, pending, row, batch)
            pending = []
    if pending:
        yield _filled(heldout, pending, row, batch)


def _documents(heldout: HeldOut, limit: int | None) -> int:
    count = len(heldout.offsets) - 1
    if limit is None:
        return count
    return min(count, max(1, int(np.searchsorted(heldout.offsets, limit, "right")) - 1))


def _packed(heldout: HeldOut, row: int, limit: int | None) -> Iterator[list[_Window]]:
    """Rows as lists of windows; a row closes when it is full or the oldest of 64."""
    open_rows: list[tuple[int, list[_Window]]] = []
    for document in range(_documents(heldout, limit)):
        begin, end = int(heldout.offsets[document]), int(heldout.offsets[document + 1])
        for first in range(begin, end - 1, row):
            length = min(row, end - 1 - first)
            place = next((i for i, (room, _) in enumerate(open_rows) if room >= length), None)
            if place is None:
                open_rows.append((row, []))
                place = len(open_rows) - 1
            room, windows = open_rows[place]
            windows.append((first, length, int(heldout.bytes[document]) if first == begin else 0))
            open_rows[place] = (room - length, windows)
            if room == length:
                yield open_rows.pop(place)[1]
            elif len(open_rows) > _OPEN_ROWS:
                yield open_rows.pop(0)[1]
    for _, windows in open_rows:
        yield windows


def _filled(heldout: HeldOut, bins: list[list[_Window]], row: int, batch: int) -> Rows:
    rows = empty_rows(batch, row)
    for place, windows in enumerate(bins):
        fill_row(rows, place, heldout, [(first, length) for first, length, _ in windows])
    return replace(rows, bytes=sum(size for windows in bins for _, _, size in windows))
