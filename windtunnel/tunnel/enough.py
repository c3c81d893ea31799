"""Has the search gone on long enough? The gap between its best trial and the tuned optimum, with an interval. Needs no torch.

The losses of a search are a smooth surface over the unit cube (each axis from its low to its high end, on the axis's own
logarithm) with noise from the seed. Far above the best they are compressed logarithmically, as far as the data say so: walls say
"not here" and their steepness little more. The surface gets a Gaussian-process prior: a constant, a full quadratic and a
Matérn-5/2 part for what is not quadratic, each axis with a weight of its own, since a loss usually hangs on two of four
hyper-parameters. Amplitudes, length, noise, weights and the compression are drawn from their posterior by a Metropolis walk with
a fixed seed, so that their uncertainty is part of the interval. Surfaces drawn from the posterior are lowered to their minimum
over a cloud of candidates; the gap of a draw is its value at the best trial minus that minimum.

Limits. It believes in smoothness: a second, narrow valley that no trial has met is not foreseen. It knows the space it was
given: a better point beyond an edge is not counted, and the minimum is looked for over a finite cloud. Below about two trials
for each axis it says nothing. Trials that diverged are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windtunnel.tunnel.propose import Trial
from windtunnel.tunnel.space import Axis, Space

Array = NDArray[np.float64]
_FIRST, _WALK, _PACE = 200, 1200, 0.25
"""Hyper-parameter sets among which the walk's start is looked for, its steps, and a step's deviation as a share of each range."""
_SETS, _DRAWS = 12, 32
NOISE, WARP, WEIGHTS = 3, 4, slice(5, None)
"""Where a hyper-parameter set has its noise, the height from which losses are compressed, and the axes' weights."""
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
        """Whether the gap is under the seed noise: what is left to find can no longer be told from the best."""
        return self.value < self.noise

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
    scale = _far(losses, points.shape[1])
    y = (losses - losses.min()) / scale
    sets = _posterior_sets(points, y, None if noise is None else noise / scale, seed)
    best = int(np.argmin(losses))
    cloud = _candidates(points, losses, seed)
    gaps = []
    for i, one in enumerate(sets):
        draws = _draw(points, _softened(y, one[WARP]), cloud, one, seed + i)
        gaps.append(_hardened(draws[:, best], one[WARP]) - _hardened(draws.min(axis=1), one[WARP]))
    sigma = noise if noise is not None else scale * float(np.median(sets[:, NOISE]))
    middle, high = (scale * float(q) for q in np.quantile(np.concatenate(gaps), (0.5, 0.9)))
    return Gap(middle, 0.0, high, float(sigma), _more(middle, sigma, len(losses), points.shape[1]))


def _far(losses: Array, axes: int) -> float:
    """How far above the best the first round's median lies; the unit of everything below.

    The first round covers the space; later ones crowd around the best, so that their spread says nothing about the walls.
    """
    far = float(np.median(losses[: max(4, 2 * axes)]) - losses.min())
    return far or float(np.std(losses)) or 1.0


def _softened(y: Array, warp: float) -> Array:
    """Losses above the best, those beyond ``warp`` compressed logarithmically; near the best as they are."""
    return warp * np.log1p(y / warp)


def _hardened(y: Array, warp: float) -> Array:
    """The inverse of ``_softened``."""
    return warp * np.expm1(y / warp)


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


def _ranges(axes: int) -> tuple[Array, Array]:
    """Logarithms of the lowest and highest (quadratic part, Matérn part, its length, noise, warp, weight of each axis).

    Between their ends all are equally likely beforehand.
    """
    low, high = [0.3, 0.0003, 0.3, 0.0005, 0.5], [6.0, 1.0, 3.0, 0.5, 16.0]
    return np.log(low + [0.1] * axes), np.log(high + [1.5] * axes)


def _posterior_sets(x: Array, y: Array, noise: float | None, seed: int) -> Array:
    """Hyper-parameter sets drawn from their posterior, shape (sets, 5 + axes)."""
    low, high = _ranges(x.shape[1])
    random = np.random.default_rng(seed)

    def as_set(place: Array) -> Array:
        one = np.exp(low + place * (high - low))
        if noise is not None:
            one[NOISE] = max(noise, 1e-4)
        return one

    starts = _spread(_FIRST, len(low), seed)
    fits = [_log_likelihood(x, y, as_set(place)) for place in starts]
    at, fit = starts[int(np.argmax(fits))], max(fits)
    found = []
    for step in range(_WALK):
        moved = random.random(len(low)) < 0.35
        place = at + moved * _PACE * random.standard_normal(len(low))
        if ((place >= 0) & (place <= 1)).all():
            new = _log_likelihood(x, y, as_set(place))
            if math.log(1 - random.random()) < new - fit:
                at, fit = place, new
        if step >= _WALK // 4 and (step + 1) % (_WALK * 3 // 4 // _SETS) == 0:
            found.append(as_set(at))
    return np.array(found)


def _log_likelihood(x: Array, y: Array, hyper: Array) -> float:
    """Of the losses as they are, so that warps compete: the density of the softened ones, and their slopes. Up to a constant."""
    soft = _softened(y, hyper[WARP])
    own = _covariance(x, x, hyper) + (hyper[NOISE] ** 2 + _JITTER) * np.eye(len(y))
    factor = np.linalg.cholesky(own)
    half = np.linalg.solve(factor, soft - np.median(soft))
    slopes = np.log1p(y / hyper[WARP]).sum()
    return float(-0.5 * half @ half - np.log(np.diagonal(factor)).sum() - slopes)


def _covariance(a: Array, b: Array, hyper: Array) -> Array:
    """A constant, linear and quadratic terms of the weighed coordinates from −1 to 1, and a Matérn-5/2 part."""
    quadratic, rest, length = hyper[:3]
    a, b = (2 * a - 1) * hyper[WEIGHTS], (2 * b - 1) * hyper[WEIGHTS]
    axes = a.shape[1]
    polynomial = (1 + a @ b.T / math.sqrt(axes)) ** 2
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    r = math.sqrt(5) * np.sqrt(np.maximum(square, 0.0) / (4 * axes)) / length
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
    own = _covariance(x, x, hyper) + (hyper[NOISE] ** 2 + _JITTER) * np.eye(len(x))
    cross = _covariance(x, cloud, hyper)
    factor = np.linalg.cholesky(own)
    half = np.linalg.solve(factor, cross)
    middle = float(np.median(y))
    mean = middle + half.T @ np.linalg.solve(factor, y - middle)
    spread = _covariance(cloud, cloud, hyper) - half.T @ half
    root = np.linalg.cholesky(spread + 1e-8 * (1 + float(np.trace(spread)) / len(cloud)) * np.eye(len(cloud)))
    return mean + np.random.default_rng(seed).standard_normal((_DRAWS, len(cloud))) @ root.T
