"""How a running stage hears from the outside: stop requests, and word of its progress to whoever shows it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import ClassVar


@dataclass(frozen=True)
class Progress:
    """One word about a running stage. ``utilisation`` is exact FLOPs a second over the given peak, 0 if unknown."""

    stage: str
    step: int
    steps: int
    loss: float
    tokens_per_second: float
    eta: float


@dataclass
class Control:
    """What a stage asks at every step boundary, and what it tells.

    ``stop`` is only a flag: a signal handler sets it and the loop acts at the next step boundary, so nothing is ever saved
    inside a handler. ``tell`` receives progress at most every ``interval`` seconds, ``say`` one-line notices.
    """

    tell: Callable[[Progress], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None
    interval: float = 0.5
    stop: bool = False
    finish: Callable[[], bool] = lambda: False
    _told: float = field(default=0.0, repr=False)

    def request_stop(self, *_: object) -> None:
        """Asks for a clean stop at the next step boundary."""
        self.stop = True

    def due(self) -> bool:
        """Whether it is time to tell something again."""
        now = time.monotonic()
        if now - self._told < self.interval:
            return False
        self._told = now
        return True


class StopOnSignals:
    """While active, the first SIGINT or SIGTERM asks for a clean stop; a second one interrupts as usual."""

    active: ClassVar[list[Control]] = []
    """Those of this process, as signals are: for what waits without a control of its own."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __enter__(self) -> Control:
        self._before = {int(number): signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self.active.append(self._control)
        return self._control

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._control.request_stop()
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        self.active.remove(self._control)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop_wanted() -> bool:
    """Whether a signal has asked this process for a clean stop."""
    return any(control.stop for control in StopOnSignals.active)
