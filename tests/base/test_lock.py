"""One process at a time has a folder, and one that dies gives it back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from windtunnel.base.errors import UserError
from windtunnel.base.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from windtunnel.base.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_refused_while_it_is_held_and_free_after_release(tmp_path):
    lock = FolderLock(tmp_path / "program")
    with pytest.raises(UserError, match=rf"another windtunnel process is at work here \(process {os.getpid()}\)"):
        FolderLock(tmp_path / "program")
    other = FolderLock(tmp_path / "other")
    lock.release()
    FolderLock(tmp_path / "program").release()
    other.release()


def test_a_process_that_is_killed_gives_its_folder_back(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid}"):
        FolderLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    FolderLock(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        FolderLock(tmp_path / "program")
