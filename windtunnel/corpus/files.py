"""Finding and opening source files: directories, globs, wheels, and gzip, xz and zstd streams.

Whatever is wrong with a file surfaces as ``Damaged`` with a clause that says what; the caller decides whether that stops.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from windtunnel.base.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
RECORD_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
PACKED = (".gz", ".xz", ".zst", ".bz2")
_ZSTD_PIECE = 1 << 12


class Damaged(Exception):
    """A file or a part of it cannot be read; the message is a clause."""


@dataclass(frozen=True)
class File:
    """One source file: its name for people and for the suffix rules, and how to open its raw bytes."""

    name: str
    opener: Callable[[], BinaryIO]

    @property
    def suffixes(self) -> tuple[str, str]:
        """The suffix of the content and of the compression: ('.jsonl', '.gz')."""
        lower = self.name.lower()
        packed = next((p for p in PACKED if lower.endswith(p)), "")
        return os.path.splitext(lower.removesuffix(packed))[1], packed

    @property
    def format(self) -> str:
        """The format that the name suggests; text where it suggests none."""
        inner = self.suffixes[0]
        if inner in RECORD_SUFFIXES:
            return RECORD_SUFFIXES[inner]
        return "markdown" if inner in (".md", ".markdown") else "text"

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The decompressed bytes; low-level errors while reading become ``Damaged``."""
        try:
            with self.opener() as raw:
                yield _decompressed(raw, self.suffixes[1])
        except FileNotFoundError:
            raise Damaged("expected a file, found none") from None
        except EOFError:
            raise Damaged(f"the {self.suffixes[1]} stream ends too early (a truncated file)") from None
        except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, zipfile.BadZipFile) as error:
            raise Damaged(f"the compressed stream is damaged ({error})") from None
        except OSError as error:
            raise Damaged(f"it cannot be read ({error.strerror or error})") from None


class _Zstd(io.RawIOBase):
    """A zstd stream that knows whether its last frame was complete, which the library's own reader does not tell."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._ready, self._at = raw, b"", 0
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while self._at >= len(self._ready):
            piece = self._raw.read(_ZSTD_PIECE)
            if not piece:
                if self._begun:
                    raise EOFError
                return 0
            self._ready, self._at = self._feed(piece), 0
        count = min(len(buffer), len(self._ready) - self._at)
        buffer[:count] = self._ready[self._at : self._at + count]
        self._at += count
        return count

    def _feed(self, piece: bytes) -> bytes:
        out: list[bytes] = []
        while piece:
            out.append(self._frame.decompress(piece))
            self._begun = not self._frame.eof
            piece = b""
            if self._frame.eof:
                piece = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(out)


def _decompressed(raw: BinaryIO, packed: str) -> BinaryIO:
    if packed == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if packed == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if packed == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(raw))
    if packed == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstd(raw), 1 << 20))
    return raw


def find_files(source: str, base: Path, accept: Callable[[File], bool]) -> list[File]:
    """The files of a path, a directory or a glob, sorted by name.

    Args:
        source: as written in the recipe, relative to ``base`` or absolute.
        base: the folder of the recipe.
        accept: which files of a directory count; a file or glob names its files itself.

    Raises:
        DataError: nothing is there, or the directory holds no file that counts.
    """
    path = base / Path(source).expanduser()
    if path.is_dir():
        found = [file for file in map(_on_disk(base), _walk(path)) if accept(file)]
        if not found:
            raise DataError(
                source,
                "expected a directory with text files, found none (.txt .md .jsonl .json .parquet, also with .gz .xz .zst)",
                "write a glob such as 'folder/**/*.py' to take other files as text",
            )
        return found
    if path.exists() or path.is_symlink():
        return [_on_disk(base)(path)]
    if glob.has_magic(source):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [_on_disk(base)(p) for p in matches if not p.is_dir()]
        if not found:
            raise DataError(source, "expected files that match this pattern, found none", "check the path")
        return found
    raise DataError(source, "expected a file or directory, found none", f"check the path (looked in {base})")


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root) / name


def _on_disk(base: Path) -> Callable[[Path], File]:
    def make(path: Path) -> File:
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
        return File(name, lambda: _open_regular(path))

    return make


def _open_regular(path: Path) -> BinaryIO:
    """Opens a regular file; a pipe or device would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Damaged("expected a regular file, found a directory, pipe or device")
    return path.open("rb")
