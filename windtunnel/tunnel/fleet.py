"""The fleet: worker processes on one machine that train stages, one single-threaded process a core. Needs no torch.

A job becomes ready when the checkpoint it starts from is on disk, so decay branches start while their trunk is still running.
A worker that crashes or falls silent is replaced and its job tried again once, from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from windtunnel.base.artefact import MANIFEST, explained, write_json
from windtunnel.base.devices import gpu_numbers
from windtunnel.base.errors import Diverged, Stopped, WindtunnelError
from windtunnel.train.stage import Stage

_MEMORY = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""One heap for the threads of forward and backward, so that what one frees the other finds, in huge pages: 15 to 27 % of a
step in three noisy turns (docs/lab-log.md). Other C libraries do not look at them."""
_WAITING = {"GOMP_SPINCOUNT": "20000"}
"""For several threads. Those that spin for long while they wait lose a hundredfold on a busy machine, those that never spin a
fifth on a quiet one (docs/lab-log.md)."""
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What a launcher set around the driver; a worker's ranks are the fleet's to name."""
_SILENCE = 900.0
_TRIES = 2


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a process that trains with that many threads. What the user has set stays."""
    waiting = _WAITING if threads > 1 else {}
    user = {name: value for name, value in os.environ.items() if name not in _RANKS}
    return {**_MEMORY, **waiting, **user, "OMP_NUM_THREADS": str(threads)}


@dataclass(frozen=True)
class Job:
    """A stage, the folder of its run, the checkpoint it starts from and where its corpora lie."""

    stage: Stage
    run: Path
    corpora: dict[str, Path]
    parent: Path | None = None
    finish: Path | None = None

    def message(self) -> dict[str, Any]:
        return {
            "stage": self.stage.to_dict(),
            "run": str(self.run),
            "corpora": {name: str(path) for name, path in self.corpora.items()},
            "parent": str(self.parent) if self.parent else None,
            "finish": str(self.finish) if self.finish else None,
        }


def orphaned(job: Job, parent: Mapping[str, Any]) -> dict[str, Any] | None:
    """What becomes of a job if the run that it grows from, with this result, failed before it wrote that checkpoint."""
    if "failed" not in parent or job.parent is None or (job.parent / MANIFEST).is_file():
        return None
    return {**parent, "failed": f"the run that it grows from failed ({parent['failed']})"}


class Watcher(Protocol):
    """Whoever shows what the fleet does."""

    def started(self, job: Job) -> None: ...
    def progress(self, job: Job, word: dict[str, Any]) -> None: ...
    def done(self, job: Job, result: dict[str, Any], reason: str) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class _Seat:
    """One worker process and what it is doing."""

    process: subprocess.Popen[str]
    gpu: str = ""
    job: Job | None = None
    heard: float = field(default_factory=time.monotonic)
    warm: set[str] = field(default_factory=set[str])

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):  # noticed as an ended process
            pass


@dataclass
class Work:
    """The jobs of one call: those that wait, what came of the others, and how often each was tried."""

    waiting: list[Job]
    watcher: Watcher
    results: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    tries: dict[str, int] = field(default_factory=dict[str, int])
    stopped: bool = False

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        """Notes the outcome of a job and tells it."""
        self.results[str(job.run)] = result
        self.watcher.done(job, result, result.get("failed", ""))

    def meet(self, job: Job, reason: str, code: int) -> None:
        """What a worker's error means: a result (diverged), another try, or the end of the whole call."""
        if code == Stopped.exit_code:
            if not self.stopped:  # somebody stopped the worker alone: its job goes on from its checkpoint
                self.waiting.insert(0, job)
            return
        if code == Diverged.exit_code:
            self.finish(job, {"failed": reason, "diverged": True})
        elif code == WindtunnelError.exit_code:
            self.again_or_fail(job, reason)
        else:
            failure = WindtunnelError(reason)
            failure.exit_code = code
            raise failure

    def orphans(self) -> None:
        """Gives up the jobs whose checkpoint a run that failed did not get to."""
        for job in list(self.waiting):
            run = str(job.parent.parent.parent) if job.parent else ""
            if (result := orphaned(job, self.results.get(run, {}))) is not None:
                self.waiting.remove(job)
                self.finish(job, result)

    def again_or_fail(self, job: Job, reason: str) -> None:
        """Puts a job in front of the queue once more, or gives it up with the reason."""
        if self.stopped:
            return
        self.tries[str(job.run)] = self.tries.get(str(job.run), 1) + 1
        if self.tries[str(job.run)] > _TRIES:
            self.finish(job, {"failed": reason})
        else:
            self.watcher.say(f"{job.stage.name}: {reason}; trying it again once")
            self.waiting.insert(0, job)


class Fleet:
    """Workers that stay alive, warm, over several calls of ``run``.

    Args:
        workers: number of processes.
        threads: threads in each.
        devices: passed on to each worker, ``"cpu"`` or ``"cuda"``; of several GPUs ("0,1") each worker sees one.
        log: file that receives the workers' standard error.
        world: ranks that train each stage together under torchrun (then one stage at a time).
        lanes: processes of one worker that train each stage together on the cores of a CPU.
    """

    def __init__(
        self,
        workers: int,
        log: Path,
        *,
        threads: int = 1,
        devices: str | None = None,
        eager: bool = False,
        world: int = 1,
        lanes: int = 1,
    ) -> None:
        self._gpus = gpu_numbers(devices) if devices and world == 1 else []
        seen = "cuda" if self._gpus else "cpu" if lanes > 1 else devices
        self._options = (
            ["--threads", str(threads)] + (["--devices", seen] if seen else []) + (["--eager"] if eager else [])
        )
        if lanes > 1:
            self._options += ["--lanes", str(lanes)]
        self._lanes = lanes
        self._count, self._log, self._world, self._threads = workers, log, world, threads
        self._events: queue.Queue[tuple[_Seat, dict[str, Any] | None]] = queue.Queue()
        self._seats: list[_Seat] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers."""
        for seat in self._seats:
            if seat.process.stdin:
                seat.process.stdin.close()
            seat.process.terminate()
        for seat in self._seats:
            try:
                seat.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                seat.process.kill()
        self._seats = []

    def run(
        self, jobs: Sequence[Job], watcher: Watcher, *, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, Any]]:
        """Trains all jobs; returns results by run folder, with ``{"failed": reason}`` for those that could not be trained.

        Raises:
            Stopped: ``stopping`` said so; every running stage has stopped at a step boundary.
            WindtunnelError: a worker met a problem that no other try can mend (full disk, damaged input).
        """
        work = Work(sorted(jobs, key=lambda job: -job.stage.flops), watcher)
        while work.waiting or any(seat.job for seat in self._seats):
            if stopping() and not work.stopped:
                work.stopped, work.waiting = True, []
                for seat in self._seats:
                    if seat.job:
                        self._stop(seat)
            if not work.stopped:
                self._hand_out(work)
            self._replace_silent(work)
            try:
                seat, message = self._events.get(timeout=0.2)
            except queue.Empty:
                continue
            self._hear(seat, message, work)
        if work.stopped:
            raise Stopped("stopped at a step boundary; the same command continues")
        return work.results

    def _stop(self, seat: _Seat) -> None:
        if self._world > 1:
            seat.process.terminate()
        else:
            seat.send({"stop": True})

    def _hand_out(self, work: Work) -> None:
        work.orphans()
        for job in list(work.waiting):
            if job.parent is not None and not (job.parent / MANIFEST).is_file():
                continue
            seat = self._free_seat(job)
            if seat is None:
                return
            work.waiting.remove(job)
            seat.job, seat.heard = job, time.monotonic()
            seat.warm.add(_signature(job.stage))
            work.watcher.started(job)
            if self._world == 1:
                seat.send(job.message())
        if work.waiting and not any(seat.job for seat in self._seats):
            missing = ", ".join(job.stage.name for job in work.waiting)
            raise WindtunnelError(f"these stages wait for a checkpoint that no running stage will write: {missing}")

    def _free_seat(self, job: Job) -> _Seat | None:
        """A free worker, one that is warm for this shape if there is a choice; a new one if there is room."""
        if self._world > 1:
            return None if any(seat.job for seat in self._seats) else self._launch(job)
        free = [seat for seat in self._seats if seat.job is None and seat.process.poll() is None]
        if warm := [seat for seat in free if _signature(job.stage) in seat.warm]:
            return warm[0]
        if len(self._seats) < self._count:
            return self._launch(None)
        return free[0] if free else None

    def _launch(self, job: Job | None) -> _Seat:
        command = [sys.executable, "-m", "windtunnel.tunnel.worker", *self._options]
        if job is not None:
            file = job.run / "job.json"
            write_json(file, job.message())
            command[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._world}", "-m"]
            command += ["--job", str(file)]
            self._seats = []
        environment = {**worker_environment(self._threads), "PYTHONUNBUFFERED": "1"}
        gpu = self._idlest_gpu()
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with explained(self._log):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
                )
        seat = _Seat(process, gpu)
        self._seats.append(seat)
        threading.Thread(target=self._listen, args=(seat,), daemon=True).start()
        return seat

    def _idlest_gpu(self) -> str:
        """Of several GPUs the one with the fewest workers, else an empty string."""
        return min(self._gpus, key=lambda gpu: sum(seat.gpu == gpu for seat in self._seats), default="")

    def _listen(self, seat: _Seat) -> None:
        assert seat.process.stdout is not None
        for line in seat.process.stdout:
            try:
                self._events.put((seat, json.loads(line)))
            except ValueError:
                continue
        seat.process.stdout.close()
        self._events.put((seat, None))

    def _hear(self, seat: _Seat, message: dict[str, Any] | None, work: Work) -> None:
        seat.heard, job = time.monotonic(), seat.job
        if message is None:
            if seat.process.stdin:
                seat.process.stdin.close()
            if seat in self._seats:
                self._seats.remove(seat)
            if job is not None:
                seat.job = None
                work.again_or_fail(job, f"the worker ended with code {seat.process.wait()} (see {self._log.name})")
        elif job is None:
            return
        elif "progress" in message:
            work.watcher.progress(job, message["progress"])
        elif "say" in message:
            work.watcher.say(f"{job.stage.name}: {message['say']}")
        elif "result" in message:
            seat.job = None
            work.finish(job, {**message["result"], "wall": message["wall"]})
        elif "error" in message:
            seat.job = None
            if self._lanes > 1 and message["code"] not in (Stopped.exit_code, Diverged.exit_code):
                self._seats.remove(seat)  # it ends, with the lanes that wait for it
            work.meet(job, message["error"], message["code"])

    def _replace_silent(self, work: Work) -> None:
        for seat in list(self._seats):
            if seat.job and time.monotonic() - seat.heard > _SILENCE:
                job, seat.job = seat.job, None
                self._seats.remove(seat)
                seat.process.kill()
                work.again_or_fail(job, f"no word for {_SILENCE:.0f} s")


def _signature(stage: Stage) -> str:
    return str((stage.shape, stage.objective, stage.plan.row))
