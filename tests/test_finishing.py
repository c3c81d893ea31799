"""What another process works on can be stopped like training: at once, cleanly, and leaving no process behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from windtunnel import pipeline
from windtunnel.base.errors import Stopped
from windtunnel.train.control import Control, StopOnSignals, stop_wanted

SLOW = "import pathlib, os, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_and_the_process(tmp_path: Path, number: int) -> None:
    file = tmp_path / "pid"

    def ask() -> None:
        while not (file.is_file() and file.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    with StopOnSignals(Control()), pytest.raises(Stopped, match="the same command continues"):
        pipeline._answered([sys.executable, "-c", SLOW.format(file=str(file))])
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert not stop_wanted(), "the next command begins afresh"


def test_without_a_signal_the_answer_comes_back_with_its_exit_code() -> None:
    code, out, err = pipeline._answered(
        [sys.executable, "-c", "import sys; print('done'); print('no', file=sys.stderr); sys.exit(2)"]
    )
    assert (code, out, err) == (2, "done\n", "no\n")
