"""The fleet on a Ray cluster: the same jobs, the same lab book, workers on any number of machines. Needs no torch.

Nothing is shared but the network: a job travels with the files it needs (its run folder as far as it got, its parent's
checkpoint, its corpora once for each machine) and its run folder travels back. Each seat holds one warm worker, the same
process as on one machine. A seat whose machine is lost gives its job back, which starts again elsewhere from what the driver
holds. For trials, proxies and branches; a large run goes over torchrun.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import MANIFEST, explained, read_json
from windtunnel.base.compiler import has_compiler
from windtunnel.base.errors import Stopped, UserError, WindtunnelError
from windtunnel.train.folder import RESULT
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import Fleet, Job, Watcher, Work

_WAIT, _PROGRESS_EVERY, _PATIENCE = 0.3, 1.0, 120.0


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UserError(
            "--devices ray", "expected the package ray, found none", "pip install 'windtunnel[cluster]'"
        ) from None


def _answers(address: str) -> None:
    """Raises if nothing listens at HOST:PORT: Ray itself would try for minutes and then end this process."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        text = f"expected a Ray cluster at {address!r}, nothing answers there ({error.strerror or error})"
        raise UserError("--devices ray", text, "ray start --head") from None


def pack(folder: Path) -> bytes:
    """The files of a folder as one uncompressed tar; empty for a folder that is not there."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file() and not path.name.startswith("."):
                tar.add(path, str(path.relative_to(folder)), recursive=False)
    return stream.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Puts the files of a tar into a folder: those of a checkpoint together, the result last, so that a cut leaves no half of
    either."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as name:
        fresh = Path(name)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(fresh, filter="data")
        (folder / "checkpoints").mkdir(exist_ok=True)
        for checkpoint in sorted((fresh / "checkpoints").glob("step-*")):
            place = folder / "checkpoints" / checkpoint.name
            if not place.exists():
                os.replace(checkpoint, place)
        shutil.rmtree(fresh / "checkpoints", ignore_errors=True)
        files = sorted((p for p in fresh.rglob("*") if p.is_file()), key=lambda p: (p.name == RESULT, p))
        for file in files:
            place = folder / file.relative_to(fresh)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


class Seat:
    """What runs on a node: one warm worker behind a fleet of its own, and the corpora that it has received."""

    def __init__(self, devices: str | None, eager: bool) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="windtunnel-"))
        eager = eager or (devices in (None, "cpu") and not has_compiler())
        self._fleet = Fleet(1, self._folder / "worker.log", devices=devices, eager=eager)
        self._word: dict[str, Any] | None = None
        self._said: list[str] = []
        self._stop = False

    def train(
        self, message: dict[str, Any], run: bytes, parent: bytes | None, corpora: dict[str, Any]
    ) -> dict[str, Any]:
        """Trains one job; returns its result or error and the files of its run folder."""
        self._word, self._stop, stage = None, False, Stage.from_dict(message["stage"])
        home, before = self._folder / stage.folder_name, self._folder / "parent"
        for folder in (home, before):
            shutil.rmtree(folder, ignore_errors=True)
        unpack(run, home)
        if parent is not None:
            step = Path(message["parent"]).name
            with tarfile.open(fileobj=io.BytesIO(parent)) as tar:
                tar.extractall(before / "checkpoints" / step, filter="data")
        job = Job(
            stage, home, {name: self._corpus(*packed) for name, packed in corpora.items()},
            before / "checkpoints" / Path(message["parent"]).name if parent is not None else None,
        )  # fmt: skip
        try:
            answer = {"result": self._fleet.run([job], self, stopping=lambda: self._stop)[str(home)]}
        except WindtunnelError as error:
            answer = {"error": str(error), "code": error.exit_code}
        return {**answer, "files": pack(home)}

    def _corpus(self, key: str, packed: Any) -> Path:
        place = self._folder / "corpora" / key
        if not (place / MANIFEST).is_file():
            place.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(_ray().get(packed))) as tar:
                tar.extractall(place, filter="data")
        return place

    def word(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The latest progress, and what was said since the last call."""
        said, self._said = self._said, []
        return self._word, said

    def stop(self) -> None:
        """Asks the running stage to stop at its next step."""
        self._stop = True

    # What the seat's own fleet tells:
    def started(self, job: Job) -> None: ...

    def progress(self, job: Job, word: dict[str, Any]) -> None:
        self._word = word

    def done(self, job: Job, result: dict[str, Any], reason: str) -> None: ...

    def say(self, text: str) -> None:
        self._said.append(text)


@dataclass
class _Hand:
    """The driver's end of a seat: the job it has and the promise of its answer."""

    actor: Any
    job: Job | None = None
    answer: Any = None
    told: float = field(default_factory=time.monotonic)


class RayFleet:
    """A fleet over a Ray cluster, used like ``Fleet``.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to.
        devices: "cuda" gives every seat a GPU, anything else a CPU core.
        seats: at most so many; 0 for as many as the cluster has room for.

    Raises:
        UserError: ray is not installed, or no cluster answers at that address.
    """

    def __init__(
        self, address: str = "auto", devices: str | None = None, *, eager: bool = False, seats: int = 0
    ) -> None:
        self._ray, self._devices, self._eager, self._seats = _ray(), devices, eager, seats
        self._kind = "GPU" if (devices or "").startswith("cuda") else "CPU"
        _answers(address)
        try:
            self._ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())[:160]
            raise UserError(
                "--devices ray", f"expected a Ray cluster at {address!r} ({text})", "ray start --head"
            ) from None
        self._hands: list[_Hand] = []
        self._packed: dict[str, tuple[str, Any]] = {}

    def __enter__(self) -> RayFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets all seats go and leaves the cluster, which stays."""
        for hand in self._hands:
            self._ray.kill(hand.actor)
        self._hands = []
        self._ray.shutdown()

    def run(
        self, jobs: Sequence[Job], watcher: Watcher, *, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, Any]]:
        """Trains all jobs, as ``Fleet.run`` does.

        Raises:
            Stopped: ``stopping`` said so; checkpoints of the running stages have come back.
            WindtunnelError: a problem that no other try can mend, or the cluster has had no free place for two minutes.
        """
        work, patience = Work(sorted(jobs, key=lambda job: -job.stage.flops), watcher), time.monotonic()
        while work.waiting or any(hand.job for hand in self._hands):
            if stopping() and not work.stopped:
                work.stopped, work.waiting = True, []
                for hand in self._hands:
                    if hand.job:
                        hand.actor.stop.remote()
            if not work.stopped:
                self._hand_out(work)
            busy = [hand for hand in self._hands if hand.job]
            if busy:
                patience = time.monotonic()
            elif work.waiting and time.monotonic() - patience > _PATIENCE:
                raise WindtunnelError(f"the Ray cluster has had no free {self._kind} for {_PATIENCE:.0f} s")
            ready, _ = self._ray.wait([h.answer for h in busy], timeout=_WAIT) if busy else ([], time.sleep(_WAIT))
            for hand in busy:
                if hand.answer in ready:
                    self._take(hand, work)
                else:
                    self._listen(hand, work)
        if work.stopped:
            raise Stopped("stopped at a step boundary; the same command continues")
        return work.results

    def _hand_out(self, work: Work) -> None:
        work.orphans()
        for job in list(work.waiting):
            if job.parent is not None and not (job.parent / MANIFEST).is_file():
                continue
            hand = next((h for h in self._hands if h.job is None), None) or self._new_hand()
            if hand is None:
                return
            work.waiting.remove(job)
            hand.job = job
            parent = pack(job.parent) if job.parent is not None else None
            corpora = {name: self._corpus(path) for name, path in job.corpora.items()}
            hand.answer = hand.actor.train.remote(job.message(), pack(job.run), parent, corpora)
            work.watcher.started(job)

    def _new_hand(self) -> _Hand | None:
        """A seat where the cluster has room for one; a lost machine's seats are not asked for again until there is."""
        if self._seats and len(self._hands) >= self._seats:
            return None
        if self._ray.available_resources().get(self._kind, 0.0) < 1.0:
            return None
        room = {"num_gpus": 1, "num_cpus": 1} if self._kind == "GPU" else {"num_cpus": 1}
        actor = self._ray.remote(Seat).options(max_concurrency=3, **room).remote(self._devices, self._eager)
        try:
            self._ray.get(actor.word.remote(), timeout=60)
        except self._ray.exceptions.RayError:  # somebody else was faster, or the machine went away
            self._ray.kill(actor)
            return None
        hand = _Hand(actor)
        self._hands.append(hand)
        return hand

    def _corpus(self, path: Path) -> tuple[str, Any]:
        """A corpus as (content hash, its packed files in Ray's object store), put there once."""
        if str(path) not in self._packed:
            key = read_json(path / MANIFEST)["hash"]
            self._packed[str(path)] = (key, self._ray.put(pack(path)))
        return self._packed[str(path)]

    def _take(self, hand: _Hand, work: Work) -> None:
        job, hand.job = hand.job, None
        assert job is not None
        try:
            answer = self._ray.get(hand.answer)
        except self._ray.exceptions.RayError as error:
            self._hands.remove(hand)
            work.again_or_fail(job, f"its machine was lost ({type(error).__name__})")
            return
        with explained(job.run):
            unpack(answer["files"], job.run)
        if "result" in answer:
            work.finish(job, answer["result"])
        else:
            work.meet(job, answer["error"], answer["code"])

    def _listen(self, hand: _Hand, work: Work) -> None:
        if hand.job is None or time.monotonic() - hand.told < _PROGRESS_EVERY:
            return
        hand.told = time.monotonic()
        try:
            word, said = self._ray.get(hand.actor.word.remote(), timeout=_WAIT)
        except self._ray.exceptions.RayError:  # busy or gone: the answer will tell
            return
        for text in said:
            work.watcher.say(text)
        if word is not None:
            work.watcher.progress(hand.job, word)
