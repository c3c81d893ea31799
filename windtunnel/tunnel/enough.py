"""Has the search gone on long enough? The gap between its best trial and the tuned optimum, with an interval. Needs no torch.

The losses of a search are a smooth surface over the unit cube (each axis from its low to its high end, on the axis's own
logarithm) with noise from the seed. The surface gets a Gaussian-process prior: a constant, a full quadratic and a Matérn-5/2
part for what is not quadratic, with hyper-parameters drawn from a fixed quasi-random set and weighed by their likelihood, so
that their uncertainty is part of the interval. Surfaces drawn from the posterior are lowered to their minimum over a cloud of
candidates; the gap of a draw is its value at the best trial minus that minimum.

Limits. It believes in smoothness: a second, narrow valley that no trial has met is not foreseen. It knows the space it was
given: a better point beyond an edge is not counted, and the minimum is looked for over a finite cloud. Below about two trials
for each axis it says nothing. Trials that diverged are left out, and losses far above the first round's median are lowered to
where they only say "not here".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windtunnel.tunnel.propose import Trial
from windtunnel.tunnel.space import Axis, Space

Array = NDArray[np.float64]
_HYPER = 128
"""Hyper-parameter sets that are weighed; the posterior is drawn from those that the likelihood leaves."""
_SETS, _DRAWS = 12, 32
_GLOBAL, _LOCAL = 64, 128
_MOST = 160
"""Trials that enter the estimate: its cost grows with their cube."""
_JITTER = 1e-9


@dataclass(frozen=True)
class Gap:
    """How much loss lies between the best trial and the tuned optimum, in the losses' unit.

    ``value`` is the median; the gap lies between ``low``, which is zero, and ``high`` with probability 0.9: surfaces drawn from
    the posterior dip a little everywhere, so their lower quantiles overstate the gap and are not used. ``noise`` is the
    standard deviation from seed to seed. ``more`` is the number of further trials after which the gap is expected to be under
    the noise: 0 if it is now.
    """

    value: float
    low: float
    high: float
    noise: float
    more: int

    @property
    def enough(self) -> bool:
        """Whether the upper end of the gap is under the seed noise: no further trial can be told from the best."""
        return self.high < self.noise

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "enough": self.enough}


def places(space: Space, values: Sequence[dict[str, Any]]) -> Array:
    """Points of a space as rows of coordinates: 0 to 1 along each axis; a choice has one coordinate for each further option."""
    rows = []
    for point in values:
        row: list[float] = []
        for axis in space:
            if isinstance(axis, Axis):
                row.append(axis.place(float(point[axis.name])))
            else:
                row += [float(point[axis.name] == option) for option in axis.options[1:]]
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)


def remaining_gap(space: Space, trials: Sequence[Trial], noise: float | None = None, seed: int = 0) -> Gap | None:
    """The gap after the trials of a search; None while there are fewer than two for each coordinate, and at least six.

    Args:
        noise: standard deviation of the loss from seed to seed, if it was measured; else it is read off the surface.
    """
    done = [t for t in trials if t.loss is not None and math.isfinite(t.loss)]
    points = places(space, [t.values for t in done])
    if len(done) < max(6, 2 * points.shape[1]):
        return None
    losses = np.array([t.loss for t in done], dtype=np.float64)
    if len(done) > _MOST:  # the first round says where the walls are, the best say the rest
        first = np.arange(len(done)) < max(4, 2 * points.shape[1])
        kept = first | (np.argsort(np.argsort(losses)) < _MOST - int(first.sum()))
        points, losses = points[kept], losses[kept]
    return gap_of(points, losses, noise, seed)


def gap_of(points: Array, losses: Array, noise: float | None = None, seed: int = 0) -> Gap:
    """The gap for points in the unit cube, shape (trials, axes), and their losses, shape (trials,)."""
    y = _lowered(losses, points.shape[1])
    centre, scale = float(np.median(y)), float(np.std(y)) or 1.0
    sets = _posterior_sets(points, (y - centre) / scale, None if noise is None else noise / scale, seed)
    best = int(np.argmin(losses))
    cloud = _candidates(points, losses, seed)
    draws = np.concatenate([_draw(points, (y - centre) / scale, cloud, one, seed + i) for i, one in enumerate(sets)])
    at_best = draws[:, best]
    gaps = scale * (at_best - draws.min(axis=1))
    sigma = noise if noise is not None else scale * float(np.median([one[3] for one in sets]))
    middle, high = (float(q) for q in np.quantile(gaps, (0.5, 0.9)))
    return Gap(middle, 0.0, high, float(sigma), _more(middle, sigma, len(losses), points.shape[1]))


def _lowered(losses: Array, axes: int) -> Array:
    """Losses of which none exceeds four times what the first round's median lies above the best: the far walls say no more.

    The first round covers the space; later ones crowd around the best, so that their spread says nothing about the walls.
    """
    best = float(losses.min())
    far = float(np.median(losses[: max(4, 2 * axes)])) - best
    return np.minimum(losses, best + 4 * far) if far > 0 else losses


def _more(gap: float, noise: float, trials: int, axes: int) -> int:
    """Further trials until the gap is expected to be under the noise.

    Near a minimum the best of n independent points lies n^(−2/axes) above it; a Bayesian search narrows as it goes, for which
    the exponent is taken half as large again, and at least 1: a rule of thumb of ours.
    """
    if gap <= noise or noise <= 0:
        return 0
    rate = max(1.0, 3.0 / axes)
    return min(100_000, math.ceil(trials * ((gap / noise) ** (1 / rate) - 1)))


def _spread(number: int, dimensions: int, seed: int) -> Array:
    """Points spread evenly over the unit cube: an additive recurrence with the powers of the generalised golden ratio."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    return (np.random.default_rng(seed).random(dimensions) + np.arange(1, number + 1)[:, None] * steps) % 1.0


@cache
def _hyper(seed: int) -> Array:
    """Sets of (quadratic part, Matérn part, its length, noise), log-uniform, in units of the losses' deviation."""
    unit = _spread(_HYPER, 4, seed)
    low = np.log([0.3, 0.0003, 0.3, 0.0005])
    high = np.log([6.0, 1.0, 3.0, 0.5])
    return np.exp(low + unit * (high - low))


def _posterior_sets(x: Array, y: Array, noise: float | None, seed: int) -> Array:
    """Hyper-parameter sets drawn in proportion to their likelihood, shape (sets, 4)."""
    sets = _hyper(seed).copy()
    if noise is not None:
        sets[:, 3] = max(noise, 1e-4)
    polynomial, distance = _polynomial(x, x), _distance(x, x)
    size = len(y)
    kernels = np.stack([_kernel(polynomial, distance, one) for one in sets])
    kernels += (sets[:, 3, None, None] ** 2 + _JITTER) * np.eye(size)
    factor = np.linalg.cholesky(kernels)
    half = np.linalg.solve(factor, np.broadcast_to(y[:, None], (len(sets), size, 1)))[..., 0]
    fit = -0.5 * (half**2).sum(axis=1) - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
    weight = np.exp(fit - fit.max())
    steps = (np.arange(_SETS) + 0.5) / _SETS
    return sets[np.searchsorted(np.cumsum(weight) / weight.sum(), steps).clip(max=len(sets) - 1)]


def _polynomial(a: Array, b: Array) -> Array:
    """Kernel of a constant, linear and quadratic terms of coordinates from −1 to 1."""
    dimensions = a.shape[1]
    return (1 + (2 * a - 1) @ (2 * b - 1).T / math.sqrt(dimensions)) ** 2


def _distance(a: Array, b: Array) -> Array:
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0.0) / a.shape[1])


def _kernel(polynomial: Array, distance: Array, hyper: Array) -> Array:
    quadratic, rest, length, _ = hyper
    r = math.sqrt(5) * distance / length
    return quadratic**2 * polynomial / 4 + rest**2 * (1 + r + r**2 / 3) * np.exp(-r)


def _candidates(x: Array, losses: Array, seed: int) -> Array:
    """Where a minimum is looked for: the trials, points all over the cube, and a cloud around the best trials."""
    random = np.random.default_rng(seed)
    size, dimensions = x.shape
    everywhere = _spread(_GLOBAL, dimensions, seed)
    top = x[np.argsort(losses)[: max(2, size // 6)]]
    spread = 10.0 ** random.uniform(-1.8, -0.5, (_LOCAL, 1))
    near = top[random.integers(len(top), size=_LOCAL)] + spread * random.standard_normal((_LOCAL, dimensions))
    return np.concatenate([x, everywhere, near.clip(0, 1)])


def _draw(x: Array, y: Array, cloud: Array, hyper: Array, seed: int) -> Array:
    """Surfaces from the posterior at the cloud's points, shape (draws, points)."""
    own = _kernel(_polynomial(x, x), _distance(x, x), hyper) + (hyper[3] ** 2 + _JITTER) * np.eye(len(x))
    cross = _kernel(_polynomial(x, cloud), _distance(x, cloud), hyper)
    factor = np.linalg.cholesky(own)
    half = np.linalg.solve(factor, cross)
    mean = half.T @ np.linalg.solve(factor, y)
    spread = _kernel(_polynomial(cloud, cloud), _distance(cloud, cloud), hyper) - half.T @ half
    root = np.linalg.cholesky(spread + 1e-8 * (1 + float(np.trace(spread)) / len(cloud)) * np.eye(len(cloud)))
    return mean + np.random.default_rng(seed).standard_normal((_DRAWS, len(cloud))) @ root.T
