"""A run's own metrics: one JSON line a step in ``metrics.jsonl``, from which the lab book is filled and can be rebuilt."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from windtunnel.base.artefact import explained, write_bytes

FILE = "metrics.jsonl"
LIVE = ("max", "cosine", "d1", "d2", "curvature")
"""What a probe (``train/pairs.py``) adds to the metrics of a step, about it and the step before, as ``pair_max`` and so on; for
the parameters of one role, ``norm`` too, as ``pair_max/hidden``."""
MOVE = "pair_move/"
"""Before the name of a matrix: the largest change of its entries in the first of the two updates."""
_FLUSH_SECONDS = 2.0


class Metrics:
    """Appends one line for each step. Steps after ``step`` and up to ``last`` are dropped first: they will be trained again,
    bit for bit."""

    def __init__(self, run: Path, step: int, last: int) -> None:
        self._path = run / FILE
        lines = [json.dumps([at, values]) + "\n" for at, values in read_metrics(run) if not step < at <= last]
        write_bytes(self._path, "".join(lines).encode())
        with explained(self._path):
            self._stream = self._path.open("a", encoding="utf-8")
        self._flushed = time.monotonic()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Records the metrics of a step; non-finite values are written as null."""
        clean = {
            name: value if value == value and abs(value) != float("inf") else None for name, value in values.items()
        }
        with explained(self._path):
            self._stream.write(json.dumps([step, clean]) + "\n")
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands all lines to the operating system."""
        with explained(self._path):
            self._stream.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # flush has said it
                self._stream.close()


def read_metrics(run: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    """The recorded steps of a run in file order; a line that a kill tore is left out."""
    try:
        text = (run / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            step, values = json.loads(line)
        except ValueError:
            continue
        yield step, values


def last_loss(run: Path, step: int, count: int = 100) -> float:
    """Mean training loss of the last (at most 100) steps up to ``step``, however often the run was interrupted; 0 without any."""
    losses = {at: values.get("loss") for at, values in read_metrics(run) if step - count < at <= step}
    finite = [value for value in losses.values() if value is not None]
    return sum(finite) / max(1, len(finite))
