"""The driver's desk: the open home with its lab book, its screen and its workers. Needs no torch.

The driver is the only writer of the lab book. It decides what is already done, hands the rest to the fleet and records what
comes back.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from windtunnel.base.artefact import MANIFEST, explained, write_json
from windtunnel.base.compiler import NO_COMPILER, has_compiler
from windtunnel.base.devices import USUAL, Crew, gpu_numbers, visible_gpus
from windtunnel.base.errors import ArtefactError, UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.base.lock import FolderLock
from windtunnel.base.units import si
from windtunnel.home import RECORD, Home, write_facts
from windtunnel.laws.sealed import ADAPTATION, CURVE, LAW
from windtunnel.prepared import Prepared
from windtunnel.takeover import take_over
from windtunnel.track import Mirror
from windtunnel.train.control import Control, StopOnSignals
from windtunnel.train.folder import checkpoint_path, forget_failure, read_failure, read_result, write_failure
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Stage
from windtunnel.tunnel.cluster import RayFleet
from windtunnel.tunnel.fleet import Fleet, Job, orphaned
from windtunnel.tunnel.packing import measure_together, pack
from windtunnel.tunnel.watch import Screen

Result = dict[str, Any]
_RAY = re.compile(r"ray(\+(?P<device>cuda|cpu))?(:(?P<address>.+))?")
THREADED_FROM = 1_000_000
"""Parameters from which a single run gets all cores: below, one is safer on a busy machine (docs/lab-log.md)."""
_TOGETHER = 0.8
"""Speed of a lane beside others over a worker's that is alone on its machine: an assumption, not measured by itself."""


@dataclass(frozen=True)
class Machine:
    """What this process may use: worker processes, threads of a single large run, device word, ranks of a large run, and the
    address of a Ray cluster for everything that is not large."""

    workers: int
    threads: int
    device: str
    ranks: int = 1
    cluster: str = ""
    packed: bool = True
    """False while it has still to be measured how many workers a GPU takes."""
    seats: int = 0
    """At most so many workers on the cluster; 0 for as many as it has room for."""

    @classmethod
    def of(cls, devices: str | None, crew: Crew = USUAL) -> Machine:
        """The GPUs that ``devices`` names ("cuda", "0,1"), else those that are there, else the cores of the CPU.

        "ray" and "ray:ADDRESS" name a Ray cluster for the small stages, "ray+cuda" with a GPU for each; a large run stays here.

        Raises:
            UserError: several workers are asked for on each GPU where there is none, or on a cluster.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if devices and (match := _RAY.fullmatch(devices)):
            if crew.per_gpu not in ("1", "auto"):
                raise UserError(
                    "--workers-per-gpu", f"expected 1 with a Ray cluster, got {crew.per_gpu}", "use --workers"
                )
            here = cls.of(match["device"], crew)
            seats = 0 if crew.workers == "auto" else int(crew.workers)
            return replace(here, cluster=match["address"] or "auto", seats=seats)
        stated = 0 if crew.workers == "auto" else int(crew.workers)
        word = devices or ",".join(visible_gpus())
        if word in ("", "cpu"):
            if crew.per_gpu not in ("1", "auto"):
                raise UserError("--workers-per-gpu", "expected a GPU, there is none in use", "use --workers")
            return cls(stated or cores, cores, word)
        count = max(1, len(gpu_numbers(word)))
        each = 1 if crew.per_gpu == "auto" else int(crew.per_gpu)
        return cls(stated or each * count, 4, word, count, packed=bool(stated) or crew.per_gpu != "auto")

    @property
    def lanes(self) -> int:
        """Processes with a copy each that train a large run together: one a core, four at most; elsewhere threads do it."""
        on_cpu = self.device in ("", "cpu") and sys.platform == "linux"
        return min(4, self.threads) if on_cpu else 1

    def gain(self, body: int) -> float:
        """Speed of a large run with that many parameters over one worker's."""
        return _TOGETHER * self.lanes if self.lanes > 1 and body >= THREADED_FROM else 1.0


class Desk:
    """An open home for one program.

    Raises:
        UserError: the home cannot be written, lies on a network file system, or another driver works on this program.
    """

    def __init__(
        self, home: Home, program: str, *, devices: str | None = None, quiet: bool = False, track: Sequence[str] = (),
        crew: Crew = USUAL,
    ) -> None:  # fmt: skip
        self.home, self.program, self.machine = home, program, Machine.of(devices, crew)
        self.book = LabBook(home.labbook)
        self._lock = FolderLock(home.program(program))
        self.screen = Screen(quiet=quiet)
        self.control = Control(say=self.screen.say)
        self.mirror = Mirror(track, home.program(program) / "track", program, self.screen.say)
        self._fleets: dict[str, Fleet | RayFleet] = {}
        self._used: dict[str, dict[str, None]] = {}
        self._taken: set[tuple[str, str]] = set()
        self._eager = self.machine.device in ("", "cpu") and not has_compiler()
        if self._eager:
            self.screen.say(NO_COMPILER)
        self._signals = StopOnSignals(self.control)

    def __enter__(self) -> Desk:
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for fleet in self._fleets.values():
            fleet.close()
        self.mirror.close()
        self._signals.__exit__(*error)
        try:
            write_facts(self.home.root, self.program, self.book)
        finally:
            self.book.close()
            self._lock.release()

    def run_folder(self, stage: Stage) -> Path:
        """The folder of a stage's run."""
        return self.home.runs(self.program) / stage.folder_name

    def parent_checkpoint(self, stage: Stage) -> Path | None:
        """The checkpoint from which a stage starts, whether it exists yet or not."""
        if stage.start is None:
            return None
        pattern = f"*-{stage.start.stage[:10]}"
        found = sorted(self.home.runs(self.program).glob(pattern))
        if not found and stage.start.fresh:  # a model of another program of this home
            found = sorted(self.home.root.glob(f"programs/*/runs/{pattern}"))
        if not found:
            raise ArtefactError(stage.name, f"expected the run {stage.start.stage[:10]} that it grows from, found none")
        return checkpoint_path(found[0], stage.start.step)

    def train(
        self, title: str, study: str, stages: Sequence[Stage], prepared: Prepared, *, large: bool = False,
        finish: Path | None = None,
    ) -> dict[str, Result]:  # fmt: skip
        """Trains what is not done yet and returns the results of all, by stage key.

        A trial that diverged has its result, and so has one that was given up; only what belongs to no study is tried again.

        Args:
            large: one run with all of the machine, if it is large enough, instead of one single-threaded process a core.
            finish: a file whose appearance ends an open-ended stage at its next step.

        Raises:
            Stopped: a stop was asked for.
            WindtunnelError: a problem that trying again cannot mend.
        """
        results: dict[str, Result] = {}
        jobs: list[Job] = []
        hashes = dict(prepared.hashes())
        self.use(study, [stage.folder_name for stage in stages])
        self._take_over(study, stages, hashes)
        for stage in stages:
            run = self.run_folder(stage)
            with explained(run):
                run.mkdir(parents=True, exist_ok=True)
            result = read_result(run, stage, hashes) or (read_failure(run, stage) if study else None)
            if result is not None:
                results[stage.key] = result
                self._record_if_new(stage, study, result)
                continue
            needed = {name for name, _ in stage.corpora} | set(stage.score)
            folders = {name: self.home.root / prepared.corpora[name]["folder"] for name in needed}
            job = Job(stage, run, folders, self.parent_checkpoint(stage), finish if stage.open_ended else None)
            if stage.start and (result := orphaned(job, results.get(stage.start.stage, {}))) is not None:
                results[stage.key] = result
                self._record_if_new(stage, study, result)
            else:
                jobs.append(job)
        self._say_given_up(stages, results)
        if not jobs:
            return results
        forecasts = self._forecasts()
        with self.book as book:
            for job in jobs:
                run = self.run_id(job.stage)
                # What a run begins under is its parent; a later forecast of it is none.
                forecast = {} if book.run(run) else {"forecast": forecasts.get(job.stage.key, "")}
                columns = {**self._columns(job.stage, study), **forecast}
                book.put_run(run, **columns, status="waiting", started=time.time())
        if not (self.machine.packed or large or self.machine.cluster):
            self._pack(jobs[0].stage)
        large = large and max(job.stage.shape.body for job in jobs) >= THREADED_FROM
        with self.screen.task(title, jobs):
            outcome = self._fleet(large).run(jobs, _Recorder(self, study), stopping=lambda: self.control.stop)
        for job in jobs:
            results[job.stage.key] = outcome[str(job.run)]
        return results

    def _take_over(self, study: str, stages: Sequence[Stage], corpora: dict[str, str]) -> None:
        """Takes what other programs have trained for a study, each named once; a target is trained under its own name."""
        others = take_over(self.home, self.program, stages, corpora) if study else []
        for other in others:
            if (study, other) not in self._taken:
                self.screen.say(
                    f"{study}: runs of '{other}' in this home that are the same are taken over, not trained again"
                )
        self._taken |= {(study, other) for other in others}

    def _say_given_up(self, stages: Sequence[Stage], results: dict[str, Result]) -> None:
        """Names what is not tried again although another try might go better."""
        found = [
            (s, r["failed"]) for s in stages if "failed" in (r := results.get(s.key, {})) and not r.get("diverged")
        ]
        if found:
            first, reason = found[0]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self.screen.say(
                f"not tried again: {first.name}{more}, given up by an earlier call ({reason}); "
                "windtunnel clean --failed --really lets the next call try"
            )

    def use(self, study: str, runs: Sequence[str]) -> None:
        """Notes which run folders this session needs, so that ``clean`` knows them from those of earlier recipes."""
        used = self._used.setdefault(study, {})
        used |= dict.fromkeys(runs)
        with self.book as book:
            book.put_fact(self.program, "used", study, list(used))

    def used(self, study: str) -> list[str]:
        """The run folders of a study that this session needed so far."""
        return list(self._used.get(study, ()))

    def run_id(self, stage: Stage) -> str:
        return f"{self.program}/{stage.folder_name}"

    def record(self, stage: Stage, study: str, result: Result) -> None:
        """Writes a finished stage into the lab book: its row, metrics and scores."""
        self._record(stage, study, result)
        self.note(stage)

    def note(self, stage: Stage) -> None:
        """Keeps a copy of a run's row and scores in its folder, from which the lab book can be rebuilt."""
        note_run(self.book, self.run_id(stage), self.run_folder(stage))

    def _record(self, stage: Stage, study: str, result: Result) -> None:
        run, parent = self.run_id(stage), self.parent_checkpoint(stage)
        if "failed" not in result:
            forget_failure(self.run_folder(stage), stage)
        elif study and (parent is None or (parent / MANIFEST).is_file()):  # what never began is up to its parent
            diverged = result.get("diverged", False)
            write_failure(self.run_folder(stage), stage, result["failed"], diverged=diverged)
        with self.book as book:
            if "failed" in result:
                book.put_run(
                    run, **self._columns(stage, study), status="failed", reason=result["failed"], ended=time.time()
                )
                return
            rows = [
                (step, name, value)
                for step, values in read_metrics(self.run_folder(stage))
                for name, value in values.items()
            ]
            book.put_metrics(run, rows)
            for corpus, score in result["scores"].items():
                put_scores(book, run, corpus, score)
            book.put_run(
                run, **self._columns(stage, study), status="done", reason="", ended=time.time(), steps=result["step"],
                tokens=self._read(book, stage, result), flops=result["flops"],
                seconds=sum(result["seconds"].values()),
            )  # fmt: skip
        self.mirror.run(stage, rows)

    def _record_if_new(self, stage: Stage, study: str, result: Result) -> None:
        known = self.book.run(self.run_id(stage)) or {"status": ""}
        if "failed" in result:
            new = (known["status"], known.get("reason")) != ("failed", result["failed"])
        else:
            new = known["status"] != "done" or known["steps"] != result["step"]
        if new:
            self.record(stage, study, result)

    def _read(self, book: LabBook, stage: Stage, result: Result) -> int:
        """Tokens read by a run and by all that it grew from, whose rows and batches may be others."""
        parent, first = self.parent_checkpoint(stage), stage.first_step
        row = book.run(f"{parent.parents[3].name}/{parent.parents[1].name}") if parent and first else None
        if row is None or not row["tokens"]:
            return int(result["tokens"])
        above = Stage.from_dict(row["config"])
        unread = above.batches.sequences(int(row["steps"])) - above.batches.sequences(first)
        own = stage.batches.sequences(int(result["step"])) - stage.batches.sequences(first)
        return int(row["tokens"]) - unread * above.plan.row + own * stage.plan.row

    def _columns(self, stage: Stage, study: str) -> dict[str, Any]:
        parent = self.parent_checkpoint(stage)
        return {
            "program": self.program, "kind": stage.kind, "name": stage.name, "study": study, "config": stage.to_dict(),
            "folder": str(self.run_folder(stage).relative_to(self.home.root)),
            "parent": f"{parent.parents[3].name}/{parent.parents[1].name}" if parent else "",
        }  # fmt: skip

    def _forecasts(self) -> dict[str, str]:
        """Hash of the newest sealed forecast by the key of the stage that it is about, and of the trunk that stage grows from.

        A trunk with several branches has the forecast of the longest run.
        """
        known = [f for kind in (LAW, CURVE, ADAPTATION) for f in self.book.facts(self.program, kind).values()]
        newest = sorted(
            known, key=lambda fact: (str(fact["facts"].get("time", "")), fact["facts"].get("tokens_with_decay", 0))
        )
        return {
            key: fact["hash"] for fact in newest for facts in [fact["facts"]]
            for key in (facts.get("target"), facts.get("trunk"), *facts.get("same", ())) if key
        }  # fmt: skip

    def _pack(self, stage: Stage) -> None:
        """Measures once how many workers a GPU takes, on the shape of the first stage that is trained."""
        machine = self.machine
        each, seen = pack(lambda count: measure_together(stage, machine.device, count))
        self.machine = replace(machine, workers=each * machine.ranks, packed=True)
        with self.book as book:
            book.put_fact(
                self.program, "machine", "packing", {"workers_per_gpu": each, "tokens_per_second": dict(seen)}
            )
        rates = ", ".join(f"{count}: {si(rate)} tokens/s" for count, rate in seen) or "nothing could be measured"
        self.screen.say(f"{each} worker{'s' if each > 1 else ''} on each GPU ({rates})")

    def _fleet(self, large: bool) -> Fleet | RayFleet:
        machine = self.machine
        if machine.cluster and not large:
            return self._on_cluster(machine)
        name = "large" if large else "small"
        # Idle workers of the other kind give their memory back.
        for other in [n for n in self._fleets if n not in (name, "cluster")]:
            self._fleets.pop(other).close()
        if name not in self._fleets:
            log = self.home.program(self.program) / "workers.log"
            threads = machine.threads // machine.lanes if large else 1
            self._fleets[name] = Fleet(
                1 if large else machine.workers, log, threads=threads, devices=machine.device or None,
                world=machine.ranks if large else 1, lanes=machine.lanes if large else 1, eager=self._eager,
            )  # fmt: skip
        return self._fleets[name]

    def _on_cluster(self, machine: Machine) -> RayFleet:
        if "cluster" not in self._fleets:
            self._fleets["cluster"] = RayFleet(
                machine.cluster, machine.device or None, eager=self._eager, seats=machine.seats
            )
        return cast(RayFleet, self._fleets["cluster"])

    def need_all(self, stages: Sequence[Stage], results: dict[str, Result]) -> None:
        """Raises if a stage failed, and lets the next call try those again.

        Raises:
            WindtunnelError: naming the first failed stage and the reason.
        """
        failed = [stage for stage in stages if "failed" in results[stage.key]]
        for stage in failed:
            forget_failure(self.run_folder(stage), stage)
        if failed:
            reason = results[failed[0].key]["failed"]
            raise WindtunnelError(f"{failed[0].name} failed: {reason}; the same command tries again")


def put_scores(book: LabBook, run: str, corpus: str, score: dict[str, Any]) -> None:
    """A run's held-out loss on a corpus, in both units."""
    tokens = score["tokens"]
    book.put_score(run, corpus, "bits_per_byte", score["bits_per_byte"], "bits per UTF-8 byte", tokens)
    book.put_score(run, corpus, "nats_per_byte", score["nats"] / score["bytes"], "nats per UTF-8 byte", tokens)


def note_run(book: LabBook, run: str, folder: Path) -> None:
    """Writes a run's row and scores into its folder as they stand in the lab book."""
    row = {name: value for name, value in (book.run(run) or {}).items() if name != "config"}
    write_json(folder / RECORD, {"row": row, "scores": book.scores(run)})


class _Recorder:
    """Passes the fleet's words to the screen and its results to the lab book."""

    def __init__(self, desk: Desk, study: str) -> None:
        self._desk, self._study = desk, study

    def started(self, job: Job) -> None:
        with self._desk.book as book:
            book.put_run(self._desk.run_id(job.stage), status="running", started=time.time())
        self._desk.note(job.stage)
        self._desk.screen.started(job)

    def progress(self, job: Job, word: dict[str, Any]) -> None:
        self._desk.screen.progress(job, word)

    def say(self, text: str) -> None:
        self._desk.screen.say(text)

    def done(self, job: Job, result: Result, reason: str) -> None:
        self._desk.record(job.stage, self._study, result)
        self._desk.screen.done(job, result, reason)
