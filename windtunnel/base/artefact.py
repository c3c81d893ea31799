"""Artefact folders: written whole or not at all, described by a manifest, verified when opened.

An artefact is a folder of plain files (safetensors, JSON, raw integers) and a ``manifest.json`` with its kind, its parents
by hash, the resolved configuration and size and BLAKE3 hash of each file. It is written into a temporary neighbour, synced
to disk and renamed: whoever finds the folder finds all of it. No pickle is ever written or read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3

from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.units import bytes_size

SCHEMA = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What an artefact says about itself. ``hash`` identifies its content: files, kind, parents and configuration."""

    path: Path
    kind: str
    config: dict[str, Any]
    parents: tuple[str, ...]
    files: dict[str, dict[str, Any]]
    hash: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


def canonical(value: object) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8; NaN and infinities are refused with ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_hash(value: object) -> str:
    """BLAKE3 of the canonical JSON of a value, 64 hexadecimal digits."""
    return blake3.blake3(canonical(value)).hexdigest()


def hash_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, read in pieces."""
    digest = blake3.blake3()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk; folders only where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all (temporary neighbour, sync, rename).

    Raises:
        UserError: the disk is full or the folder cannot be written; an earlier file of that name is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Writes a value as readable JSON, whole or not at all."""
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ArtefactError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtefactError(str(path), "expected a JSON file, found none") from None
    except (ValueError, UnicodeDecodeError):
        raise ArtefactError(
            str(path),
            "expected JSON, found a damaged file",
            "put it right; one that windtunnel wrote may be deleted, then run it again",
        ) from None


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turns the operating system's refusals into one line with the path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = bytes_size(shutil.disk_usage(_existing(path)).free)
            raise UserError(
                str(path),
                f"the disk or quota is full ({free} free)",
                "make room and run the same command again, nothing that was whole is lost",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(str(path), "the folder cannot be written", "choose another with --home") from None
        raise


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


@contextmanager
def write_artefact(
    path: Path,
    kind: str,
    config: dict[str, Any],
    parents: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
) -> Generator[Path]:
    """Yields an empty folder to fill; on leaving without an error it becomes ``path``, complete with manifest.

    ``config`` belongs to the identity; ``facts`` (a dictionary that may still be filled inside the block) is recorded but
    not hashed: times, speeds, machine. An artefact already at ``path`` is replaced only after the new one is whole.

    Raises:
        UserError: full disk or read-only folder; nothing at ``path`` has changed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    facts = {} if facts is None else facts
    try:
        with explained(path):
            temporary.mkdir(parents=True)
            yield temporary
            files: dict[str, dict[str, Any]] = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                sync(file)
                name = file.relative_to(temporary).as_posix()
                files[name] = {"bytes": file.stat().st_size, "blake3": hash_file(file)}
            body = {"schema": SCHEMA, "kind": kind, "parents": list(parents), "config": config, "files": files}
            whole = {**body, "hash": content_hash(body), "facts": facts}
            write_json(temporary / MANIFEST, {**whole, "check": content_hash(whole)})
            sync(temporary)
            _put_in_place(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames the finished folder; one of that name steps aside first, comes back if that fails, and is deleted last."""
    aside = None
    if path.exists():
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if aside is not None:
            os.rename(aside, path)
        raise
    sync(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder whole or not at all; one that is there already stays.

    Raises:
        UserError: full disk or read-only folder.
    """
    if target.exists():
        return
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, beside)
            os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Deletes what killed writes left in a folder: temporary and outdated neighbours of artefacts and files.

    Only for whoever alone writes there.
    """
    for left in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def read_manifest(path: Path, kind: str | None = None, *, verify: bool = True) -> Manifest:
    """Opens an artefact.

    Args:
        path: the folder.
        kind: the kind it must have, if that matters.
        verify: compare size and hash of every file (the manifest's own hash is always compared).

    Raises:
        ArtefactError: no artefact, another kind, a newer schema, or content that differs from the manifest.
    """
    again = "delete that folder and run the command again"
    if not (path / MANIFEST).is_file():
        raise ArtefactError(str(path), "expected a folder with a manifest.json, found none", "check the path")
    raw = read_json(path / MANIFEST)
    try:
        body = {key: raw[key] for key in ("schema", "kind", "parents", "config", "files")}
        recorded = raw["hash"]
    except (KeyError, TypeError):
        raise ArtefactError(str(path / MANIFEST), "expected a windtunnel manifest, found other JSON", again) from None
    if body["schema"] != SCHEMA:
        raise ArtefactError(
            str(path),
            f"expected manifest schema {SCHEMA}, found {body['schema']}",
            "use the windtunnel version that wrote it",
        )
    # ``hash`` identifies the content; ``check`` guards the facts as well, which are no part of the identity.
    known = {key: value for key, value in raw.items() if key != "check"}
    torn = set(known) - {*body, "hash", "facts"} or raw.get("check", content_hash(known)) != content_hash(known)
    if content_hash(body) != recorded or torn:
        raise ArtefactError(str(path / MANIFEST), "the manifest does not match its own hash", again)
    if kind is not None and body["kind"] != kind:
        raise ArtefactError(
            str(path), f"expected an artefact of kind '{kind}', found '{body['kind']}'", "check the path"
        )
    if verify:
        _verify(path, body["files"], again)
    return Manifest(
        path, body["kind"], body["config"], tuple(body["parents"]), body["files"], recorded, raw.get("facts", {})
    )


def _verify(path: Path, files: dict[str, dict[str, Any]], again: str) -> None:
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    for name in sorted(found ^ set(files)):
        problem = "is missing" if name in files else "is not in the manifest"
        raise ArtefactError(str(path / name), f"this file {problem}", again)
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ArtefactError(str(path / name), f"expected {expected['bytes']} bytes, found {size}", again)
        if hash_file(path / name) != expected["blake3"]:
            raise ArtefactError(str(path / name), "the content does not match its hash in the manifest", again)
