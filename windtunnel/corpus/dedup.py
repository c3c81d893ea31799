"""Exact and near duplicates, and overlap with test sets.

Near duplicates are found with MinHash: 14 bands of 8 minima each over 5-word shingles (Broder 1997; the setting of FineWeb,
arXiv 2406.17557, section 3.4), which proposes 92 % of the pairs at a Jaccard similarity of .8; each proposed pair is then
compared exactly. Of each connected group the first document in reading order stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from windtunnel.corpus.shingles import mix, sequences, shingles, word_hashes

SHINGLE = 5
BANDS, ROWS = 14, 8
SIMILAR = 0.8
GRAM = 13
_LOTS = 1 << 16
_REMEMBERED = 1 << 20


def band_keys(texts: Sequence[bytes]) -> np.ndarray:
    """The keys of all bands, uint64 [texts, BANDS]; texts with a key in common are candidates. Wordless texts have key 0."""
    hashes, runs = shingles(*word_hashes(texts), SHINGLE)
    keys = np.zeros((len(texts), BANDS), np.uint64)
    filled = np.flatnonzero(runs)
    if not len(filled):
        return keys
    starts = (np.cumsum(runs) - runs)[filled]
    multipliers, offsets = _permutations()
    minima = np.empty((BANDS * ROWS, len(filled)), np.uint64)
    for row in range(BANDS * ROWS):
        minima[row] = np.minimum.reduceat(hashes * multipliers[row] + offsets[row], starts)
    for band in range(BANDS):
        key = np.full(len(filled), band + 1, np.uint64)
        for row in range(ROWS):
            key = mix(key * np.uint64(3) + minima[band * ROWS + row])
        keys[filled, band] = np.maximum(key, np.uint64(1))
    return keys


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and offsets: each x → a·x + b is a bijection of uint64, fixed for ever."""
    numbers = mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return numbers[: BANDS * ROWS] | np.uint64(1), numbers[BANDS * ROWS :]


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each document the index of the first with the same hash (its own where it is the first), int64 [n].

    Args:
        hashes: uint64 [n, 2].
    """
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
    return first


class _Groups:
    """Union-find whose representative is the smallest index."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, item: int) -> int:
        root = item
        while (up := self.parent.get(root, root)) != root:
            root = up
        while (up := self.parent.get(item, item)) != root:
            self.parent[item], item = root, up
        return root

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self.parent[b] = a


def near_duplicates(keys: Path | np.ndarray, alive: np.ndarray, read: Callable[[int], bytes]) -> dict[int, int]:
    """For each near duplicate the first document of its group.

    Args:
        keys: the band keys, uint64 [n, BANDS], in memory or as a raw file.
        alive: which documents take part, bool [n].
        read: the text of a document.
    """
    groups = _Groups()
    differing: set[tuple[int, int]] = set()
    index = np.flatnonzero(alive)
    for band in range(BANDS):
        column = _column(keys, band, len(alive))[index]
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        for place in np.flatnonzero(np.diff(edges) > 1):
            begin, end = edges[place], edges[place + 1]
            if ordered[begin]:
                _compare(index[order[begin:end]].tolist(), groups, differing, read)
    return {item: groups.find(item) for item in sorted(groups.parent)}


def _compare(
    members: list[int], groups: _Groups, differing: set[tuple[int, int]], read: Callable[[int], bytes]
) -> None:
    """Joins the members of one bucket that are similar to its first."""
    first, *others = members
    mine: np.ndarray | None = None
    for other in others:
        if (first, other) in differing or groups.find(first) == groups.find(other):
            continue
        mine = _shingle_set(read(first)) if mine is None else mine
        if jaccard(mine, _shingle_set(read(other))) >= SIMILAR:
            groups.join(first, other)
        else:
            if len(differing) >= _REMEMBERED:
                differing.clear()  # only saves comparing a pair again that shares another band
            differing.add((first, other))


def _shingle_set(text: bytes) -> np.ndarray:
    return np.unique(shingles(*word_hashes([text]), SHINGLE)[0])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared over all elements of two sorted sets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


def _column(keys: Path | np.ndarray, band: int, count: int) -> np.ndarray:
    if isinstance(keys, np.ndarray):
        return keys[:, band]
    column = np.empty(count, np.uint64)
    with keys.open("rb") as stream:
        for begin in range(0, count, _LOTS):
            rows = min(_LOTS, count - begin)
            block = np.frombuffer(stream.read(rows * BANDS * 8), np.uint64).reshape(rows, BANDS)
            column[begin : begin + rows] = block[:, band]
    return column


class TestSets:
    """All 13-word sequences of the listed test sets."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        hashes, runs = sequences(*word_hashes(encoded), GRAM)
        self.texts = texts
        self.too_short = int((runs == 0).sum())
        owners = np.repeat(np.arange(len(texts)), runs)
        self._grams, first = np.unique(hashes, return_index=True)
        self._owners = owners[first]

    def hits(self, documents: Sequence[bytes]) -> np.ndarray:
        """For each document the index of a test text that it shares 13 words in a row with, or −1; int64 [documents]."""
        found = np.full(len(documents), -1, np.int64)
        hashes, runs = sequences(*word_hashes(documents), GRAM)
        if not len(self._grams) or not len(hashes):
            return found
        places = np.minimum(np.searchsorted(self._grams, hashes), len(self._grams) - 1)
        shared = np.flatnonzero(self._grams[places] == hashes)
        documents_of = np.repeat(np.arange(len(documents)), runs)[shared]
        found[documents_of[::-1]] = self._owners[places[shared[::-1]]]
        return found
