"""What an adaptation will do to each corpus, from short branches of it: a forecast, sealed like every other.

With y the logarithm of a corpus' loss over what it was before, and d its change from the last but one length to the last,
two more doublings bring y + 2d if every doubling brings as much, and y + .75·d if each brings half of the one before; the
forecast is the middle, and its interval adds half the distance of the two to the noise over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windtunnel.laws.fit import LawError, student_quantile
from windtunnel.laws.sealed import Interval

_ALIKE, _HALVED = 2.0, 0.75


@dataclass(frozen=True)
class Gain:
    """One corpus in bits per UTF-8 byte. ``changes`` [seed][length]: log loss of the short branches over ``before``."""

    before: float
    expected: Interval
    naive: dict[str, Interval]
    """``largest``: the longest short branches as they are. ``line``: on straight in the length's logarithm, the last doubling's
    change twice more. Both with the noise over seeds alone; nothing without a second seed."""
    changes: tuple[tuple[float, ...], ...]

    @property
    def share(self) -> tuple[float, float, float]:
        """Expected loss over the loss before - 1, with its 90 % interval."""
        low, value, high = (
            x / self.before - 1 for x in (self.expected.low90, self.expected.value, self.expected.high90)
        )
        return value, low, high

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": self.before, "expected": asdict(self.expected),
            "naive": {name: asdict(value) for name, value in self.naive.items()},
            "changes": [list(row) for row in self.changes],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gain:
        """The gain that ``to_dict`` wrote.

        Raises:
            LawError: a field is missing or of the wrong kind.
        """
        try:
            naive = {str(name): Interval.from_dict(value) for name, value in data["naive"].items()}
            changes = tuple(tuple(float(y) for y in row) for row in data["changes"])
            return cls(float(data["before"]), Interval.from_dict(data["expected"]), naive, changes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LawError("forecast", f"expected a gain as windtunnel writes it, got {error!r}") from None


def gain(before: float, losses: Sequence[Sequence[float]]) -> Gain:
    """A corpus' loss after four times the last of the lengths.

    Args:
        before: bits per byte of the model as it is.
        losses: bits per byte of the short branches, [seed][length]; each length is twice the one before.
    """
    changes = tuple(tuple(math.log(loss / before) for loss in row) for row in losses)
    middle = (_ALIKE + _HALVED) / 2
    value, noise = _run([y[-1] + middle * (y[-1] - y[-2]) for y in changes])
    steps = [abs(y[-1] - y[-2]) for y in changes]
    half = math.hypot(noise, (_ALIKE - _HALVED) / 2 * statistics.fmean(steps))
    guesses = {"largest": [y[-1] for y in changes], "line": [y[-1] + _ALIKE * (y[-1] - y[-2]) for y in changes]}
    naive = {name: _around(before, *_run(values)) for name, values in guesses.items()} if len(changes) > 1 else {}
    return Gain(before, _around(before, value, half), naive, changes)


def _run(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the 90 % interval of one more run (Student's t); nothing is known of it from one seed."""
    count = len(values)
    if count < 2:
        return values[0], 0.0
    half = student_quantile(count - 1, 0.95) * statistics.stdev(values) * math.sqrt(1 + 1 / count)
    return statistics.fmean(values), half


def _around(before: float, change: float, half: float) -> Interval:
    return Interval.around(math.log(before) + change, half / student_quantile(math.inf, 0.95), math.inf)
