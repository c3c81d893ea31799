"""A built corpus on disk: memory-mapped integers, document boundaries, checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.artefact import Manifest, read_json, read_manifest
from windtunnel.base.errors import ArtefactError

KIND = "corpus"
_AGAIN = "build the corpus again"


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other: ``tokens`` (uint16 or uint32), ``documents`` int64 [n+1] where each begins (and the end),
    ``mask`` uint8 or None: 1 where a token is scored when it is predicted."""

    tokens: np.ndarray
    documents: np.ndarray
    mask: np.ndarray | None


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents: ``tokens``, ``offsets`` int64 [n+1], ``bytes`` int64 [n] (UTF-8 bytes of each one's scored text)."""

    tokens: np.ndarray
    offsets: np.ndarray
    bytes: np.ndarray
    mask: np.ndarray | None


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus with its train and held-out parts."""

    name: str
    path: Path
    hash: str
    key: str
    tokenizer_hash: str
    vocab_size: int
    train: TokenStream
    heldout: HeldOut
    stats: dict[str, Any]
    config: dict[str, Any]

    @property
    def pairs(self) -> bool:
        """Whether documents come in twos: the better and the worse answer to one prompt."""
        return bool(self.config.get("chosen"))

    @property
    def tokens(self) -> int:
        """Train tokens."""
        return len(self.train.tokens)

    def rows(self, row: int) -> int:
        """How many rows of ``row`` tokens (and the next one as last target) the train part has."""
        return max(0, (self.tokens - 1) // row)


def open_corpus(path: Path, *, verify: bool = True) -> Corpus:
    """Opens a built corpus; the tokens stay on disk.

    Args:
        path: the artefact folder.
        verify: compare every file with its checksum (reads everything once).

    Raises:
        ArtefactError: none is there, or it is damaged: wrong size, wrong type, ids beyond the vocabulary.
    """
    manifest = read_manifest(path, KIND, verify=verify)
    kind = np.dtype(manifest.config["dtype"])
    if kind not in (np.dtype(np.uint16), np.dtype(np.uint32)):
        raise ArtefactError(str(path), f"expected tokens as uint16 or uint32, found {kind}", _AGAIN)
    stats = read_json(path / "stats.json")
    scored = manifest.config["masked"]
    train = TokenStream(*_part(path, manifest, "train", kind, scored))
    tokens, offsets, mask = _part(path, manifest, "heldout", kind, scored)
    sizes = np.fromfile(path / "heldout.bytes.bin", np.int64)
    if len(sizes) != len(offsets) - 1:
        raise ArtefactError(
            str(path / "heldout.bytes.bin"), f"expected {len(offsets) - 1} sizes, found {len(sizes)}", _AGAIN
        )
    config = manifest.config
    return Corpus(
        config["name"], path, manifest.hash, config["key"], config["tokenizer"], config["vocab"], train,
        HeldOut(tokens, offsets, sizes, mask), stats, config["corpus"],
    )  # fmt: skip


def _part(
    path: Path, manifest: Manifest, side: str, kind: np.dtype[Any], scored: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    tokens = _mapped(path / f"{side}.tokens.bin", kind)
    offsets = np.fromfile(path / f"{side}.documents.bin", np.int64)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any():
        raise ArtefactError(str(path / f"{side}.documents.bin"), f"expected boundaries up to {len(tokens)}", _AGAIN)
    vocab = manifest.config["vocab"]
    highest = manifest.config["highest_id"]
    if highest >= vocab:
        raise ArtefactError(str(path / f"{side}.tokens.bin"), f"expected ids below {vocab}, found {highest}", _AGAIN)
    mask = _mapped(path / f"{side}.mask.bin", np.dtype(np.uint8)) if scored else None
    if mask is not None and len(mask) != len(tokens):
        raise ArtefactError(str(path / f"{side}.mask.bin"), f"expected {len(tokens)} flags, found {len(mask)}", _AGAIN)
    return tokens, offsets, mask


def _mapped(path: Path, kind: np.dtype[Any]) -> np.ndarray:
    if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % kind.itemsize:
        raise ArtefactError(str(path), f"expected whole values of {kind.itemsize} bytes", _AGAIN)
    return np.memmap(path, kind, mode="r")
