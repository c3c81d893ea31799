"""Mirrors metrics to TensorBoard, Weights & Biases or Trackio; the lab book stays the truth.

Training happens in other processes, so nothing here is on a step's path. Each sink has a thread and a bounded queue: a sink
that hangs loses rows, one that raises is dropped with one line.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from windtunnel.train.stage import Stage

Row = tuple[int, str, float | None]
Log = Callable[[str, list[Row]], None]
_ROOM = 1000
_PATIENCE = 5.0


class Mirror:
    """Hands finished rows to the sinks.

    Args:
        names: sinks, of ``tensorboard``, ``wandb`` and ``trackio`` (``pip install windtunnel[track]``).
        folder: where local sinks write.
        project: project name for sinks that have projects.
        say: receives a line when a sink is given up.
    """

    def __init__(self, names: Sequence[str], folder: Path, project: str, say: Callable[[str], None]) -> None:
        self._sinks = [_Sink(name, OPENERS[name], folder, project, say) for name in names]

    def run(self, stage: Stage, rows: list[Row]) -> None:
        """Queues a run's rows; returns at once."""
        for sink in self._sinks:
            sink.put(stage.folder_name, rows)

    def close(self) -> None:
        """Gives each sink a few seconds to finish."""
        for sink in self._sinks:
            sink.close()


class _Sink:
    def __init__(
        self, name: str, opener: Callable[[Path, str], Log], folder: Path, project: str, say: Callable[[str], None]
    ) -> None:
        self._name, self._say = name, say
        self._queue: queue.Queue[tuple[str, list[Row]] | None] = queue.Queue(_ROOM)
        self._thread = threading.Thread(target=self._work, args=(opener, folder, project), daemon=True)
        self._thread.start()

    def put(self, run: str, rows: list[Row]) -> None:
        with contextlib.suppress(queue.Full):  # a hanging sink loses rows, the lab book has them
            self._queue.put_nowait((run, rows))

    def _work(self, opener: Callable[[Path, str], Log], folder: Path, project: str) -> None:
        try:
            log = opener(folder, project)
            while (item := self._queue.get()) is not None:
                log(*item)
        except Exception as error:  # whatever a tracker does, the run goes on
            self._say(
                f"track: {self._name} is given up ({type(error).__name__}: {str(error)[:120]}); the lab book has all metrics"
            )

    def close(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_PATIENCE)


def _tensorboard(folder: Path, project: str) -> Log:
    module: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
    summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    writer: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")

    def log(run: str, rows: list[Row]) -> None:
        events = writer.EventFileWriter(str(folder / run))
        for step, name, value in rows:
            if value is not None:
                values = [summary.Summary.Value(tag=name, simple_value=value)]
                events.add_event(module.Event(step=step, summary=summary.Summary(value=values)))
        events.close()

    return log


def _project_logger(module_name: str) -> Callable[[Path, str], Log]:
    def opener(folder: Path, project: str) -> Log:
        module: Any = importlib.import_module(module_name)

        def log(run: str, rows: list[Row]) -> None:
            handle = module.init(project=project, name=run)
            by_step: dict[int, dict[str, float]] = {}
            for step, name, value in rows:
                if value is not None:
                    by_step.setdefault(step, {})[name] = value
            for step in sorted(by_step):
                handle.log(by_step[step], step=step)
            handle.finish()

        return log

    return opener


OPENERS: dict[str, Callable[[Path, str], Log]] = {
    "tensorboard": _tensorboard,
    "wandb": _project_logger("wandb"),
    "trackio": _project_logger("trackio"),
}
