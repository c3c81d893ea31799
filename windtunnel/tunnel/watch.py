"""What a person sees while the fleet works: a bar for the task, a line for each running stage; plain lines without a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

from windtunnel.base.units import duration, si
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import Job

_PLAIN_SECONDS = 15.0
_VARIED: dict[str, Callable[[Stage], float | str]] = {
    "lr": lambda stage: stage.optimizer.learning_rate,
    "std": lambda stage: stage.parametrization.init_std,
    "emb": lambda stage: stage.parametrization.scale_emb,
    "depth": lambda stage: stage.parametrization.scale_depth,
    "wd": lambda stage: stage.optimizer.weight_decay,
    "decay": lambda stage: stage.optimizer.decay,
    "β₂": lambda stage: stage.optimizer.beta2,
    "warmup": lambda stage: stage.schedule.warmup,
    "batch": lambda stage: stage.batch * stage.plan.row,
    "qk": lambda stage: "on" if stage.shape.qk_norm else "off",
    "opt": lambda stage: stage.optimizer.kind,
}
"""What trials of one study may differ in, by the short names that a line has room for."""


class Screen:
    """Shows progress on the standard error stream, which leaves standard output to results."""

    def __init__(self, *, quiet: bool = False, peak_flops: float = 0.0) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self.console.is_terminal and not quiet
        self._peak, self._progress = peak_flops, None
        self._lines: dict[str, TaskID] = {}
        self._done: dict[str, float] = {}
        self._title, self._total, self._whole = "", 0.0, TaskID(0)
        self._begun = self._printed = time.monotonic()
        self._best: tuple[float, Stage] | None = None
        self._seen: dict[str, set[float | str]] = {}

    def say(self, text: str) -> None:
        """One notice line."""
        self.console.print(text, style="yellow" if self._live else None, markup=False, soft_wrap=not self._live)

    @contextmanager
    def task(self, title: str, jobs: list[Job]) -> Iterator[None]:
        """Shows a group of jobs as one task whose length is their FLOPs.

        The best trial so far stays over the rounds of a study, and so does what its trials differ in.
        """
        if title.partition(":")[0] != self._title.partition(":")[0]:
            self._best, self._seen = None, {}
        for name, of in _VARIED.items():
            self._seen.setdefault(name, set()).update(of(job.stage) for job in jobs if job.stage.kind == "trial")
        self._title, self._total = title, max(1.0, sum(job.stage.flops for job in jobs))
        self._done, self._begun = {}, time.monotonic()
        if not self._live:
            yield
            return
        with Progress(*_columns(), console=self.console, transient=True) as self._progress:
            self._whole = self._progress.add_task(title, total=self._total, note="")
            yield
        self._progress, self._lines = None, {}

    @contextmanager
    def counting(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Shows how much of some pieces has ended; what it gives is called after each with the piece's part of ``total``."""
        self._title, self._total, self._done, self._best = title, max(1.0, total), {"": 0.0}, None
        self._begun = time.monotonic()
        with Progress(*_columns(), console=self.console, transient=True, disable=not self._live) as bar:
            task = bar.add_task(title, total=total, note="")

            def ended(part: float) -> None:
                self._done[""] += part
                bar.update(task, completed=self._done[""], note=self._left())
                if not self._live:
                    self.say(f"{title}: {100 * self._done[''] / self._total:.0f} %, {self._left()}")

            yield ended

    def started(self, job: Job) -> None:
        if self._progress is not None:
            self._lines[str(job.run)] = self._progress.add_task(
                f"  {self._words(job.stage)}", total=job.stage.flops, note="compiling"
            )

    def progress(self, job: Job, word: dict[str, Any]) -> None:
        batches, row = job.stage.batches, job.stage.plan.row  # steps need not be equally long
        left = (batches.sequences(word["steps"]) - batches.sequences(word["step"])) * row
        share = 1 - left / max(1, job.stage.own_tokens)
        self._done[str(job.run)] = share * job.stage.flops
        per_token = job.stage.shape.flops_per_token(job.stage.plan.row).total
        used = f" · {100 * word['tokens_per_second'] * per_token / self._peak:.0f} % of peak" if self._peak else ""
        note = (
            f"loss {word['loss']:.3f} · {si(word['tokens_per_second'])} tokens/s{used} · {duration(word['eta'])} left"
        )
        if self._progress is not None:
            self._progress.update(self._lines[str(job.run)], completed=self._done[str(job.run)], note=note)
            self._progress.update(self._whole, completed=sum(self._done.values()), note=self._left())
        elif time.monotonic() - self._printed > _PLAIN_SECONDS:
            self._printed = time.monotonic()
            share = sum(self._done.values()) / self._total
            self.console.print(
                f"{self._title}: {100 * share:.0f} %, {self._left()} · {self._words(job.stage)}: {note}",
                markup=False,
                soft_wrap=True,
            )

    def done(self, job: Job, result: dict[str, Any], reason: str) -> None:
        self._done[str(job.run)] = job.stage.flops
        self._compare(job, result)
        if self._progress is not None:
            line = self._lines.pop(str(job.run), None)
            if line is not None:
                self._progress.remove_task(line)
            self._progress.update(self._whole, completed=sum(self._done.values()), note=self._left())
        if reason:
            self.say(f"{job.stage.name}: {reason}")

    def _compare(self, job: Job, result: dict[str, Any]) -> None:
        """Keeps the trial with the lowest held-out loss over the mixture it was trained on."""
        scores = result.get("scores", {})
        mixture = job.stage.plan.segments[-1].mixture
        if job.stage.kind != "trial" or any(name not in scores for name, _ in mixture):
            return
        total = sum(weight for _, weight in mixture)
        loss = sum(w / total * scores[name]["nats"] / scores[name]["bytes"] for name, w in mixture)
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = (loss, job.stage)

    def _left(self) -> str:
        best = f" · best so far {self._best[0]:.4f} nats per byte ({self._words(self._best[1])})" if self._best else ""
        share = min(1.0, sum(self._done.values()) / self._total)
        spent = time.monotonic() - self._begun
        left = f"about {duration(spent * (1 - share) / share)} left" if share > 0.02 else "…"
        return left + best

    def _words(self, stage: Stage) -> str:
        """A stage's name and size; of a trial also what the trials of its study have not in common."""
        varied = {name: of(stage) for name, of in _VARIED.items() if len(self._seen.get(name, ())) > 1}
        values = [f"{name} {v if isinstance(v, str) else format(v, '.3g')}" for name, v in varied.items()]
        words = [stage.name, si(stage.shape.body), *([", ".join(values)] if values and stage.kind == "trial" else [])]
        return " · ".join(words)


def _columns() -> tuple[ProgressColumn, ...]:
    """Of a bar: what it is, how far, what is left, and since when."""
    share, note = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[note]}")
    return TextColumn("{task.description}"), BarColumn(bar_width=28), share, note, TimeElapsedColumn()
