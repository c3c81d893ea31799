"""How well each form of law predicts proxies that it was not fitted on.

With few sizes no form can be assumed: each candidate is fitted without one size at a time and has to predict it; the
largest size, whose prediction is an extrapolation like the forecast itself, counts most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from windtunnel.laws.fit import Array, Fitted, fit_many
from windtunnel.laws.forms import Coordinates, model_for, starts_for, weak_prior
from windtunnel.laws.points import Point, columns

_NOISE_PRIOR, _NOISE_PRIOR_FREEDOM = 0.0025, 4.0
_TRUNK_SHARE = 0.5
"""Share of the seed variance that all branches of one trunk have in common (init and early data order)."""


@dataclass(frozen=True)
class Noise:
    """Seed noise: standard deviation of the log loss of one run, and the degrees of freedom that stand behind it."""

    sd: float
    freedom: float


@dataclass(frozen=True)
class Extrapolation:
    """One form fitted to all proxies: its log prediction for the target and how far that can be trusted."""

    form: str
    value: float
    sd: float
    """Standard deviation from seed noise through the fitted constants, under the weak prior."""
    held_out: tuple[float, ...]
    """For each size, smallest first: mean log prediction minus mean log loss when that size was left out."""
    held_out_rms: tuple[float, ...]
    fitted: Fitted
    smaller: Fitted
    """Without the largest size."""
    at: Coordinates
    precision: Array
    """Of the prior."""

    def variance(self, points: Sequence[Point], noise: float, gradient: Array) -> float:
        """Variance, from seed noise through the fitted constants, of what has this gradient in them."""
        return _parameter_sd(points, self.fitted, self.precision, noise, gradient) ** 2


def seed_noise(points: Sequence[Point]) -> Noise:
    """Pooled over seeds at equal N and D, shrunk towards .25 % with the weight of four degrees of freedom.

    Branches of one trunk are no independent repeats, so that the degrees of freedom are repeated trunks, not points.
    """
    groups: dict[tuple[float, float], list[float]] = {}
    trunks: dict[float, set[str]] = {}
    for p in points:
        groups.setdefault((p.parameters, p.tokens), []).append(math.log(p.loss))
        trunks.setdefault(p.parameters, set()).add(p.cluster)
    squares = sum(len(g) * float(np.var(g)) for g in groups.values())
    repeats = sum(len(g) - 1 for g in groups.values())
    freedom = float(sum(len(t) - 1 for t in trunks.values()))
    if not repeats or not freedom:
        return Noise(_NOISE_PRIOR, _NOISE_PRIOR_FREEDOM)
    total = _NOISE_PRIOR_FREEDOM + freedom
    return Noise(math.sqrt((_NOISE_PRIOR_FREEDOM * _NOISE_PRIOR**2 + freedom * squares / repeats) / total), total)


def assumed_noise(points: Sequence[Point]) -> list[str]:
    """A sentence where no size has a second trunk, so that ``seed_noise`` rests on its prior alone."""
    trunks: dict[float, set[str]] = {}
    for p in points:
        trunks.setdefault(p.parameters, set()).add(p.cluster)
    if any(len(names) > 1 for names in trunks.values()):
        return []
    return [
        f"one trunk for each size: a seed noise of {100 * _NOISE_PRIOR:g} % is assumed, not measured (tunnel.seeds = 2)"
    ]


def extrapolate(form: str, points: Sequence[Point], parameters: float, tokens: float, noise: Noise) -> Extrapolation:
    """Fits a form to all proxies and to all but each size, and predicts the target and the size left out.

    The weak prior holds what few points leave open; the Huber loss turns linear at 1 % or four
    standard deviations of the noise, so that only a failed run counts less than it weighs.
    """
    n, d, log_loss = columns(points)
    at = Coordinates.of(n, d)
    sizes = np.unique(n)
    weights = np.stack([np.ones_like(n), *((n != size).astype(np.float64) for size in sizes)])
    priors = [weak_prior(form, log_loss[row > 0], noise.sd) for row in weights]
    model = model_for(form, n, d, at)
    whole, *parts = fit_many(
        model, log_loss, starts_for(form, log_loss, few=True), weights,
        delta=max(1e-2, 4 * noise.sd), priors=priors, iterations=30,
    )  # fmt: skip
    means: list[float] = []
    spreads: list[float] = []
    for size, part in zip(sizes, parts, strict=True):
        lengths = d[n == size]
        errors = part.residuals[n == size]
        by_length = np.array([errors[lengths == length].mean() for length in np.unique(lengths)])
        means.append(float(by_length.mean()))
        spreads.append(float(np.sqrt(np.mean(by_length**2))))
    value, gradient = model_for(form, np.array([parameters]), np.array([tokens]), at)(whole.theta[None])
    sd = _parameter_sd(points, whole, priors[0].precision, noise.sd, gradient[0, 0])
    return Extrapolation(
        form, float(value[0, 0]), sd, tuple(means), tuple(spreads), whole, parts[-1], at, priors[0].precision
    )


def _parameter_sd(points: Sequence[Point], fitted: Fitted, precision: Array, noise: float, gradient: Array) -> float:
    """Standard deviation of a prediction from noise that branches of one trunk partly share (sandwich formula)."""
    clusters = np.array([p.cluster for p in points])
    same = (clusters[:, None] == clusters[None, :]).astype(np.float64)
    covariance = noise**2 * (_TRUNK_SHARE * same + (1 - _TRUNK_SHARE) * np.eye(len(points)))
    weighted = fitted.jacobian * fitted.weights[:, None]
    curvature = weighted.T @ fitted.jacobian + np.diag(precision)
    middle = weighted.T @ covariance @ weighted + noise**2 * np.diag(precision)
    direction = np.linalg.solve(curvature + 1e-9 * np.diag(np.diag(curvature)), gradient)
    return math.sqrt(max(0.0, float(direction @ middle @ direction)))
