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
import threading
from pathlib import Path

_LOOK = 0.5


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
        self._lanes = [self._start([*command, "--meeting", self.meeting], rank) for rank in range(1, count)]
        self._met = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, command: list[str], rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "RANK": str(rank)}
        )

    def _watch(self) -> None:
        """Ends this process if a lane ends before all have met: the others would wait for it for half an hour."""
        while not self._met.wait(_LOOK):
            if any(lane.poll() is not None for lane in self._lanes):
                self.clear()
                os._exit(1)

    def met(self) -> None:
        """All lanes have joined the process group: from here on a collective notices one that ends."""
        self._met.set()
        self.clear()

    def clear(self) -> None:
        """Removes the meeting place."""
        shutil.rmtree(Path(self.meeting).parent, ignore_errors=True)

    def send(self, line: str) -> None:
        """Hands a job's line on; a lane that has ended is noticed at the next collective."""
        for lane in self._lanes:
            assert lane.stdin is not None
            try:
                lane.stdin.write(line)
                lane.stdin.flush()
            except OSError:
                continue
