"""A lock on a folder: one process at a time, given back by the system when that process ends, however it ends."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import explained
from windtunnel.base.errors import UserError


class FolderLock:
    """Holds the file ``lock`` in a folder until ``release``.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        with explained(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+", encoding="utf-8")
        try:
            _take(self._stream.fileno())
        except OSError:
            self._stream.seek(0)
            holder = self._stream.read().strip()
            self._stream.close()
            raise UserError(
                str(folder),
                "another windtunnel process is at work here" + (f" (process {holder})" if holder else ""),
                "wait for it, or stop it",
            ) from None
        self._stream.truncate(0)
        self._stream.write(str(os.getpid()))
        self._stream.flush()

    def release(self) -> None:
        """Gives the folder free."""
        self._stream.truncate(0)
        self._stream.close()


def _take(handle: int) -> None:
    """An exclusive lock that does not wait; raises OSError if it is taken."""
    if os.name == "nt":
        windows: Any = importlib.import_module("msvcrt")
        os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the text, which others may read
        windows.locking(handle, windows.LK_NBLCK, 1)
    else:
        posix: Any = importlib.import_module("fcntl")
        posix.flock(handle, posix.LOCK_EX | posix.LOCK_NB)
