"""Whole documents in rows: the row index of stages that train on chats or pairs. A pure function of a corpus and a row length.

Rows of a trunk are slices of the token stream. A chat must not be cut, so here each row holds whole ones, each seeing only
itself. A document of n tokens takes the n − 1 places from which its tokens are predicted. The index is built once, in one order
for all epochs, and hashed into the stage; the data plan permutes its rows as it does any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import blake3
import numpy as np

from windtunnel.base.errors import DataError
from windtunnel.corpus.store import Corpus, TokenStream

_VERSION = b"1"


@dataclass(frozen=True)
class RowIndex:
    """Which documents stand in which row.

    ``windows`` int64 [w, 2]: first token and number of predictions; ``offsets`` int64 [rows + 1]: where each row's windows begin.
    ``scored`` counts the predictions that have a loss, ``cut`` the chats that were shortened to the answers that end within a
    row, ``left_out`` the documents that do not take part: no answer of theirs ends within one, or (pairs) they do not fit.
    """

    row: int
    windows: np.ndarray
    offsets: np.ndarray
    scored: int
    cut: int
    left_out: int

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Predictions in all rows, scored or not: what the rows hold besides padding."""
        return int(self.windows[:, 1].sum())

    @property
    def fill(self) -> float:
        """Share of the places that is not padding."""
        return self.tokens / max(1, self.rows * self.row)

    @cached_property
    def hash(self) -> str:
        """Identifies the rows and what stands in them."""
        digest = blake3.blake3(_VERSION + np.int64(self.row).tobytes())
        digest.update(np.ascontiguousarray(self.windows).tobytes())
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()

    def of(self, row: int) -> list[tuple[int, int]]:
        """The windows of one row."""
        return [(first, count) for first, count in self.windows[self.offsets[row] : self.offsets[row + 1]].tolist()]

    def facts(self) -> dict[str, Any]:
        """Exact counts, as JSON."""
        return {
            "row": self.row, "rows": self.rows, "documents": len(self.windows), "tokens": self.tokens, "scored": self.scored,
            "fill": self.fill, "cut": self.cut, "left_out": self.left_out, "hash": self.hash,
        }  # fmt: skip


def row_index(corpus: Corpus, row: int, part: str = "", long_from: int = 0) -> RowIndex:
    """The rows of a corpus' train part, packed: whole chats, both answers of a pair, texts in windows.

    Args:
        part: "long" takes only documents of at least ``long_from`` tokens, "short" only the others.

    Raises:
        DataError: no document fits.
    """
    chosen = (np.diff(corpus.train.documents) >= long_from) == (part == "long") if part else None
    index = pack_pairs(corpus.train, row) if corpus.pairs else pack(corpus.train, row, chosen)
    if not index.rows and part:
        raise DataError(
            f"corpus.{corpus.name}", f"expected {part} documents ({long_from} tokens divide them), found none"
        )
    if not index.rows:
        what = "pair of answers" if corpus.pairs else "scored token"
        raise DataError(
            f"corpus.{corpus.name}", f"expected a {what} within rows of {row} tokens, found none", "raise model.row"
        )
    return index


def length_facts(corpus: Corpus, row: int, long_from: int) -> dict[str, Any]:
    """Exact counts of a corpus' long and short documents in rows: ``RowIndex.facts`` of each part, None where a part is empty;
    ``longest`` in tokens."""
    sizes = np.diff(corpus.train.documents)
    there = {"long": bool((sizes >= long_from).any()), "short": bool((sizes < long_from).any())}
    whole = {"long": int((sizes >= long_from).sum()), "short": int((sizes < long_from).sum())}
    parts = {
        part: {**row_index(corpus, row, part, long_from).facts(), "whole": whole[part]} if some else None
        for part, some in there.items()
    }
    return {**parts, "longest": int(sizes.max(initial=0))}


def shared_by_length(
    mixture: Mapping[str, float], share: float, facts: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, float], ...]:
    """Weights of rows that give long documents a share of the *tokens*.

    Within a length, a corpus counts by its weight times its own share of tokens of that length: books give long documents,
    notes short ones, and neither reads a few of the other kind again and again.

    Args:
        facts: ``length_facts`` of each corpus; of one that is missing, both parts are assumed, with full rows.
    """
    out: dict[str, float] = {}
    for part, whole in (("long", share), ("short", 1 - share)):
        found = {name: _own_share_and_fill(facts.get(name), part) for name in mixture}
        there = {name: weight * found[name][0] for name, weight in mixture.items() if weight * found[name][0] > 0}
        for name, weight in there.items():
            out[f"{name}:{part}"] = whole * weight / sum(there.values()) / found[name][1]
    return tuple(sorted(out.items()))


def _own_share_and_fill(facts: Mapping[str, Any] | None, part: str) -> tuple[float, float]:
    """The share of a corpus' tokens that lie in a part, and how full its rows are; a half and 1 if nothing is known of it."""
    if facts is None:
        return 0.5, 1.0
    if not facts[part]:
        return 0.0, 1.0
    return facts[part]["tokens"] / sum(facts[p]["tokens"] for p in ("long", "short") if facts[p]), facts[part]["fill"]


def pack(stream: TokenStream, row: int, chosen: np.ndarray | None = None) -> RowIndex:
    """Documents packed into rows by best fit, longest first (Johnson 1973: at most 11/9 of the fewest rows, and a little).

    A chat (a stream with a mask) longer than a row keeps the answers that end within it, and is left out if none does: from an
    answer without its end a model learns not to end. A longer text is divided into windows that see only themselves (as the
    released trainer of arXiv 2404.06395 does with both). With ``chosen``, bool [documents], the others do not take part.
    """
    begins, predictions = stream.documents[:-1], np.diff(stream.documents) - 1
    if chosen is not None:
        begins, predictions = begins[chosen], predictions[chosen]
    if stream.mask is None:
        windows, scored, cut, left_out = _windows(begins, predictions, row), None, 0, 0
    else:
        counts = _whole_answers(stream, begins, predictions, row)
        sums = np.concatenate([[0], np.cumsum(stream.mask, dtype=np.int64)])
        scored = sums[begins + counts + 1] - sums[begins + 1]
        kept = scored > 0
        windows, cut, left_out = (
            np.stack([begins, counts], 1)[kept],
            int((predictions > row)[kept].sum()),
            int((~kept).sum()),
        )
    order = _best_fit(windows[:, 1], row)
    offsets = np.concatenate([[0], np.cumsum([len(members) for members in order])]).astype(np.int64)
    flat = np.array([at for members in order for at in members], np.int64)
    total = int(scored.sum()) if scored is not None else int(windows[:, 1].sum())
    return RowIndex(row, windows[flat], offsets, total, cut, left_out)


def _whole_answers(stream: TokenStream, begins: np.ndarray, predictions: np.ndarray, row: int) -> np.ndarray:
    """Predictions of each chat up to the end of the last answer that ends within a row; 0 where none does."""
    assert stream.mask is not None
    last = np.asarray(stream.mask, bool).copy()
    last[:-1] &= stream.mask[1:] == 0
    ends = np.flatnonzero(last)
    longer = predictions > row
    before = np.searchsorted(ends, begins[longer] + row, side="right") - 1
    counts = predictions.copy()
    counts[longer] = np.where(before >= 0, ends[before] if len(ends) else 0, -1) - begins[longer]
    return np.maximum(counts, 0)


def _windows(begins: np.ndarray, predictions: np.ndarray, row: int) -> np.ndarray:
    pieces = -(-predictions // row)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.stack(
        [np.repeat(begins, pieces) + number * row, np.minimum(row, np.repeat(predictions, pieces) - number * row)], 1
    )


def _best_fit(lengths: np.ndarray, row: int) -> list[list[int]]:
    """Members of each row: the longest first, each into the fullest row with room for it."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row + 1)]
    present = 0  # bit r is set where a row with r free places exists
    for at in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[at])
        fitting = present >> length
        if length and fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place = by_room[room].pop()
            if not by_room[room]:
                present &= ~(1 << room)
        else:
            place, room = len(rows), row
            rows.append([])
        rows[place].append(at)
        by_room[room - length].append(place)
        present |= 1 << (room - length)
    return rows


_PAIR = 16
"""Predictions that a pair takes at least in a row: it bounds how many stand there."""


def pairs_in(row: int) -> int:
    """The most pairs of answers that stand in a row."""
    return max(1, row // _PAIR)


def pack_pairs(stream: TokenStream, row: int) -> RowIndex:
    """Rows of pairs of windows, the better answer and the worse one after the same prompt, as documents 2i and 2i + 1 of a row,
    packed as ``pack`` does; pairs that do not fit are left out."""
    windows = np.stack([stream.documents[:-1], np.diff(stream.documents) - 1], 1)
    pairs = windows.reshape(-1, 2, 2)
    sizes = pairs[:, :, 1].sum(1)
    fits = sizes <= row
    order = _best_fit(np.minimum(row, np.maximum(_PAIR, sizes[fits])), row)
    kept = pairs[fits][np.array([at for members in order for at in members], np.int64)].reshape(-1, 2)
    offsets = 2 * np.concatenate([[0], np.cumsum([len(members) for members in order])]).astype(np.int64)
    assert stream.mask is not None
    scored = sum(int(stream.mask[first + 1 : first + count + 1].sum()) for first, count in kept.tolist())
    return RowIndex(row, kept, offsets, scored, 0, int((~fits).sum()))


def corrected(mixture: Mapping[str, float], fill: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Weights of rows that give the *token* shares a mixture asks for, where the rows of its corpora are not equally full."""
    return tuple(sorted((name, weight / fill[name]) for name, weight in mixture.items()))
