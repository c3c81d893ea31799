"""Rows of tokens for training: what the data plan says stands at a position, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from windtunnel.base.errors import DataError
from windtunnel.corpus.mixture import DataPlan, corpus_of, locate
from windtunnel.corpus.packing import RowIndex, row_index
from windtunnel.corpus.store import Corpus, HeldOut, TokenStream
from windtunnel.corpus.tokenizer import Tokenizer

IGNORED = -100
"""The target of a position that is not scored."""


@dataclass(frozen=True)
class Rows:
    """``inputs`` and ``targets`` int64 [count, row] (−100 where not scored), ``documents`` int32 [count, row]: the number of the
    document within the row, counted from 0. For scoring, ``bytes`` is the UTF-8 size of the documents that begin here.
    ``values`` float32 [count, k] is what an objective wants to know of each row beside its tokens."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    bytes: int = 0
    values: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, first: int, count: int) -> Rows:
        """The rows ``first`` … ``first + count − 1``; ``bytes`` cannot be divided and stays with the whole."""
        end = first + count
        values = None if self.values is None else self.values[first:end]
        return Rows(self.inputs[first:end], self.targets[first:end], self.documents[first:end], values=values)


class Loader:
    """Reads rows at any position; holds no state, so that any division into calls, workers or ranks gives the same stream."""

    def __init__(
        self, plan: DataPlan, corpora: Mapping[str, Corpus], values: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Raises DataError where a corpus of the plan is missing, the corpora have different tokenizers, or a row index is
        not the one that the plan names. ``values`` float32 [rows of the corpus, k] go into ``Rows.values``."""
        missing = [corpus_of(name) for name in plan.corpora if corpus_of(name) not in corpora]
        if missing:
            problem = f"expected one of the corpora {', '.join(corpora)}, got another"
            raise DataError(f"mixture.{missing[0]}", problem, "check the name")
        self.plan = plan
        self._corpora = [corpora[corpus_of(name)] for name in plan.corpora]
        tokenizers = {corpus.tokenizer_hash for corpus in self._corpora}
        if len(tokenizers) > 1:
            raise DataError(
                "mixture", "expected corpora of one tokenizer, got several", "build them again with one tokenizer"
            )
        self.tokenizer = next(iter(tokenizers), "")
        self.indices = {name: _index(corpora[corpus_of(name)], plan, name, wanted) for name, wanted in plan.packed}
        self.rows_of = {
            name: self.indices[name].rows if name in self.indices else corpora[name].rows(plan.row)
            for name in plan.corpora
        }
        self._values = values

    def rows(self, start: int, count: int) -> Rows:
        """The rows at the sequences ``start`` … ``start + count − 1``.

        Raises:
            DataError: a corpus is smaller than one row.
        """
        which, places = locate(self.plan, self.rows_of, start, count)
        return self._packed(which, places) if self.indices else self._sliced(which, places)

    def _sliced(self, which: np.ndarray, places: np.ndarray) -> Rows:
        row, count = self.plan.row, len(which)
        tokens = np.empty((count, row + 1), np.int64)
        scored = np.ones((count, row + 1), bool)
        for index, corpus in enumerate(self._corpora):
            chosen = np.flatnonzero(which == index)
            for at, begin in zip(chosen.tolist(), (places[chosen] * row).tolist(), strict=True):
                tokens[at] = corpus.train.tokens[begin : begin + row + 1]
                if corpus.train.mask is not None:
                    scored[at] = corpus.train.mask[begin : begin + row + 1]
        return as_rows(tokens, scored)

    def _packed(self, which: np.ndarray, places: np.ndarray) -> Rows:
        rows = empty_rows(len(which), self.plan.row)
        names = self.plan.corpora
        for at, (corpus, place) in enumerate(zip(which.tolist(), places.tolist(), strict=True)):
            fill_row(rows, at, self._corpora[corpus].train, self.indices[names[corpus]].of(place))
        if self._values is None:
            return rows
        found = [self._values[names[c]][place] for c, place in zip(which.tolist(), places.tolist(), strict=True)]
        return Rows(rows.inputs, rows.targets, rows.documents, values=np.array(found, np.float32))


def _index(corpus: Corpus, plan: DataPlan, name: str, wanted: str) -> RowIndex:
    index = row_index(corpus, plan.row, name.partition(":")[2], plan.long_from)
    if index.hash != wanted:
        problem = f"expected the row index {wanted[:10]}, found {index.hash[:10]}"
        raise DataError(f"corpus.{corpus.name}", problem, "run the command again: the corpus was built anew")
    return index


def empty_rows(count: int, row: int) -> Rows:
    """Rows of padding that score nothing."""
    inputs = np.full((count, row), Tokenizer.pad_id, np.int64)
    return Rows(inputs, np.full((count, row), IGNORED, np.int64), np.zeros((count, row), np.int32))


def fill_row(rows: Rows, at: int, stream: TokenStream | HeldOut, windows: Sequence[tuple[int, int]]) -> None:
    """Writes windows (first token, predictions) one after the other into a row, a document number for each, one for the rest."""
    end = 0
    for number, (first, count) in enumerate(windows):
        run = stream.tokens[first : first + count + 1].astype(np.int64)
        here = slice(end, end + count)
        rows.inputs[at, here] = run[:-1]
        scored = True if stream.mask is None else stream.mask[first + 1 : first + count + 1] == 1
        rows.targets[at, here] = np.where(scored, run[1:], IGNORED)
        rows.documents[at, here] = number
        end += count
    rows.documents[at, end:] = len(windows)


def as_rows(tokens: np.ndarray, scored: np.ndarray) -> Rows:
    """Inputs, targets and document numbers of token runs, int64 [count, row + 1]; a begin of document is never a target."""
    begins = tokens == Tokenizer.bos_id
    targets = np.where(scored[:, 1:] & ~begins[:, 1:], tokens[:, 1:], IGNORED)
    documents = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
    documents -= documents[:, :1].copy()
    return Rows(np.ascontiguousarray(tokens[:, :-1]), targets, documents)
