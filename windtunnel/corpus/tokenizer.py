"""Byte-level BPE over the ``tokenizers`` library: any Unicode string round-trips, and no text becomes a control token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from windtunnel.base.artefact import content_hash, read_manifest, write_artefact
from windtunnel.base.errors import ArtefactError, DataError
from windtunnel.corpus.tokenizer_config import SPECIAL_TOKENS

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words with at most one leading mark, digits in groups of up to three, punctuation, line ends, spaces: the pattern that
llama.cpp knows as ``llama-bpe``, so that an exported vocabulary needs no new pre-tokenizer there."""
SMALLEST = 256 + len(SPECIAL_TOKENS)
KIND = "tokenizer"


class Tokenizer:
    """Text to ids and back. Ids 0–4 are the control tokens in the order of ``SPECIAL_TOKENS``."""

    pad_id, bos_id, eos_id, im_start_id, im_end_id = range(5)

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True  # text that looks like a control token is encoded as plain text
        self._process = os.getpid()

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @cached_property
    def hash(self) -> str:
        """Identifies vocabulary, merges and pattern, however a version of the library writes them down."""
        written = json.loads(self._inner.to_str())
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in written["model"]["merges"]]
        patterns = [step.get("pattern") for step in written["pre_tokenizer"]["pretokenizers"]]
        return content_hash([written["model"]["vocab"], merges, patterns, list(SPECIAL_TOKENS)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end; never a control id."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        with self._cores():
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """``<s> text </s>`` of many texts one after the other, int64 [tokens], and the tokens of each, int64 [texts]."""
        runs = self.encode_batch(texts)
        counts = np.fromiter((len(run) + 2 for run in runs), np.int64, len(runs))
        flat = np.fromiter(chain.from_iterable(runs), np.int64, int(counts.sum()) - 2 * len(runs))
        ends = np.cumsum(counts)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        inside = np.ones(len(ids), bool)
        inside[ends - counts] = inside[ends - 1] = False
        ids[ends - counts], ids[ends - 1], ids[inside] = self.bos_id, self.eos_id, flat
        return ids, counts

    def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
        """Text of ids; control tokens are left out unless ``control``. Half a character becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not control)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, int64 [vocab]; 0 for control tokens."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            lengths[index] = 0 if index < len(SPECIAL_TOKENS) else len(token)  # byte level: one character is one byte
        return lengths

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integer type that tokens are stored in."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def to_json(self, *, add_bos: bool = False) -> str:
        """The ``tokenizer.json`` that other libraries read; with ``add_bos`` it puts ``<s>`` before each text."""
        if not add_bos:
            return self._inner.to_str()
        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", self.bos_id)]
        )
        return copy.to_str()

    def save(self, folder: Path) -> None:
        """Writes an artefact of kind ``tokenizer``."""
        config = {"vocab": self.vocab_size, "hash": self.hash, "pattern": PATTERN}
        with write_artefact(folder, KIND, config) as temporary:
            (temporary / "tokenizer.json").write_text(self._inner.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Opens a saved tokenizer.

        Raises:
            ArtefactError: no tokenizer, or a damaged one.
        """
        manifest = read_manifest(folder, KIND)
        tokenizer = cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
        if tokenizer.hash != manifest.config["hash"]:
            raise ArtefactError(str(folder), "the tokenizer does not match its recorded hash", "build it again")
        return tokenizer

    @contextmanager
    def _cores(self) -> Iterator[None]:
        """All cores for one call, one core in a forked child (its thread pool did not survive the fork).

        The variable is set only for the call: left unset, the library would warn at every later fork, and left set it would
        hang a forked child.
        """
        with parallel(os.getpid() == self._process):
            yield


@contextmanager
def parallel(wanted: bool) -> Iterator[None]:
    """Sets TOKENIZERS_PARALLELISM for a block, unless the user has set it."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true" if wanted else "false"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def train(texts: Iterable[str], vocab: int, where: str = "tokenizer.vocab") -> Tokenizer:
    """Trains a vocabulary of exactly ``vocab`` entries; a pure function of the texts' word counts.

    Raises:
        DataError: fewer than the 256 bytes and the control tokens asked for, or more than the texts can train.
    """
    if vocab < SMALLEST:
        raise DataError(
            where, f"expected at least {SMALLEST} (256 bytes and {len(SPECIAL_TOKENS)} control tokens), got {vocab}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
    )  # fmt: skip
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in texts:
            size += len(text)
            yield text

    with parallel(True):
        inner.train_from_iterator(counted(), trainer=trainer)
    found = inner.get_vocab_size()
    if found < vocab:
        raise DataError(
            where, f"expected a vocabulary of {vocab} entries, but {size:,} characters of text give only {found}",
            f"set vocab = {max(SMALLEST, found // 64 * 64)} or lower, or give more text",
        )  # fmt: skip
    return Tokenizer(inner)
