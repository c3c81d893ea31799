"""The data plan: which row of which corpus is read at which position. A pure function of (seed, plan, sequence index).

Positions count sequences, never steps. A segment gives each corpus a weight; as all rows are equally long, the share of
sequences is the share of tokens. The order is even rather than random: after n sequences of a segment each corpus has come
up within a sequence or two of its weight times n. Each corpus is read in a permutation of its rows, a new one for each
epoch, and what was read in earlier segments counts: nothing is read twice before everything was read once. A branch
inherits its parent's segments and adds its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.corpus.permutation import name_key, permuted

_BITS = 24
"""Weights are whole multiples of 2^-24 of their parent's; sequence indices stay below 2^38 in exact arithmetic."""
LAST = 1 << 38
WARN_EPOCHS, MAXIMUM_EPOCHS = 4.0, 40.0
"""Repeating text four times costs little, and after about forty times nothing is gained (arXiv 2305.16264, section 5)."""


def corpus_of(name: str) -> str:
    """The corpus of a name in a mixture: NAME of NAME:long and NAME:short."""
    return name.partition(":")[0]


@dataclass(frozen=True)
class Segment:
    """From the sequence ``start`` on, corpora are mixed by these weights (any positive scale)."""

    start: int
    mixture: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class DataPlan:
    """Seed, tokens in a row, and the segments in order; the first begins at 0.

    ``packed`` pairs each corpus with the hash of its row index where rows hold whole documents; empty where rows are slices.
    With ``long_from``, a corpus may stand as two parts, NAME:long with its documents of at least so many tokens and NAME:short
    with the others.
    """

    seed: int
    row: int
    segments: tuple[Segment, ...]
    packed: tuple[tuple[str, str], ...] = ()
    long_from: int = 0

    def __post_init__(self) -> None:
        if self.row < 1:
            raise RecipeError("data.row", f"expected a positive number of tokens, got {self.row}")
        starts = [segment.start for segment in self.segments]
        if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise RecipeError("data.segments", f"expected starts that rise from 0, got {starts}")
        for segment in self.segments:
            _check_mixture(segment.mixture)

    @property
    def corpora(self) -> tuple[str, ...]:
        """All corpora in the order of their first mention; ``locate`` counts in it. Extending keeps earlier places."""
        return tuple(dict.fromkeys(name for segment in self.segments for name, _ in segment.mixture))

    def extended(self, at: int, mixture: tuple[tuple[str, float], ...] | Mapping[str, float]) -> DataPlan:
        """The plan of a branch: as here before the sequence ``at``, with another mixture from there on."""
        mixture = tuple(mixture.items()) if isinstance(mixture, Mapping) else tuple(mixture)
        if at < 0:
            raise RecipeError("data.segments", f"expected a sequence from 0 on, got {at}")
        kept = tuple(segment for segment in self.segments if segment.start < at)
        if kept and kept[-1].mixture == mixture:
            return replace(self, segments=kept)
        return replace(self, segments=(*kept, Segment(at, mixture)))

    def to_dict(self) -> dict[str, Any]:
        segments = [
            {"start": s.start, "mixture": [[name, weight] for name, weight in s.mixture]} for s in self.segments
        ]
        packed = {"packed": dict(self.packed)} if self.packed else {}  # absent in plans of slices, whose keys stay
        parts = {"long_from": self.long_from} if self.long_from else {}
        return {"seed": self.seed, "row": self.row, "segments": segments, **packed, **parts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataPlan:
        segments = tuple(Segment(s["start"], tuple((n, float(w)) for n, w in s["mixture"])) for s in values["segments"])
        packed = tuple(sorted(values.get("packed", {}).items()))
        return cls(values["seed"], values["row"], segments, packed, values.get("long_from", 0))

    def counts(self, until: int) -> dict[str, int]:
        """How many sequences of each corpus lie before the sequence ``until``."""
        total = dict.fromkeys(self.corpora, 0)
        for position, segment in enumerate(self.segments):
            end = min(until, _end(self, position))
            if end > segment.start:
                for name, count in _Split(segment.mixture).counts(end - segment.start).items():
                    total[name] += count
        return total

    def epochs(self, rows: Mapping[str, int], until: int) -> dict[str, float]:
        """How many times each corpus is read before the sequence ``until``; rows from ``Corpus.rows(plan.row)``."""
        return {name: count / rows[name] if rows.get(name) else math.inf * count if count else 0.0
                for name, count in self.counts(until).items()}  # fmt: skip


def check_epochs(plan: DataPlan, rows: Mapping[str, int], until: int, maximum: float = MAXIMUM_EPOCHS) -> list[str]:
    """Warnings for corpora that are read more than four times before the sequence ``until``.

    Raises:
        DataError: a corpus has not even one row, or would be read more than ``maximum`` times.
    """
    warnings: list[str] = []
    for name, epochs in plan.epochs(rows, until).items():
        if epochs > maximum:
            held = f"{rows.get(name, 0) * plan.row:,} tokens in rows of {plan.row}"
            asked = f"{plan.counts(until)[name] * plan.row:,}"
            raise DataError(f"corpus.{name}", f"the corpus is too small: {held} for the {asked} asked, {epochs:.3g} times each",
                            "give more text, lower its weight or ask for fewer tokens")  # fmt: skip
        if epochs > WARN_EPOCHS:
            much = f"corpus '{name}' is read {epochs:.1f} times"
            warnings.append(f"{much}; beyond {WARN_EPOCHS:g} times repeated text teaches less")
    return warnings


def locate(plan: DataPlan, rows: Mapping[str, int], start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stand at the sequences ``start`` … ``start + count − 1``.

    Args:
        plan: the data plan.
        rows: rows of each corpus.
        start, count: sequence indices; the cost does not depend on ``start``.

    Returns:
        the corpus of each sequence as index into ``plan.corpora``, int64 [count], and the row in it, int64 [count].

    Raises:
        DataError: a corpus that is to be read has no rows.
    """
    if start < 0 or count < 0 or start + count > LAST:
        raise ValueError(f"sequences {start} … {start + count} are outside 0 … {LAST}")
    names = plan.corpora
    places = {name: place for place, name in enumerate(names)}
    corpus = np.zeros(count, np.int64)
    ordinal = np.zeros(count, np.int64)
    read = dict.fromkeys(names, 0)
    for position, segment in enumerate(plan.segments):
        end = _end(plan, position)
        if segment.start >= start + count:
            break
        split = _Split(segment.mixture)
        begin = max(start, segment.start)
        stop = min(start + count, end)
        if begin < stop:
            which, nth = split.draw(np.arange(begin - segment.start, stop - segment.start, dtype=np.int64))
            own = np.array([places[name] for name in split.names], np.int64)
            before = np.array([read[name] for name in split.names], np.int64)
            corpus[begin - start : stop - start] = own[which]
            ordinal[begin - start : stop - start] = nth + before[which]
        if end < start + count:
            for name, number in split.counts(end - segment.start).items():
                read[name] += number
    return corpus, _rows(plan, rows, names, corpus, ordinal)


def _rows(
    plan: DataPlan, rows: Mapping[str, int], names: tuple[str, ...], corpus: np.ndarray, ordinal: np.ndarray
) -> np.ndarray:
    result = np.zeros(len(corpus), np.int64)
    for place in np.unique(corpus).tolist():
        name = names[place]
        size = rows.get(name, 0)
        if size < 1:
            raise DataError(
                f"corpus.{name}", f"the corpus is too small for one row of {plan.row} tokens", "give more text"
            )
        chosen = np.flatnonzero(corpus == place)
        result[chosen] = permuted(ordinal[chosen] % size, size, plan.seed, name_key(name), ordinal[chosen] // size)
    return result


def _end(plan: DataPlan, position: int) -> int:
    return plan.segments[position + 1].start if position + 1 < len(plan.segments) else LAST


def _check_mixture(mixture: tuple[tuple[str, float], ...]) -> None:
    names = [name for name, _ in mixture]
    if len(set(names)) != len(names):
        raise RecipeError("mixture", f"expected each corpus once, got {', '.join(names)}")
    for name, weight in mixture:
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"mixture.{name}", f"expected a weight of 0 or more, got {weight}")
    if not any(weight > 0 for _, weight in mixture):
        problem = "expected at least one corpus with a positive weight, got none"
        raise RecipeError("mixture", problem, "name a corpus and a weight")


class _Split:
    """Deals out sequences by weight: a binary tree, at each of whose nodes the left side gets ⌊share · n + ½⌋ of the first n.

    Both sides' counts rise by 0 or 1, so each sequence has one place; everything is exact integer arithmetic.
    """

    def __init__(self, mixture: tuple[tuple[str, float], ...]) -> None:
        present = [(name, weight) for name, weight in mixture if weight > 0]
        self.names = [name for name, _ in present]
        self._weights = [weight for _, weight in present]

    def draw(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sequences of the segment: which corpus (index into ``names``) and how many of it came before, int64 [n] each."""
        which = np.zeros_like(index)
        nth = np.zeros_like(index)
        self._draw(0, len(self.names), index, np.arange(len(index)), which, nth)
        return which, nth

    def _draw(
        self, first: int, last: int, index: np.ndarray, at: np.ndarray, which: np.ndarray, nth: np.ndarray
    ) -> None:
        if not len(at):
            return
        if last - first == 1:
            which[at], nth[at] = first, index
            return
        middle = (first + last) // 2
        share = self._share(first, middle, last)
        before = _dealt(index, share)
        left = _dealt(index + 1, share) > before
        self._draw(first, middle, before[left], at[left], which, nth)
        self._draw(middle, last, (index - before)[~left], at[~left], which, nth)

    def counts(self, length: int) -> dict[str, int]:
        """How many of the first ``length`` sequences each corpus gets."""
        result: dict[str, int] = {}

        def deal(first: int, last: int, number: int) -> None:
            if last - first == 1:
                result[self.names[first]] = number
                return
            middle = (first + last) // 2
            left = _dealt(number, self._share(first, middle, last))
            deal(first, middle, left)
            deal(middle, last, number - left)

        deal(0, len(self.names), length)
        return result

    def _share(self, first: int, middle: int, last: int) -> int:
        share = round(math.fsum(self._weights[first:middle]) / math.fsum(self._weights[first:last]) * (1 << _BITS))
        return min(max(share, 1), (1 << _BITS) - 1)


def _dealt(number: Any, share: int) -> Any:
    return (number * share + (1 << (_BITS - 1))) >> _BITS
