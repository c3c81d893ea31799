"""Text streams cut into documents, in bounded memory."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

MAXIMUM_DOCUMENT = 1 << 20
"""Characters; what is longer becomes several documents, so that no step ever holds more than this at once."""
AUTO_WHOLE = 32_000
AUTO_PIECE = 8_000
_CHUNK = 1 << 20


def text_pieces(stream: BinaryIO, split: str) -> Iterator[tuple[int, str]]:
    """Documents of a text file with the line each begins at.

    Bytes that are no UTF-8 arrive as lone surrogates, so that only the document they stand in is lost. Line ends become \\n
    and a byte order mark at the start is removed.
    """
    if split == "auto":
        pieces = _cut(_decoded(stream), AUTO_WHOLE, AUTO_PIECE)
    elif split == "file":
        pieces = _cut(_decoded(stream), MAXIMUM_DOCUMENT, MAXIMUM_DOCUMENT)
    else:
        pieces = _separated(_decoded(stream), split)
    line = 1
    for piece in pieces:
        if piece.strip():
            yield line, piece
        line += piece.count("\n")


def limited(text: str) -> list[str]:
    """The text itself, or its parts where it is longer than a document may be."""
    return [text] if len(text) <= MAXIMUM_DOCUMENT else list(_cut(iter([text]), MAXIMUM_DOCUMENT, MAXIMUM_DOCUMENT))


def _decoded(stream: BinaryIO) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("surrogateescape"), translate=True)
    first = True
    while True:
        raw = stream.read(_CHUNK)
        text = decoder.decode(raw, final=not raw)  # pyright: ignore[reportArgumentType]
        if first and text:
            text, first = text.lstrip("\ufeff"), False
        yield text
        if not raw:
            return


def _cut(chunks: Iterator[str], whole: int, size: int) -> Iterator[str]:
    """One piece if all is at most ``whole`` characters, else pieces of at most ``size``, cut at blank lines where possible."""
    buffer, start, cutting = "", 0, False
    for chunk in chunks:
        buffer, start = buffer[start:] + chunk, 0
        cutting = cutting or len(buffer) > whole
        while cutting and len(buffer) - start > size + size // 2:
            end = _border(buffer, start, size)
            yield buffer[start:end]
            start = end
    if buffer[start:]:
        if cutting and len(buffer) - start > size:
            end = _border(buffer, start, size)
            yield buffer[start:end]
            start = end
        yield buffer[start:]


def _border(text: str, start: int, size: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, start + size // 2, start + size - len(mark) + 1)
        if found >= 0:
            return found + len(mark)
    return start + size


def _separated(chunks: Iterator[str], mark: str) -> Iterator[str]:
    """Pieces between marks. The mark's own line ends stay with the piece before, so that line numbers hold."""
    buffer = ""
    for chunk in chunks:
        parts = (buffer + chunk).split(mark)
        buffer = parts.pop()
        for part in parts:
            yield from limited(part)
        if len(buffer) > 2 * MAXIMUM_DOCUMENT:
            *done, buffer = limited(buffer)
            yield from done
    yield from limited(buffer)
