"""Words and word sequences as 64-bit hashes, vectorised over the bytes of many documents.

A word is a run of letters and digits (ASCII in lower case; other scripts byte for byte; a Chinese or Japanese character is a
word of its own). Its hash is a polynomial in its bytes, computed for all words at once from prefix sums modulo 2^64: the sum
up to the end minus the sum up to the start, times the inverse power of the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_STEP = 0xD6E8FEB86659FD93
_PIECE = 1 << 18


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits all depend on all input bits."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse modulo 2^64, for positions below 2^bits."""
    both: list[np.ndarray] = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        powers = np.ones(1, np.uint64)
        factor = base
        for _ in range(bits):
            powers = np.concatenate([powers, powers * np.uint64(factor)])
            factor = factor * factor % (1 << 64)
        both.append(powers)
    return both[0], both[1]


@lru_cache(maxsize=1)
def _letters() -> np.ndarray:
    """For each byte its value within a word, 0 for a byte between words."""
    table = np.zeros(256, np.uint64)
    for byte in range(256):
        if byte >= 0x80 or chr(byte).isalnum():
            table[byte] = (byte | 0x20 if 0x41 <= byte <= 0x5A else byte) + 1
    return table


def word_hashes(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all words, uint64 [words], and the number of words of each text, int64 [texts]."""
    hashes: list[np.ndarray] = []
    counts = np.zeros(len(texts), np.int64)
    begin, size = 0, 0
    for index in range(len(texts) + 1):
        if index == len(texts) or (size + len(texts[index]) + 1 > _PIECE and index > begin):
            if index > begin:
                found, counts[begin:index] = _word_hashes(texts[begin:index])
                hashes.append(found)
            begin, size = index, 0
        if index < len(texts):
            size += len(texts[index]) + 1
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64), counts


def _word_hashes(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(b"\n" + b"\n".join(texts) + b"\n\n\n", np.uint8)
    values = _letters()[data]
    inside = values != 0
    wide = (data >= 0xE3) & (data <= 0xE9)  # lead bytes of three-byte characters from U+3000 to U+9FFF
    first = np.zeros(len(data) + 1, bool)
    first[1:-1] = inside[1:] & ~inside[:-1]
    first[:-1] |= wide
    first[3:-1] |= wide[:-3] & inside[3:]  # whatever follows a wide character begins anew
    starts = np.flatnonzero(first[:-1])
    last = np.zeros(len(data) + 1, bool)
    last[1:-1] = inside[:-1] & (~inside[1:] | first[1:-1])
    ends = np.flatnonzero(last[:-1])
    forward, backward = _powers(max(18, len(data).bit_length()))
    total = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(values * forward[: len(data)], out=total[1:])
    hashes = mix((total[ends] - total[starts]) * backward[starts])
    borders = np.cumsum([0, *(len(text) + 1 for text in texts)]) + 1
    return hashes, np.diff(np.searchsorted(starts, borders))


def sequences(words: np.ndarray, counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of ``length`` words within each text.

    Returns:
        uint64 [runs] and runs of each text, int64 [texts]: words − length + 1, or none for shorter texts.
    """
    runs = np.maximum(counts - length + 1, 0)
    if len(words) < length:
        return np.zeros(0, np.uint64), np.zeros_like(counts)
    total = len(words) - length + 1
    hashes = np.zeros(total, np.uint64)
    for offset in range(length):
        hashes *= np.uint64(_STEP)
        hashes += words[offset : offset + total]
    last = np.cumsum(counts)
    # a run beginning at a text's last length − 1 words would reach into the next text
    remaining = np.repeat(last, counts)[:total] - np.arange(total)
    return mix(hashes[remaining >= length]), runs


def shingles(words: np.ndarray, counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """``sequences``, but a text shorter than ``length`` has one shingle of all its words (none if it has no words)."""
    hashes, runs = sequences(words, counts, length)
    short = np.flatnonzero((runs == 0) & (counts > 0))
    if not len(short):
        return hashes, runs
    begin = np.cumsum(counts) - counts
    extra = np.zeros(len(short), np.uint64)
    for offset in range(length - 1):
        longer = counts[short] > offset
        extra[longer] = extra[longer] * np.uint64(_STEP) + words[begin[short[longer]] + offset]
    places = (np.cumsum(runs) - runs)[short]
    filled = runs.copy()
    filled[short] = 1
    return np.insert(hashes, places, mix(extra)), filled
