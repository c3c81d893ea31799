"""How many bytes of held-out text a token stands for, by tokenizer and corpus (arXiv 2404.06395, appendix C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from windtunnel.base.errors import DataError
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer


def compression_table(corpora: Sequence[Corpus], tokenizers: Mapping[str, Tokenizer]) -> dict[str, dict[str, float]]:
    """Bytes per token of held-out text (control tokens aside), for each tokenizer a row: each corpus and their plain average.

    Args:
        corpora: their held-out documents are decoded and encoded again.
        tokenizers: by name; the one that the corpora were built with must be among them.

    Raises:
        DataError: the corpora's own tokenizer is missing.
    """
    by_hash = {tokenizer.hash: tokenizer for tokenizer in tokenizers.values()}
    texts: dict[str, list[str]] = {}
    for corpus in corpora:
        own = by_hash.get(corpus.tokenizer_hash)
        if own is None:
            raise DataError(
                f"corpus.{corpus.name}", "the tokenizer of the corpus is missing", "list it among the tokenizers"
            )
        texts[corpus.name] = _heldout_texts(corpus, own)
    table: dict[str, dict[str, float]] = {}
    for name, tokenizer in tokenizers.items():
        row = {corpus: _bytes_per_token(documents, tokenizer) for corpus, documents in texts.items()}
        table[name] = {**row, "average": float(np.mean(list(row.values())))}
    return table


def _heldout_texts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """Held-out text between control tokens, so that a chat's turns are encoded apart as they are in training."""
    texts: list[str] = []
    for begin, end in zip(corpus.heldout.offsets[:-1].tolist(), corpus.heldout.offsets[1:].tolist(), strict=True):
        ids = corpus.heldout.tokens[begin:end]
        runs = np.split(ids, np.flatnonzero(ids < len(SPECIAL_TOKENS)))
        texts += [tokenizer.decode(run.tolist()) for run in runs]
    return [text for text in texts if text]


def _bytes_per_token(texts: list[str], tokenizer: Tokenizer) -> float:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode()) for text in texts) / max(1, tokens)
