"""Where the lead of one side over another turns: at which length do they break even?

A lead that was measured at several lengths is a straight line over the logarithm of the length, fitted for each seed. The lines'
mean with its 90 % interval over seeds (Student's t, n - 1 degrees of freedom) says where it crosses zero, and between which
lengths it cannot be told from zero. That interval knows the noise from seed to seed; it does not know whether the line goes on
as it is, so nothing is said beyond ``REACH`` times the longest length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from windtunnel.laws.fit import Array, LawError, student_quantile

REACH = 10.0
"""Times the longest measured length."""
_GRID = 4001

Outcome = Literal["overtakes", "is overtaken", "ahead", "behind", "cannot tell"]


@dataclass(frozen=True)
class BreakEven:
    """What becomes of a lead from the shortest measured length to ``REACH`` times the longest.

    ``overtakes`` and ``is overtaken``: the lead's mean crosses zero at ``at``, upwards or downwards, and between ``low`` and
    ``high`` it cannot be told from zero; a limit is None where that range is open on its side. ``ahead`` and ``behind``: it
    crosses nowhere, and at the longest measured length it is told from zero. ``cannot tell``: neither.
    """

    outcome: Outcome
    at: float | None
    low: float | None
    high: float | None
    shortest: float
    longest: float

    @property
    def reach(self) -> float | None:
        """How many times the longest measured length the crossing lies at; None without one."""
        return self.at / self.longest if self.at is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reach": self.reach}


def break_even(lengths: Sequence[float], leads: Sequence[Sequence[float]]) -> BreakEven:
    """Where the mean lead crosses zero.

    Args:
        lengths: at least two, rising.
        leads: [seed][length]; positive where the side that is asked about is ahead.

    Raises:
        LawError: fewer than two lengths, or a lead that is not finite.
    """
    rows = np.array(leads, float)
    if len(lengths) < 2 or not np.isfinite(rows).all():
        raise LawError("break-even", f"expected finite leads at two lengths or more, got {len(lengths)} lengths")
    x = np.log(np.array(lengths, float) / lengths[-1])
    centred = x - x.mean()
    slopes: Array = rows @ centred / (centred @ centred)
    levels: Array = rows.mean(1) - slopes * x.mean()
    grid: Array = np.linspace(float(x[0]), math.log(REACH), _GRID)
    lines: Array = slopes[:, None] * grid + levels[:, None]
    mean: Array = lines.mean(0)
    half = _half_width(lines)
    told, slope, level = np.abs(mean) > half, float(slopes.mean()), float(levels.mean())
    crossing = -level / slope if slope else math.nan
    if not grid[0] <= crossing <= grid[-1]:
        longest = int(np.argmin(np.abs(grid)))
        outcome: Outcome = "cannot tell" if not told[longest] else "ahead" if mean[longest] > 0 else "behind"
        return BreakEven(outcome, None, None, None, lengths[0], lengths[-1])
    place = int(np.argmin(np.abs(grid - crossing)))
    below, above = np.flatnonzero(told[:place]), place + 1 + np.flatnonzero(told[place + 1 :])
    low = lengths[-1] * math.exp(grid[below[-1]]) if len(below) else None
    high = lengths[-1] * math.exp(grid[above[0]]) if len(above) else None
    crosses: Outcome = "overtakes" if slope > 0 else "is overtaken"
    known = low is not None or high is not None
    at = lengths[-1] * math.exp(crossing)
    return BreakEven(crosses if known else "cannot tell", at, low, high, lengths[0], lengths[-1])


def _half_width(lines: Array) -> Array:
    """Half of the mean's 90 % interval at each place; infinite for a single seed."""
    seeds = len(lines)
    if seeds < 2:
        return np.full_like(lines[0], math.inf)
    squares: Array = ((lines - lines.mean(0)) ** 2).sum(0)
    error: Array = np.sqrt(squares / (seeds * (seeds - 1)))
    return error * student_quantile(seeds - 1, 0.95)
