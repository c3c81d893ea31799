"""Robust fitting of a formula to the logarithms of measured losses, from many starts at once.

The objective is the Huber loss of log residuals, as in Hoffmann et al. (arXiv 2203.15556, section D.2) and in its refit
by Besiroglu et al. (arXiv 2404.10102), plus, if wished, a Gaussian prior on the parameters:

    sum_i w_i h_delta(f_i(theta) - y_i) + 1/2 sum_j q_j (theta_j - m_j)^2 ,   y = log loss.

All starts descend together by damped Gauss-Newton steps on iteratively reweighted least squares, whose weights
min(1, delta/|r|) majorise the Huber loss; the best ones are then polished by BFGS in coordinates in which the
Gauss-Newton matrix is the identity. Analytic derivatives, no random numbers: the same input gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize as _optimize  # pyright: ignore[reportMissingTypeStubs]
from scipy import special as _special  # pyright: ignore[reportMissingTypeStubs]

from windtunnel.base.errors import UserError

Array = NDArray[np.float64]
Model = Callable[[Array], tuple[Array, Array]]
"""theta [starts, parameters] -> values [starts, points] and derivatives [starts, points, parameters]."""

_scipy_minimize = cast("Callable[..., Any]", _optimize.minimize)  # pyright: ignore[reportUnknownMemberType]
_student_quantile = cast("Callable[..., Any]", _special.stdtrit)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


class LawError(UserError):
    """A law cannot be fitted to these points, or cannot answer this question."""


_SETTLED = 1e-7
"""A start has settled when a step lowers its objective by less than this share."""


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior: mean and precision (in units of the objective) of each parameter; precision 0 is no prior."""

    mean: Array
    precision: Array


@dataclass(frozen=True)
class Fitted:
    """The minimum that was found: parameters, objective, residuals f - y and the derivatives df/dtheta there."""

    theta: Array
    objective: float
    residuals: Array
    jacobian: Array
    weights: Array
    """The robust weights of the points at the minimum, w_i min(1, delta/|r_i|)."""


def huber(residuals: Array, delta: float) -> Array:
    """r²/2 for |r| <= delta, delta(|r| - delta/2) beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))


def log_sum_exp(terms: Sequence[Array]) -> tuple[Array, list[Array]]:
    """log of the sum of exponentials, elementwise, without overflow, and the share of each term in the sum."""
    top = terms[0]
    for term in terms[1:]:
        top = np.maximum(top, term)
    parts = [np.exp(term - top) for term in terms]
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return top + np.log(total), [part / total for part in parts]


def student_quantile(freedom: float, level: float) -> float:
    """The quantile of Student's t distribution at ``level`` (0.95 for a two-sided 90 % interval)."""
    return float(_student_quantile(freedom, level))


def fit_robust(
    model: Model,
    target: Array,
    starts: Array,
    *,
    weights: Array | None = None,
    delta: float = 1e-3,
    prior: Prior | None = None,
    iterations: int = 80,
    polish: int = 3,
) -> Fitted:
    """The best minimum over all starts.

    Args:
        model: the formula with its derivatives, for many parameter vectors at once.
        target: log losses, [points].
        starts: parameter vectors to begin from, [starts, parameters].
        weights: weight of each point, [points]; 1 by default.
        delta: residual (in log loss) at which the Huber loss turns linear.
        prior: Gaussian prior on the parameters.
        iterations: at most so many Gauss-Newton steps for each start.
        polish: how many of the best starts BFGS finishes (0: none; enough when delta exceeds most residuals).

    Raises:
        LawError: no start led to a finite objective.
    """
    w = np.ones_like(target) if weights is None else weights
    priors = None if prior is None else [prior]
    return fit_many(model, target, starts, w[None], delta=delta, priors=priors, iterations=iterations, polish=polish)[0]


def fit_many(
    model: Model,
    target: Array,
    starts: Array,
    weights: Array,
    *,
    delta: float = 1e-3,
    priors: Sequence[Prior] | None = None,
    iterations: int = 80,
    polish: int = 0,
) -> list[Fitted]:
    """As ``fit_robust`` for several weightings of the same points at once ([fits, points]), one prior for each."""
    fits, count = len(weights), len(starts)
    none: Array = np.zeros_like(starts[0])
    flat = Prior(none, none)
    priors = [flat] * fits if priors is None else priors
    means, precisions = np.stack([p.mean for p in priors]), np.stack([p.precision for p in priors])
    begin, w = np.tile(starts, (fits, 1)), np.repeat(weights, count, axis=0)
    each = Prior(np.repeat(means, count, axis=0), np.repeat(precisions, count, axis=0))
    thetas, objectives = _descend(model, target, begin, w, delta, each, iterations)
    results: list[Fitted] = []
    for index, prior in enumerate(priors):
        mine = slice(index * count, (index + 1) * count)
        w, theta, objective = weights[index], thetas[mine], objectives[mine]
        order = cast("list[int]", np.argsort(objective, kind="stable").tolist())
        if not np.isfinite(objective[order[0]]):
            raise LawError("law", "no start of the fit led to a finite loss", "check the points for values far off")
        best, lowest = theta[order[0]], float(objective[order[0]])
        for candidate in (theta[i] for i in order[:polish] if np.isfinite(objective[i])):
            polished, value = _polish(model, target, candidate, w, delta, prior)
            if value < lowest:
                best, lowest = polished, value
        values, jacobian = model(best[None])
        residuals = values[0] - target
        robust = w * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
        results.append(Fitted(best, lowest, residuals, jacobian[0], robust))
    return results


def _objective(residuals: Array, theta: Array, w: Array, delta: float, prior: Prior) -> Array:
    data = (w * huber(residuals, delta)).sum(-1)
    return data + 0.5 * (prior.precision * (theta - prior.mean) ** 2).sum(-1)


@dataclass
class _Descent:
    """Starts on their way down; every array has one row for each."""

    index: NDArray[np.intp]
    theta: Array
    residuals: Array
    jacobian: Array
    objective: Array
    damping: Array
    weights: Array
    prior: Prior

    def keep(self, rows: NDArray[np.bool_]) -> _Descent:
        prior = Prior(self.prior.mean[rows], self.prior.precision[rows])
        return _Descent(
            self.index[rows], self.theta[rows], self.residuals[rows], self.jacobian[rows], self.objective[rows],
            self.damping[rows], self.weights[rows], prior,
        )  # fmt: skip


def _descend(
    model: Model, target: Array, starts: Array, weights: Array, delta: float, prior: Prior, iterations: int
) -> tuple[Array, Array]:
    """Levenberg-Marquardt on reweighted least squares, all starts at once; weights and prior have a row for each."""
    theta: Array = starts.astype(np.float64, copy=True)
    objectives: Array = np.full(len(starts), np.inf)
    values, jacobian = model(theta)
    objective = _objective(values - target, theta, weights, delta, prior)
    rows = np.arange(len(starts), dtype=np.intp)
    damping: Array = np.full(len(starts), 1e-2)
    now = _Descent(rows, theta, values - target, jacobian, objective, damping, weights, prior)
    now = now.keep(np.isfinite(objective))
    for _ in range(iterations):
        if not len(now.index):
            break
        trial: Array = now.theta + _step(model, target, now, delta)
        values, jacobian = model(trial)
        value: Array = _objective(values - target, trial, now.weights, delta, now.prior)
        better: NDArray[np.bool_] = value < now.objective
        small: NDArray[np.bool_] = now.objective - value <= _SETTLED * np.abs(now.objective)
        settled: NDArray[np.bool_] = np.where(better, small, now.damping > 1e8)
        now.theta = np.where(better[:, None], trial, now.theta)
        now.objective = np.where(better, value, now.objective)
        now.residuals = np.where(better[:, None], values - target, now.residuals)
        now.jacobian = np.where(better[:, None, None], jacobian, now.jacobian)
        now.damping = np.where(better, np.maximum(now.damping / 5, 1e-12), now.damping * 6)
        theta[now.index], objectives[now.index] = now.theta, now.objective
        if settled.any():
            now = now.keep(~settled)
    return theta, objectives


def _step(model: Model, target: Array, now: _Descent, delta: float) -> Array:
    """A damped Gauss-Newton step with geodesic acceleration, no component longer than 2."""
    robust: Array = now.weights * np.minimum(1.0, delta / np.maximum(np.abs(now.residuals), 1e-300))
    weighted: Array = now.jacobian * robust[..., None]
    matrix: Array = np.swapaxes(weighted, 1, 2) @ now.jacobian
    pull: Array = now.prior.precision * (now.theta - now.prior.mean)
    gradient: Array = (now.residuals[:, None, :] @ weighted)[:, 0] + pull
    diagonal = list(range(matrix.shape[1]))
    size: Array = matrix[:, diagonal, diagonal] + now.prior.precision
    floor: Array = 1e-9 * size.max(axis=1, keepdims=True) + 1e-300
    matrix[:, diagonal, diagonal] = size + now.damping[:, None] * np.maximum(size, floor) + floor
    step: Array = np.asarray(np.linalg.solve(matrix, -gradient[..., None])[..., 0], dtype=np.float64)
    # Geodesic acceleration (arXiv 1207.4999): follow the curvature of the valley, seen in one short step ahead.
    ahead: Array = model(now.theta + 0.1 * step)[0] - target - now.residuals
    bend: Array = 20 * (10 * ahead - (now.jacobian @ step[..., None])[..., 0])
    push: Array = (bend[:, None, :] @ weighted)[:, 0]
    turn: Array = np.asarray(np.linalg.solve(matrix, -0.5 * push[..., None])[..., 0], dtype=np.float64)
    gentle = (turn**2).sum(1) <= 0.75**2 * (step**2).sum(1)
    whole: Array = step + np.where(gentle[:, None], turn, 0.0)
    longest: Array = np.abs(whole).max(axis=1, keepdims=True)
    return whole * np.minimum(1.0, 2.0 / np.maximum(longest, 1e-300))


def _polish(model: Model, target: Array, theta: Array, w: Array, delta: float, prior: Prior) -> tuple[Array, float]:
    """BFGS with the Gauss-Newton matrix turned into the identity."""
    values, jacobian = model(theta[None])
    robust = w * np.minimum(1.0, delta / np.maximum(np.abs(values[0] - target), 1e-300))
    matrix = (jacobian[0] * robust[:, None]).T @ jacobian[0] + np.diag(prior.precision)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    unit = max(float(_objective(values - target, theta[None], w, delta, prior)[0]), 1e-300)
    # Coordinates are of the order of sqrt(objective); with this scale the first BFGS step is a Gauss-Newton step.
    scale: Array = vectors * np.sqrt(unit / np.maximum(eigenvalues, 1e-8 * eigenvalues[-1] + 1e-300))

    def evaluate(z: Array) -> tuple[float, Array]:
        point = theta + scale @ z
        f, j = model(point[None])
        r = f[0] - target
        value = float(_objective(r, point, w, delta, prior))
        gradient = j[0].T @ (w * np.clip(r, -delta, delta)) + prior.precision * (point - prior.mean)
        if not np.isfinite(value):
            return 1e30, np.zeros_like(z)
        return value / unit, scale.T @ gradient / unit

    options = {"gtol": 1e-9, "maxiter": 200}
    result = _scipy_minimize(evaluate, np.zeros_like(theta), jac=True, method="BFGS", options=options)
    return theta + scale @ np.asarray(result.x, dtype=np.float64), float(result.fun) * unit


def cluster_weights(clusters: Sequence[str], draws: int, seed: int = 0) -> Array:
    """How often each point occurs in each draw of a bootstrap that resamples whole clusters, [draws, points].

    Points of one trunk share their noise, so that they are drawn or left out together.

    Raises:
        LawError: there are fewer than six clusters, too few to resample.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 6:
        raise LawError(
            "law", f"a bootstrap needs at least 6 independent trunks, got {len(names)}",
            "use a forecast's interval instead, or add trunks",
        )  # fmt: skip
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, member].astype(np.float64)


def bootstrap(
    model: Model, target: Array, starts: Array, clusters: Sequence[str], *,
    delta: float = 1e-3, prior: Prior | None = None, draws: int = 200, seed: int = 0,
) -> Array:  # fmt: skip
    """Parameters refitted to resampled clusters, [draws, parameters]; begins at ``starts`` (the best fit first)."""
    weights = cluster_weights(clusters, draws, seed)
    priors = None if prior is None else [prior] * draws
    fits = fit_many(model, target, starts, weights, delta=delta, priors=priors, iterations=200)
    return np.stack([fit.theta for fit in fits])
