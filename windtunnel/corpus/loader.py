"""Rows of tokens for training: what the data plan says stands at a position, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from windtunnel.base.errors import DataError
from windtunnel.corpus.mixture import DataPlan, locate
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import Tokenizer

IGNORED = -100
"""The target of a position that is not scored."""


@dataclass(frozen=True)
class Rows:
    """``inputs`` and ``targets`` int64 [count, row] (−100 where not scored), ``documents`` int32 [count, row]: the number of the
    document within the row, counted from 0. For scoring, ``bytes`` is the UTF-8 size of the documents that begin here."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    bytes: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, first: int, count: int) -> Rows:
        """The rows ``first`` … ``first + count − 1``; ``bytes`` cannot be divided and stays with the whole."""
        end = first + count
        return Rows(self.inputs[first:end], self.targets[first:end], self.documents[first:end])


class Loader:
    """Reads rows at any position; holds no state, so that any division into calls, workers or ranks gives the same stream."""

    def __init__(self, plan: DataPlan, corpora: Mapping[str, Corpus]) -> None:
        """Raises DataError where a corpus of the plan is missing, or the corpora have different tokenizers."""
        missing = [name for name in plan.corpora if name not in corpora]
        if missing:
            problem = f"expected one of the corpora {', '.join(corpora)}, got another"
            raise DataError(f"mixture.{missing[0]}", problem, "check the name")
        self.plan = plan
        self._corpora = [corpora[name] for name in plan.corpora]
        tokenizers = {corpus.tokenizer_hash for corpus in self._corpora}
        if len(tokenizers) > 1:
            raise DataError(
                "mixture", "expected corpora of one tokenizer, got several", "build them again with one tokenizer"
            )
        self.rows_of = {name: corpora[name].rows(plan.row) for name in plan.corpora}

    def rows(self, start: int, count: int) -> Rows:
        """The rows at the sequences ``start`` … ``start + count − 1``.

        Raises:
            DataError: a corpus is smaller than one row.
        """
        row = self.plan.row
        which, places = locate(self.plan, self.rows_of, start, count)
        tokens = np.empty((count, row + 1), np.int64)
        scored = np.ones((count, row + 1), bool)
        for index, corpus in enumerate(self._corpora):
            chosen = np.flatnonzero(which == index)
            for at, begin in zip(chosen.tolist(), (places[chosen] * row).tolist(), strict=True):
                tokens[at] = corpus.train.tokens[begin : begin + row + 1]
                if corpus.train.mask is not None:
                    scored[at] = corpus.train.mask[begin : begin + row + 1]
        return as_rows(tokens, scored)


def as_rows(tokens: np.ndarray, scored: np.ndarray) -> Rows:
    """Inputs, targets and document numbers of token runs, int64 [count, row + 1]; a begin of document is never a target."""
    begins = tokens == Tokenizer.bos_id
    targets = np.where(scored[:, 1:] & ~begins[:, 1:], tokens[:, 1:], IGNORED)
    documents = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
    documents -= documents[:, :1].copy()
    return Rows(np.ascontiguousarray(tokens[:, :-1]), targets, documents)
