"""A worker: trains the stages it is sent, one after another, keeping models and compiled code warm between them.

It speaks JSON lines: jobs and "stop" come in on standard input; progress, notices and results go out on standard output. When
its input ends the driver is gone, and so is the worker: what counts is on disk. Run under torchrun with ``--job FILE``, the
ranks train that one stage together and rank 0 speaks; with ``--lanes N`` it starts N − 1 others that train with it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from windtunnel.base.errors import Diverged, Stopped, WindtunnelError
from windtunnel.base.runtime import Runtime, choose, prepare
from windtunnel.corpus.store import Corpus, open_corpus
from windtunnel.train.control import Control, StopOnSignals
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.parallel import barrier, start_ranks
from windtunnel.train.stage import Stage
from windtunnel.tunnel.lanes import Lanes


class Worker:
    """Holds a runtime, the warm models and the open corpora of one process."""

    def __init__(self, runtime: Runtime) -> None:
        self._workshop = Workshop(runtime)
        self._corpora: dict[str, Corpus] = {}
        self._speaks = runtime.rank == 0
        self._out = sys.stdout
        sys.stdout = sys.stderr  # a library that prints must not disturb the protocol
        self.control = Control(tell=lambda p: self.send(progress=asdict(p)), say=lambda text: self.send(say=text))

    def send(self, **message: Any) -> None:
        """Writes one message, if this rank speaks; what went wrong on another one is for the worker's log."""
        if self._speaks:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        elif "error" in message:
            sys.stderr.write(f"rank {self._workshop.runtime.rank}: {message['error']}\n")
            sys.stderr.flush()

    def train(self, job: dict[str, Any]) -> None:
        """Trains one job and reports its result or its one-line failure."""
        finish = Path(job["finish"]) if job.get("finish") else None
        self.control.finish = _file_watch(finish) if finish else lambda: False
        started = time.perf_counter()
        alone = False
        try:
            stage = Stage.from_dict(job["stage"])
            corpora = {name: self._corpus(path) for name, path in job["corpora"].items()}
            parent = Path(job["parent"]) if job.get("parent") else None
            result = run_stage(stage, Path(job["run"]), corpora, self._workshop, parent=parent, control=self.control)
            self.send(result=result, wall=time.perf_counter() - started)
        except WindtunnelError as error:
            self.send(error=str(error), code=error.exit_code)
            alone = not isinstance(error, Stopped | Diverged)  # these all ranks meet at the same step
        except Exception as error:  # the driver decides what becomes of the job; the trace is in the worker's log
            traceback.print_exc()
            self.send(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", code=1)
            alone = True
        finally:
            self.control.stop = False  # a stop is for the job that it met
        if alone and self._workshop.runtime.world > 1:
            os._exit(
                1
            )  # the other ranks may wait for this one in a collective: they end with it, and the fleet starts anew

    def _corpus(self, path: str) -> Corpus:
        if path not in self._corpora:
            self._corpora[path] = open_corpus(Path(path))
        return self._corpora[path]


def _file_watch(path: Path, every: float = 0.5) -> Any:
    """A function that says whether the file exists, looking at most every half second."""
    state = {"next": 0.0, "seen": False}

    def exists() -> bool:
        now = time.monotonic()
        if now >= state["next"]:
            state["next"], state["seen"] = now + every, path.exists()
        return bool(state["seen"])

    return exists


def _read_input(worker: Worker, jobs: queue.Queue[dict[str, Any] | None], lanes: Lanes | None) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            worker.control.request_stop()  # one lane that stops stops all, at one step
            continue
        if lanes:
            lanes.send(line)
        jobs.put(message)
    if lanes:
        lanes.clear()
    os._exit(0)  # the driver has closed the pipe or died


def _lane(options: argparse.Namespace) -> list[str]:
    """The command of another lane of this worker."""
    device = ["--devices", options.devices] if options.devices else []
    eager = ["--eager"] if options.eager else []
    return [sys.executable, "-m", "windtunnel.tunnel.worker", "--threads", str(options.threads), *device, *eager]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--devices", default=None)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--job", type=Path, default=None)
    parser.add_argument("--lanes", type=int, default=1, help="processes that train each stage together, a copy in each")
    parser.add_argument("--meeting", default=None, help="the file where lanes meet; lane 0 makes it up")
    options = parser.parse_args()
    lanes = Lanes(options.lanes, _lane(options)) if options.lanes > 1 else None
    meeting = lanes.meeting if lanes else options.meeting
    compiled = False if options.eager else None
    try:
        runtime = choose(options.devices, options.threads, compiled=compiled, sharded=meeting is None)
    except WindtunnelError as error:  # no other worker would fare better
        sys.stdout.write(json.dumps({"error": str(error), "code": error.exit_code}) + "\n")
        sys.stdout.flush()
        sys.exit(error.exit_code)
    prepare(runtime)
    worker = Worker(runtime)
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    if options.job is None:
        # Ctrl-C reaches the whole group; the driver passes it on as a stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, worker.control.request_stop)  # a scheduler's SIGTERM does so too
        # Before the ranks meet, so that none waits for one whose driver is gone.
        threading.Thread(target=_read_input, args=(worker, jobs, lanes), daemon=True).start()
    if meeting or options.job:
        start_ranks(runtime, meeting)
        barrier(runtime)
    if lanes:
        lanes.met()
    if options.job is not None:
        with StopOnSignals(worker.control):
            worker.train(json.loads(options.job.read_text(encoding="utf-8")))
        return
    worker.send(ready=True)
    while (job := jobs.get()) is not None:
        worker.train(job)


if __name__ == "__main__":
    main()
