"""Which trials of a rung go on to the next: the best share of those judged, or those forecast to end lowest. Needs no torch.

Ranks change while trials train: a high learning rate leads early and loses later, so that halving by rank gives up the trials
that would have won. ``ByForecast`` learns from the trials that went on how much a rung still changes a loss, and lets those go on
whose last loss it forecasts lowest. The gain from one rung to the next is a Bayesian linear regression on the loss, on what the
rung before it gained, on the place of the trial in the space and on the square of the learning rate's place (the best rate drifts
with the length, nothing else is known to). Forecasts of several rungs are chained. ``bench/search.py pruning`` compares both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from windtunnel.tunnel.enough import places
from windtunnel.tunnel.space import Axis, Space, Values

Array = NDArray[np.float64]
Judged = Sequence[Mapping[int, float | None]]
"""For each rung the losses by trial number, None for a trial that diverged there."""

ETA = 4
BUDGET = 0.3
"""Share of the tokens of all trials in full that a search with forecasts spends."""
_LAST = 0.75
"""What the last rung gets of the tokens that the first leaves over; the rungs between share the rest."""
_NOISE, _WEIGHT, _LEVEL = 0.15, 1.0, 10.0
"""Deviations of a loss, of a slope and of the common gain that are expected beforehand, in units of (median − best) of the first
rung's losses."""
_OPTIMISM = 0.5
"""Deviations by which a forecast is lowered before it is compared: who is little known gets a chance."""


@dataclass(frozen=True)
class Rung:
    """One rung in steps: the trunk's length where the branch leaves it, and the branch's own."""

    trunk: int
    decay: int


class Promotion(Protocol):
    """A rule of promotion, and what it expects of trials that were given up."""

    def promoted(self, judged: Judged, rung: int) -> list[int]:
        """The trials that go from a rung to the next and have not, in the order of their numbers."""
        ...

    def guess(self, judged: Judged, number: int) -> float | None:
        """The loss that an unfinished trial would probably have reached; None for one that diverged."""
        ...


@dataclass(frozen=True)
class ByRank:
    """Asynchronous successive halving (arXiv 1810.05934): the best 1/eta, rounded up, of those judged on a rung."""

    eta: float = ETA

    def promoted(self, judged: Judged, rung: int) -> list[int]:
        known = sorted((loss, number) for number, loss in judged[rung].items() if loss is not None)
        best = [number for _, number in known[: math.ceil(len(judged[rung]) / self.eta)]]
        return sorted(number for number in best if number not in judged[rung + 1])

    def guess(self, judged: Judged, number: int) -> float | None:
        """Its last loss, less the median of what others gained from there on."""
        at = _reached(judged, number)
        if at is None:
            return None
        ends = {other: last for other, last in judged[-1].items() if last is not None}
        gains = sorted(here - ends[other] for other in ends if (here := judged[at].get(other)) is not None)
        return float(judged[at][number] or 0.0) - (gains[len(gains) // 2] if gains else 0.0)


@dataclass(frozen=True)
class ByForecast:
    """Those whose last loss is forecast lowest, as many as the budget allows after the trials so far.

    ``place`` gives the trials' places as rows of coordinates from −1 to 1, shape (trials, axes); ``rate`` is the learning rate's
    column. A trial so short that its first rung takes more than half of the budget overspends it.
    """

    rungs: tuple[Rung, ...]
    place: Callable[[Sequence[int]], Array]
    rate: int | None = None
    budget: float = BUDGET

    def quota(self, seen: int, rung: int) -> int:
        """How many of the trials seen so far may have reached a rung."""
        if rung == 0:
            return seen
        whole, last = self.rungs[-1].trunk + self.rungs[-1].decay, len(self.rungs) - 1
        left = max(self.budget - (self.rungs[0].trunk + self.rungs[0].decay) / whole, self.budget / 2)
        part = left * (_LAST if rung == last else (1 - _LAST) / (last - 1)) if last > 1 else left
        cost = (self.rungs[rung].trunk - self.rungs[rung - 1].trunk + self.rungs[rung].decay) / whole
        return min(self.quota(seen, rung - 1), max(1, math.floor(seen * part / cost)))

    def promoted(self, judged: Judged, rung: int) -> list[int]:
        room = self.quota(len(judged[0]), rung + 1) - len(judged[rung + 1])
        waiting = [n for n, loss in judged[rung].items() if loss is not None and n not in judged[rung + 1]]
        if room <= 0 or not waiting:
            return []
        mean, deviation = self._foretell(judged, rung, waiting)
        order = sorted(zip((mean - _OPTIMISM * deviation).tolist(), waiting, strict=True))
        return sorted(number for _, number in order[:room])

    def guess(self, judged: Judged, number: int) -> float | None:
        at = _reached(judged, number)
        return None if at is None else float(self._foretell(judged, at, [number])[0][0])

    def _foretell(self, judged: Judged, rung: int, numbers: Sequence[int]) -> tuple[Array, Array]:
        """Mean and deviation of the last losses of trials that stand on a rung."""
        first = np.array([loss for loss in judged[0].values() if loss is not None])
        low = float(first.min())
        scale = float(np.median(first)) - low or 1.0

        def climbed(those: Sequence[int], last: int) -> Array:
            return np.array([[(float(judged[r][n] or 0.0) - low) / scale for r in range(last + 1)] for n in those])

        losses, place, deviation = climbed(numbers, rung), self.place(numbers), np.zeros(len(numbers))
        for level in range(rung + 1, len(self.rungs)):
            known = [number for number, loss in judged[level].items() if loss is not None]
            deviation = np.zeros(len(numbers))
            gain = np.zeros(len(numbers))
            if known:
                taught, own = climbed(known, level), self._features(losses, place)
                features = self._features(taught[:, :-1], self.place(known))
                weights, spread = _regress(features, taught[:, -1] - taught[:, -2])
                gain = own @ weights
                deviation = np.sqrt(np.einsum("ij,jk,ik->i", own, spread, own))
            losses = np.column_stack([losses, losses[:, -1] + gain])
        return low + scale * losses[:, -1], scale * deviation

    def _features(self, losses: Array, place: Array) -> Array:
        square = place[:, [self.rate]] ** 2 if self.rate is not None else place[:, :0]
        return np.hstack(
            [np.ones((len(losses), 1)), losses[:, -1:] - 0.5, np.diff(losses, axis=1), place, square]
        )  # fmt: skip


def _reached(judged: Judged, number: int) -> int | None:
    """The highest rung on which a trial was judged; None for one that diverged there or was never judged."""
    rungs = [rung for rung, losses in enumerate(judged) if number in losses]
    return rungs[-1] if rungs and judged[rungs[-1]][number] is not None else None


def _regress(features: Array, gains: Array) -> tuple[Array, Array]:
    """Mean and covariance of the weights of a linear regression with a normal prior around nothing."""
    prior = np.full(features.shape[1], _WEIGHT)
    prior[0] = _LEVEL
    spread: Array = np.linalg.inv(features.T @ features / _NOISE**2 + np.diag(prior**-2.0)).astype(np.float64)
    return spread @ features.T @ gains / _NOISE**2, spread


def places_of(space: Space, values: Mapping[int, Values]) -> Callable[[Sequence[int]], Array]:
    """Places of trials in a space by their numbers, −1 to 1 along each axis; the values may grow as trials come."""
    return lambda numbers: 2 * places(space, [values[number] for number in numbers]) - 1


def rate_column(space: Space) -> int | None:
    """The column of the learning rate among the places of a space."""
    column = 0
    for axis in space:
        if axis.name == "learning_rate":
            return column
        column += 1 if isinstance(axis, Axis) else len(axis.options) - 1
    return None
