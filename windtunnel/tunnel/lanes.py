"""Lanes: the processes that train one stage together on the cores of a CPU, a copy of the weights in each.

Two lanes of one thread do a step in three quarters of the time of one process with two threads (docs/lab-log.md): threads
meet after every operator, lanes once a step. The worker that the fleet knows is lane 0. It starts the others, hands each job
on to them, and takes them along when it ends, since their input ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO


class Lanes:
    """The other lanes, started by lane 0 before it joins the process group.

    Args:
        count: lanes in all.
        command: what each of them runs, to which ``--meeting FILE`` is added; its rank is in the environment.
    """

    def __init__(self, count: int, command: list[str]) -> None:
        self.meeting = str(Path(tempfile.mkdtemp(prefix="windtunnel-")) / "lanes")
        os.environ |= {"RANK": "0", "WORLD_SIZE": str(count)}
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # lanes are neighbours: no host name has to be looked up
        self._inputs = [self._start([*command, "--meeting", self.meeting], rank) for rank in range(1, count)]

    def _start(self, command: list[str], rank: int) -> IO[str]:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "RANK": str(rank)}
        )
        assert process.stdin is not None
        return process.stdin

    def met(self) -> None:
        """Removes the meeting place, once all lanes have joined the process group."""
        shutil.rmtree(Path(self.meeting).parent, ignore_errors=True)

    def send(self, line: str) -> None:
        """Hands a job's line on; a lane that has ended is noticed at the next collective."""
        for pipe in self._inputs:
            try:
                pipe.write(line)
                pipe.flush()
            except OSError:
                continue
