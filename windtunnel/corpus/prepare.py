"""From a source to cleaned, deduplicated, split documents on disk, in bounded memory.

The text goes to one spool file in reading order; what is decided about each document (dropped by which step, train or held out)
is kept in a small table beside it. Both the tokenizer and the corpus are built from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import blake3
import numpy as np

from windtunnel.base.artefact import content_hash, read_json, read_manifest, write_artefact, write_json
from windtunnel.base.errors import ArtefactError, DataError
from windtunnel.corpus.chat import Message
from windtunnel.corpus.cleaning import STEPS, Dropped, clean_text
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.decontamination import read_test_sets
from windtunnel.corpus.dedup import TestSets, band_keys, exact_duplicates, near_duplicates
from windtunnel.corpus.sources import Document, Tally, read_documents, source_fingerprint

KIND = "text"
VERSION = 1
"""Part of every key: raised when the same source and configuration would give other documents."""
TRAIN, HELDOUT, DROPPED = 0, 1, 2
_BATCH_BYTES = 1 << 20
_WARN_SHARE = 0.1
_ROW = np.dtype(
    [("offset", "<i8"), ("length", "<i8"), ("hash", "<u8", 2), ("side", "<u8"), ("test", "<i4"), ("fate", "<i4")]
)
Say = Callable[[str], None]


def text_key(config: SourceConfig, fingerprint: str) -> str:
    """Identifies prepared text: content, cleaning and split."""
    kept = {k: v for k, v in config.identity().items() if k not in ("template", "loss", "heldout_tokens")}
    return content_hash(["text", VERSION, kept, fingerprint])


@dataclass(frozen=True)
class Prepared:
    """Cleaned documents on disk."""

    folder: Path
    chats: bool
    offsets: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    fate: np.ndarray
    stats: dict[str, Any]

    def select(self, fate: int) -> np.ndarray:
        """Indices of the documents of one side, in the order of their hash, int64 [n]."""
        chosen = np.flatnonzero(self.fate == fate)
        return chosen[np.lexsort((self.hashes[chosen, 1], self.hashes[chosen, 0]))]

    def batches(self, indices: np.ndarray, size: int = _BATCH_BYTES) -> Iterator[list[bytes]]:
        """The raw documents at these indices, in lists of about ``size`` bytes."""
        with (self.folder / "documents.bin").open("rb") as spool:
            batch: list[bytes] = []
            total = 0
            for index in indices:  # no lists of all offsets: ten million documents would fill memory
                length = int(self.lengths[index])
                spool.seek(int(self.offsets[index]))
                batch.append(spool.read(length))
                total += length
                if total >= size:
                    yield batch
                    batch, total = [], 0
            if batch:
                yield batch

    def plain(self, raw: bytes) -> str:
        """The text of a raw document (for a chat its turns' contents)."""
        return plain_text(raw, self.chats)


def plain_text(raw: bytes, chats: bool) -> str:
    return "\n".join(turn["content"] for turn in turns_of(raw)) if chats else raw.decode()


def turns_of(raw: bytes) -> list[Message]:
    return cast(list[Message], json.loads(raw))


def prepare(
    config: SourceConfig,
    out: Path,
    *,
    downloads: Path,
    base: Path,
    fingerprint: str | None = None,
    say: Say = lambda line: None,
) -> Prepared:
    """Reads, cleans, deduplicates, decontaminates and splits a source into the artefact ``out``; opens it if it is there.

    Raises:
        DataError: see ``read_documents``; also no document left, or a held-out part without a document.
    """
    fingerprint = source_fingerprint(config, downloads=downloads, base=base) if fingerprint is None else fingerprint
    key = text_key(config, fingerprint)
    try:
        return open_prepared(out, key)
    except ArtefactError:
        pass
    with write_artefact(out, KIND, {"key": key, "chats": config.chats}) as folder:
        spool = _Spool(folder, config, base)
        tally = Tally()
        spool.fill(read_documents(config, downloads=downloads, base=base, tally=tally, say=say))
        rows, dropped = spool.decide()
        stats = _stats(config, rows, dropped, tally)
        _check(config, rows, stats)
        spool.finish(rows, stats, dropped)
    for warning in stats["warnings"]:
        say(warning)
    return open_prepared(out, key)


def open_prepared(path: Path, key: str) -> Prepared:
    """Opens prepared text.

    Raises:
        ArtefactError: none is there, it is damaged, or it was made from something else.
    """
    manifest = read_manifest(path, KIND)
    if manifest.config["key"] != key:
        raise ArtefactError(str(path), "the prepared text belongs to another source or configuration")
    rows = np.fromfile(path / "table.bin", _ROW)
    stats = read_json(path / "stats.json")
    return Prepared(path, manifest.config["chats"], rows["offset"], rows["length"], rows["hash"], rows["fate"], stats)


class _Spool:
    """The spool file in the making."""

    def __init__(self, folder: Path, config: SourceConfig, base: Path) -> None:
        self.folder, self.config = folder, config
        self.dropped = {step: Dropped() for step in STEPS}
        listed = bool(config.decontaminate) and config.clean.decontaminate
        self.tests = TestSets(read_test_sets(config.decontaminate, base)) if listed else None
        self._offset = 0

    def fill(self, documents: Iterator[Document]) -> None:
        """Writes text, table rows and band keys, batch by batch."""
        with ExitStack() as stack:
            text, table, keys = (
                stack.enter_context((self.folder / name).open("wb"))
                for name in ("documents.bin", "table.bin", "keys.bin")
            )
            batch: list[tuple[bytes, bytes, str | None]] = []
            size = 0
            for document in documents:
                item = self._cleaned(document)
                if item is not None:
                    batch.append(item)
                    size += len(item[0])
                if size >= _BATCH_BYTES:
                    self._write(batch, text, table, keys)
                    batch, size = [], 0
            self._write(batch, text, table, keys)

    def _cleaned(self, document: Document) -> tuple[bytes, bytes, str | None] | None:
        """Spool bytes, plain bytes and group of a document; none if it is too short."""
        config = self.config
        turns, text = document.messages, document.text
        if config.clean.unicode:
            if turns is not None:
                turns = [Message(role=turn["role"], content=clean_text(turn["content"])) for turn in turns]
                text = "\n".join(turn["content"] for turn in turns)
            else:
                text = clean_text(text)
            if text != document.text.strip():
                self.dropped["unicode"].add(document.text, text, document.id)
        if len(text) < config.minimum_characters or (
            turns is not None and not all(t["content"].strip() for t in turns)
        ):
            self.dropped["short"].add(text, "", document.id)
            return None
        plain = text.encode()
        raw = plain if turns is None else json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()
        return raw, plain, document.group

    def _write(
        self, batch: list[tuple[bytes, bytes, str | None]], text: BinaryIO, table: BinaryIO, keys: BinaryIO
    ) -> None:
        if not batch:
            return
        raws, plains = [item[0] for item in batch], [item[1] for item in batch]
        rows = np.zeros(len(batch), _ROW)
        rows["length"] = [len(raw) for raw in raws]
        rows["offset"] = self._offset + np.cumsum(rows["length"]) - rows["length"]
        digests = b"".join(blake3.blake3(raw).digest(16) for raw in raws)
        rows["hash"] = np.frombuffer(digests, ">u8").reshape(-1, 2)
        rows["side"] = rows["hash"][:, 0]
        for place, (_, _, group) in enumerate(batch):
            if group is not None:
                rows["side"][place] = int.from_bytes(blake3.blake3(group.encode()).digest(8))
        rows["test"] = self.tests.hits(plains) if self.tests is not None else -1
        self._offset += int(rows["length"].sum())
        text.write(b"".join(raws))
        table.write(rows.tobytes())
        if self.config.clean.near:
            keys.write(band_keys(plains).tobytes())

    def decide(self) -> tuple[np.ndarray, dict[str, Dropped]]:
        """Gives every document its fate."""
        rows = np.fromfile(self.folder / "table.bin", _ROW)
        alive = np.ones(len(rows), bool)
        with (self.folder / "documents.bin").open("rb") as spool:

            def text(index: int) -> str:
                spool.seek(int(rows["offset"][index]))
                return plain_text(spool.read(int(rows["length"][index])), self.config.chats)

            def drop(step: str, twins: dict[int, int]) -> None:
                for index, kept in twins.items():
                    alive[index] = False
                    few = len(self.dropped[step].examples) < 10
                    self.dropped[step].add(text(index) if few else "", text(kept) if few else "", f"document {index}")

            if self.config.clean.exact:
                first = exact_duplicates(rows["hash"])
                twins = np.flatnonzero(first != np.arange(len(rows)))
                drop("exact", dict(zip(twins.tolist(), first[twins].tolist(), strict=True)))
            if self.config.clean.near:
                drop("near", near_duplicates(self.folder / "keys.bin", alive, lambda index: text(index).encode()))
            if self.tests is not None:
                for index in np.flatnonzero(alive & (rows["test"] >= 0)).tolist():
                    alive[index] = False
                    few = len(self.dropped["decontaminate"].examples) < 10
                    against = self.tests.texts[int(rows["test"][index])]
                    self.dropped["decontaminate"].add(text(index) if few else "", against, f"document {index}")
        heldout = rows["side"] < np.uint64(int(self.config.heldout * 2.0**64))
        rows["fate"] = np.where(alive, np.where(heldout, HELDOUT, TRAIN), DROPPED)
        return rows, self.dropped

    def finish(self, rows: np.ndarray, stats: dict[str, Any], dropped: dict[str, Dropped]) -> None:
        (self.folder / "keys.bin").unlink()
        (self.folder / "table.bin").write_bytes(rows.tobytes())
        write_json(self.folder / "stats.json", stats)
        write_json(self.folder / "examples.json", {step: dropped[step].examples for step in STEPS})


def _stats(config: SourceConfig, rows: np.ndarray, dropped: dict[str, Dropped], tally: Tally) -> dict[str, Any]:
    counts = {step: dropped[step].count for step in STEPS}
    read = len(rows) + counts["short"]
    warnings = [
        f"the cleaning step '{step}' dropped {100 * counts[step] / read:.0f} % of the documents: look at its examples"
        for step in STEPS[1:]
        if read and counts[step] > _WARN_SHARE * read
    ]
    if config.clean.decontaminate and not config.decontaminate:
        counts.pop("decontaminate")
    return {
        "records": {"good": tally.good, "bad": tally.bad, "total": tally.total, "reasons": tally.reasons},
        "documents": {
            "read": read, "kept": int((rows["fate"] != DROPPED).sum()),
            "train": int((rows["fate"] == TRAIN).sum()), "heldout": int((rows["fate"] == HELDOUT).sum()),
        },
        "changed": counts.pop("unicode"), "dropped": counts,
        "bytes": {
            "train": int(rows["length"][rows["fate"] == TRAIN].sum()),
            "heldout": int(rows["length"][rows["fate"] == HELDOUT].sum()),
        },
        "warnings": warnings,
    }  # fmt: skip


def _check(config: SourceConfig, rows: np.ndarray, stats: dict[str, Any]) -> None:
    where = ", ".join(config.source)
    documents = stats["documents"]
    if not documents["kept"]:
        reasons = stats["records"]["reasons"]
        most = f", mostly: {max(reasons, key=reasons.get)}" if reasons else ""
        found = f"{documents['read']} read, {stats['records']['bad']} damaged{most}"
        problem = f"expected text, found no document that is kept ({found})"
        raise DataError(
            where, problem, f"lower minimum_characters (now {config.minimum_characters}) or check the source"
        )
    if not documents["heldout"]:
        lowest = float(rows["side"][rows["fate"] != DROPPED].min()) / 2.0**64
        fix = f"set heldout = {np.ceil(lowest * 1000 + 1) / 1000:g} or more, or give more documents"
        if documents["kept"] == 1:
            fix = "give more documents, or set split to a text that separates documents"
        raise DataError(
            where, f"the held-out part is empty (heldout = {config.heldout:g} of {documents['kept']} documents)", fix
        )
    if not documents["train"]:
        problem = f"no document is left for training (heldout = {config.heldout:g})"
        raise DataError(where, problem, "lower heldout or give more documents")
