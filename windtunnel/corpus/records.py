"""From the bytes of one file to documents: text pieces, or records turned to text or chats."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.fields import Document, Fields, record_reader
from windtunnel.corpus.files import Damaged, File
from windtunnel.corpus.pieces import limited, text_pieces
from windtunnel.corpus.templates import RecordError, is_template

MAXIMUM_LINE = 1 << 26
MAXIMUM_JSON = 1 << 28


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be used: where it stands, what is wrong, what to do."""

    where: str
    problem: str
    fix: str = ""


def documents_of(file: File, kind: str, config: SourceConfig) -> Iterator[Document | Bad]:
    """The documents of one file; each record gives at least one document or exactly one ``Bad``.

    A stream that breaks off gives one ``Bad`` for all that is lost with it.
    """
    try:
        if kind in ("text", "markdown"):
            yield from _text_documents(file, config)
        else:
            extract = record_reader(config)
            for where, record in _records(file, kind, config):
                yield from extracted(extract, where, record)
    except Damaged as error:
        yield Bad(file.name, str(error), "fetch or compress the file again")


def extracted(extract: Callable[[Fields, str], Document], where: str, record: Fields | Bad) -> Iterator[Document | Bad]:
    """The document of one record, in parts where it is longer than a document may be, or why there is none."""
    if isinstance(record, Bad):
        yield record
        return
    try:
        document = extract(record, where)
    except RecordError as error:
        problem, _, fix = str(error).partition("; ")
        yield Bad(where, problem, fix)
        return
    problem = text_problem(document.text)
    if problem:
        yield Bad(where, problem)
        return
    if document.messages is not None:
        yield document
        return
    for number, part in enumerate(limited(document.text)):
        yield Document(part, document.id if number == 0 else f"{document.id}#{number}", None, number, document.group)


def text_problem(text: str) -> str:
    """Why a string is no text, or an empty string."""
    if "\0" in text:
        return "it holds NUL characters (a binary file, or UTF-16)"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            if 0xDC80 <= code <= 0xDCFF:
                return f"expected UTF-8, found the byte 0x{code - 0xDC00:02x}"
            return f"it holds half of a surrogate pair (U+{code:04X})"
    return ""


def _text_documents(file: File, config: SourceConfig) -> Iterator[Document | Bad]:
    with file.open() as stream:
        for line, text in text_pieces(stream, config.split):
            where = file.name if line == 1 else f"{file.name} line {line}"
            problem = text_problem(text)
            if problem:
                at = next((i for i, c in enumerate(text) if c == "\0" or 0xD800 <= ord(c) <= 0xDFFF), 0)
                where = f"{file.name} line {line + text.count(chr(10), 0, at)}"
                yield Bad(where, problem, "convert it, for example with iconv -t UTF-8")
            else:
                yield Document(text, where)


def _records(file: File, kind: str, config: SourceConfig) -> Iterator[tuple[str, Fields | Bad]]:
    with file.open() as stream:
        if kind == "jsonl":
            yield from _lines(file, stream)
        elif kind == "json":
            yield from _json(file, stream, config)
        else:
            yield from _parquet(file, stream)


def _lines(file: File, stream: BinaryIO) -> Iterator[tuple[str, Fields | Bad]]:
    number = 0
    while raw := stream.readline(MAXIMUM_LINE):
        number += 1
        where = f"{file.name} line {number}"
        if len(raw) == MAXIMUM_LINE and not raw.endswith(b"\n"):
            while (more := stream.readline(MAXIMUM_LINE)) and not more.endswith(b"\n"):
                pass
            yield where, Bad(where, f"expected lines of at most {MAXIMUM_LINE >> 20} MiB, found a longer one")
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        yield where, _parsed(raw, where)


def _parsed(raw: bytes, where: str) -> Fields | Bad:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return Bad(where, f"expected UTF-8, found the byte 0x{raw[error.start]:02x}")
    except json.JSONDecodeError as error:
        if b"\0" in raw:
            return Bad(where, "it holds NUL bytes")
        return Bad(where, f"expected a JSON object, found a broken line ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):
        return Bad(where, "expected a JSON object, found one with too deep nesting or too large numbers")
    if not isinstance(value, dict):
        return Bad(where, f"expected a JSON object, found a {type(value).__name__}")
    return cast(dict[str, Any], value)


def _json(file: File, stream: BinaryIO, config: SourceConfig) -> Iterator[tuple[str, Fields | Bad]]:
    """Records of a list, or of a dictionary whose keys become the field ``key``."""
    raw = stream.read(MAXIMUM_JSON + 1)
    if len(raw) > MAXIMUM_JSON:
        raise Damaged(
            f"expected a JSON file of at most {MAXIMUM_JSON >> 20} MiB, found a larger one; convert it to JSONL"
        )
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Damaged(f"expected UTF-8, found the byte 0x{raw[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise Damaged(f"expected JSON, found broken text in line {error.lineno} ({error.msg})") from None
    except (ValueError, RecursionError):
        raise Damaged("expected JSON, found too deep nesting or too large numbers") from None
    if isinstance(value, dict):
        table = cast(dict[str, Any], value)
        if config.text in table and not is_template(config.text) and isinstance(table[config.text], str):
            yield file.name, table
            return
        items = [(f"{file.name} key {key!r}", {"key": key}, item) for key, item in table.items()]
    elif isinstance(value, list):
        items = [(f"{file.name} item {i}", {}, item) for i, item in enumerate(cast(list[Any], value), 1)]
    else:
        raise Damaged(f"expected a list or dictionary of records, found a {type(value).__name__}")
    for where, extra, item in items:
        if isinstance(item, dict):
            yield where, {**extra, **cast(dict[str, Any], item)}
        elif isinstance(item, str):
            yield where, {**extra, "text": item}
        else:
            yield where, Bad(where, f"expected a record (an object), found a {type(item).__name__}")


def _parquet(file: File, stream: BinaryIO) -> Iterator[tuple[str, Fields | Bad]]:
    source = stream if stream.seekable() and not file.suffixes[1] else io.BytesIO(stream.read())
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
        for batch in table.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"expected a parquet file, found a damaged or truncated one ({reason})") from None
