"""One curve law for several model sizes, fitted to small runs and asked about a larger one under a schedule nobody has trained.

    L(t; N) = L0 + C N^-a + A N^-p S(t)^-alpha + B N^q S(t)^-fade sum_k (eta_k - eta_{k-1}) G_k(t)

in the terms of ``curve``: floor, progress and annealing are power laws in N, alpha and the kernel's own constants are common
to all sizes. It is fitted to the runs of all sizes at once (Huber loss of log residuals, several starts), with weak priors on
what a few sizes leave open: L0 about .35 of the lowest loss within a factor of 2, a about .25 within a factor of 1.8 (both as
in ``forms``), p and q about 0 within .3. A law for each size with its constants or its answers carried on by a straight line
over log N did worse on four programs (docs/decisions.md).

Curves are training losses in nats per token; a finished model is judged by its held-out loss in nats per byte. The two differ
by a log ratio that is measured at the end of every branch and moves little with N and D: a straight line in both, drawn to
zero slope with a spread of .01 an e-fold.

A kernel's weight is the inverse square of what it gets wrong on runs that were left out, of the second and third term below.
The variance of a log loss is the sum of

- the weighted spread of the kernels,
- the square of half the error on the largest size when it was left out times the ratio of the two log-distances, as in
  ``forecast``,
- the square of ``curve_fit.HELD_OUT_SHARE`` times the error at the end of each size's longest branches left out, at least
  ``curve_fit.LEAST_ERROR``, and of ``UNLIKE`` times the drop that the annealing term forecasts, times the share of the decay
  that no fitted run has,
- the seed noise of the run itself, and .6 of what that of the proxies' trunks makes of the fitted constants; along the curve
  also the noise of one measured mean.

Intervals use Student's t with eight degrees of freedom. The shares were set on four programs that had been trained before (what
is said there is a rehearsal) and so that the 90 % interval covers about that many worlds of ``bench/curve_coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windtunnel.laws.curve import FADE, Kernel, Scale, Steps, Timeline, constants_of, model_for
from windtunnel.laws.curve_fit import (
    BLOCK,
    HELD_OUT_SHARE,
    LEAST_ERROR,
    decay_difference,
    kernel_starts,
    point_noise,
    scale_of,
)
from windtunnel.laws.curve_law import Curve, knots
from windtunnel.laws.fit import Array, Fitted, LawError, Model, Prior, fit_many, log_sum_exp, student_quantile
from windtunnel.laws.forecast import distance_ratio, naive_forecasts
from windtunnel.laws.heldout import seed_noise
from windtunnel.laws.points import Point, check_points
from windtunnel.laws.sealed import Forecast, Interval

SIZED: tuple[Kernel, ...] = ("exponential", "power", "functional")
UNLIKE = 0.05
"""Share of the annealing drop that a law may miss on a decay unlike all that it was fitted to."""
_HALF, _CONSTANTS_SHARE = 0.5, 0.6
_SLOPE, _OFF = 0.01, 0.004
"""Prior spread of the log ratio's slopes, and the noise of one such ratio."""
_PRIORS = ((0, math.log(0.35), 0.7), (2, math.log(0.25), 0.6), (4, 0.0, 0.3), (7, 0.0, 0.3), (9, math.log(0.3), 1.0))
"""Parameter, mean (of the first one relative to the lowest log loss) and standard deviation."""
_OWN = 8
_FREEDOM = 8.0
"""Degrees of freedom behind an interval: a handful of held-out errors and the seeds."""


@dataclass(frozen=True)
class Proxy:
    """A curve of a run with N parameters, and the trunk (cluster) that it is or grew from."""

    parameters: float
    cluster: str
    curve: Curve


@dataclass(frozen=True)
class End:
    """Where a branch of a proxy ended: N, D and held-out loss, and the learning rate of every update that led there."""

    point: Point
    rates: Array


@dataclass(frozen=True)
class SizedLaw:
    """One kernel's parameters (``_model``) with the scales they are in."""

    kernel: Kernel
    theta: Array
    scale: Scale
    size: float
    """N in whose multiples the law counts."""

    def log_losses(self, parameters: float, rates: Array, at: Steps) -> Array:
        """Log training loss of a run with N parameters after each of the updates ``at``."""
        timeline = Timeline.of(rates[: at[-1]], at, parts=max(2, 1024 // len(at)))
        return _model(self.kernel, {parameters: [timeline]}, self.scale, self.size)(self.theta[None])[0][0]

    def variance(self, covariance: Array, parameters: float, rates: Array, at: Steps) -> Array:
        """Variance of ``log_losses`` from that of the parameters."""
        timeline = Timeline.of(rates[: at[-1]], at, parts=1)
        slopes = _model(self.kernel, {parameters: [timeline]}, self.scale, self.size)(self.theta[None])[1][0]
        return np.einsum("pi,ij,pj->p", slopes, covariance, slopes)

    def constants(self) -> dict[str, float]:
        """The constants of the law at N = ``size``, in plain units, and the exponents of N."""
        theta = self.theta
        floor = float(np.logaddexp(theta[0], theta[1]))
        plain = constants_of(
            self.kernel, np.array([floor, theta[3], theta[5], theta[6], *theta[_OWN:]]), self.scale, fade=FADE
        )
        plain["L0"] = math.exp(theta[0])
        return {**plain, "C": math.exp(theta[1]), "a": math.exp(theta[2]), "p": float(theta[4]), "q": float(theta[7])}


@dataclass(frozen=True)
class SizedFit:
    """One kernel: its law, the log ratio of held-out to training loss at the target, and its errors on what was left out."""

    law: SizedLaw
    ratio: float
    loosely: Array
    """Covariance of the parameters from seed noise of one unit (log loss) that all runs of a trunk share."""
    along: float
    """Root mean square log error over stretches of the largest size's curves, that size left out."""
    end: float
    """The same over its branches' held-out losses at the end."""
    decays: float
    """The same at the end of each size's longest branches, these left out."""


@dataclass(frozen=True)
class SizedForecast:
    """A run's whole curve with its 90 % band, and the held-out loss at its end."""

    steps: Steps
    value: Array
    low90: Array
    high90: Array
    """Training loss in nats per token."""
    final: Forecast
    """Held-out loss; its forms are empty, the laws are here."""
    fits: tuple[SizedFit, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What stands beside the final loss in the forecast's file."""
        return {
            "unit": "nats per token, training loss", "steps": self.steps.tolist(), "value": _rounded(self.value),
            "low90": _rounded(self.low90), "high90": _rounded(self.high90), "notes": list(self.notes),
            "laws": [
                {"kernel": f.law.kernel, "weight": w, "at": f.law.size, "constants": f.law.constants(), "ratio": f.ratio,
                 "left_out": {"along": f.along, "end": f.end, "decays": f.decays}}
                for f, w in zip(self.fits, self.weights, strict=True)
            ],
        }  # fmt: skip


def forecast_sizes(
    proxies: Sequence[Proxy], ends: Sequence[End], parameters: float, tokens: float, rates: Array, *,
    kernels: Sequence[Kernel] = SIZED, unit: str = "nats per byte",
) -> SizedForecast:  # fmt: skip
    """Forecasts the curve and the final loss of a run.

    Args:
        proxies: runs of one batch, base learning rate and mixture, of at least three sizes, each with a decay.
        ends: the finished branches among them, scored on held-out text.
        parameters: N of the target.
        tokens: its D.
        rates: the learning rate of each of its updates.

    Raises:
        LawError: there are fewer than three sizes, one has no decay, or the points cannot be used.
    """
    check_points([end.point for end in ends], sizes=3)
    if {p.parameters for p in proxies} != {end.point.parameters for end in ends}:
        raise LawError("curves", "expected scored branches of every size", "score the branches of all proxies")
    proxies = sorted(proxies, key=lambda p: p.parameters)
    curves = [p.curve for p in proxies]
    noise, seeds = point_noise(curves), seed_noise([end.point for end in ends])
    fits = [_fit(kernel, proxies, ends, noise, (parameters, tokens)) for kernel in kernels]
    squares = np.array([f.end**2 + (HELD_OUT_SHARE * f.decays) ** 2 + seeds.sd**2 for f in fits])
    w = squares**-2 / (squares**-2).sum()
    ratio = distance_ratio([end.point for end in ends], parameters, tokens)
    steps = knots(rates, 200)
    logs = np.stack([f.law.log_losses(parameters, rates, steps) for f in fits])
    flat_rates = np.maximum.accumulate(rates)
    drops = np.stack([f.law.log_losses(parameters, flat_rates, steps) for f in fits]) - logs
    unlike = min(decay_difference(rates, curve.rates) for curve in curves)
    decays = float(w @ np.array([f.decays**2 for f in fits]))
    schedule = max(LEAST_ERROR, HELD_OUT_SHARE * math.sqrt(decays)) ** 2 + (UNLIKE * unlike * (w @ drops)) ** 2

    loose = w @ np.stack([f.law.variance(f.loosely, parameters, rates, steps) for f in fits])

    def variance(values: Array, left_out: Sequence[float]) -> Array:
        mean, part = w @ values, slice(-values.shape[1], None)
        carried = (_HALF * ratio) ** 2 * float(w @ np.array(left_out) ** 2)
        run = (1 + _CONSTANTS_SHARE * loose[part]) * seeds.sd**2
        return w @ (values - mean) ** 2 + carried + schedule[part] + run

    mean = w @ logs
    half = student_quantile(_FREEDOM, 0.95) * np.sqrt(variance(logs, [f.along for f in fits]) + noise**2)
    finals = logs[:, -1:] + np.array([[f.ratio] for f in fits])
    sd = math.sqrt(float(variance(finals, [f.end for f in fits])[0]))
    points = tuple(end.point for end in ends)
    expected = Interval.around(float((w @ finals)[0]), sd, _FREEDOM)
    notes = _notes(proxies, parameters, len(rates), unlike)
    final = Forecast(
        float(parameters), float(tokens), unit, expected, seeds.sd, (), naive_forecasts(points, parameters, tokens), points,
        notes,
    )  # fmt: skip
    return SizedForecast(
        steps,
        np.exp(mean),
        np.exp(mean - half),
        np.exp(mean + half),
        final,
        tuple(fits),
        tuple(float(x) for x in w),
        notes,
    )


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 6) for value in values]


def _notes(proxies: Sequence[Proxy], parameters: float, steps: int, unlike: float) -> tuple[str, ...]:
    largest, longest = max(p.parameters for p in proxies), max(int(p.curve.steps[-1]) for p in proxies)
    notes: list[str] = []
    if parameters > 1.05 * largest:
        notes.append(f"N is {parameters / largest:.3g}× the largest size behind the law")
    if steps > 1.05 * longest:
        notes.append(f"{steps:,} updates are {steps / longest:.3g}× the longest run behind the law")
    if unlike > 0.05:
        notes.append(f"{100 * unlike:.0f} % of the decay is unlike the nearest run behind the law")
    return tuple(notes)


def _model(kernel: Kernel, timelines: Mapping[float, Sequence[Timeline]], scale: Scale, size: float) -> Model:
    """log L at the points of all runs, size by size, as a function of many parameter vectors.

    Parameters: log L0; log of C N^-a at N = ``size``; log a; log of A N^-p S^-alpha at size and scale; p; log alpha; log of
    B N^q times the scale's rate at that size; q; then the kernel's own, as in ``curve.model_for``.
    """
    parts = [(math.log(n / size), model_for(kernel, lines, scale, fade=FADE)) for n, lines in timelines.items()]

    def model(theta: Array) -> tuple[Array, Array]:
        a = np.exp(np.clip(theta[:, 2], -8, 3))
        values: list[Array] = []
        slopes: list[Array] = []
        for x, inner in parts:
            floor, shares = log_sum_exp([theta[:, 0], theta[:, 1] - a * x])
            fixed, falling = (share[:, None] for share in shares)
            one = np.stack([floor, theta[:, 3] - theta[:, 4] * x, theta[:, 5], theta[:, 6] + theta[:, 7] * x], axis=1)
            value, slope = inner(np.concatenate([one, theta[:, _OWN:]], axis=1))
            by_floor, by_level, by_alpha, by_amount = (slope[..., i] for i in range(4))
            columns = [
                by_floor * fixed, by_floor * falling, by_floor * falling * (-a * x)[:, None], by_level, -x * by_level, by_alpha,
                by_amount, x * by_amount, *(slope[..., i] for i in range(4, slope.shape[-1])),
            ]  # fmt: skip
            values.append(value)
            slopes.append(np.stack(columns, axis=-1))
        return np.concatenate(values, axis=1), np.concatenate(slopes, axis=1)

    return model


def _fit(
    kernel: Kernel, proxies: Sequence[Proxy], ends: Sequence[End], noise: float, target: tuple[float, float]
) -> SizedFit:
    """Fitted to all runs, to all but the largest size, and to all but each size's longest branches."""
    curves = [p.curve for p in proxies]
    scale = scale_of(curves)
    sizes = np.array([p.parameters for p in proxies])
    size, largest = float(np.exp(np.log(np.unique(sizes)).mean())), float(sizes.max())
    lines: dict[float, list[Timeline]] = {}
    for n, curve in zip(sizes, curves, strict=True):
        lines.setdefault(float(n), []).append(Timeline.of(curve.rates[: curve.steps[-1]], curve.steps, parts=1))
    logs = np.log(np.concatenate([curve.losses for curve in curves]))
    points = [len(curve.steps) for curve in curves]
    longest = np.array([_is_longest(p, proxies) for p in proxies])
    out = [np.zeros(len(curves), dtype=bool), sizes == largest, longest]
    weights = np.stack([np.repeat(1.0 - left, points) for left in out])
    begin = _starts(kernel, float(logs.min()))
    priors = [_prior(begin.shape[1], float(logs[row > 0].min()), noise) for row in weights]
    whole, small, short = fit_many(
        _model(kernel, lines, scale, size), logs, begin, weights, delta=max(1e-3, noise), priors=priors,
        iterations=80, polish=1,
    )  # fmt: skip
    owner = np.repeat(np.arange(len(curves)), points)
    carried = [small.residuals[owner == i] for i in np.flatnonzero(out[1])]
    blocks = [float(b.mean()) for part in carried for b in np.array_split(part, math.ceil(len(part) / BLOCK))]
    tails = [float(short.residuals[owner == i][-3:].mean()) for i in np.flatnonzero(longest)]
    law, less = (SizedLaw(kernel, fit.theta, scale, size) for fit in (whole, small))
    known = [end for end in ends if end.point.parameters != largest]
    missed = [
        _at_end(less, end) + _ratio(less, known, end.point.parameters, end.point.tokens) - math.log(end.point.loss)
        for end in ends
        if end.point.parameters == largest
    ]
    member = np.repeat([p.cluster for p in proxies], points)
    return SizedFit(
        law, _ratio(law, ends, *target), _loosely(whole, priors[0], member), _rms(blocks), _rms(missed), _rms(tails)
    )


def _loosely(fitted: Fitted, prior: Prior, clusters: NDArray[np.str_]) -> Array:
    """Covariance of the parameters when each cluster's losses rise and fall together by one unit (sandwich formula)."""
    weighted = fitted.jacobian * fitted.weights[:, None]
    curvature = weighted.T @ fitted.jacobian + np.diag(prior.precision)
    pulls = np.stack([weighted[clusters == name].sum(0) for name in np.unique(clusters)])
    lever = np.linalg.solve(curvature + 1e-9 * np.diag(np.diag(curvature)), pulls.T)
    return lever @ lever.T


def _is_longest(proxy: Proxy, proxies: Sequence[Proxy]) -> bool:
    """Whether a run's rate falls and ends later than that of another such run of its size."""
    lengths = [len(p.curve.rates) for p in proxies if p.parameters == proxy.parameters and p.curve.falls]
    return proxy.curve.falls and len(proxy.curve.rates) == max(lengths) > min(lengths)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v**2 for v in values) / len(values)) if values else 0.0


def _at_end(law: SizedLaw, end: End) -> float:
    return float(law.log_losses(end.point.parameters, end.rates, np.array([len(end.rates)]))[0])


def _ratio(law: SizedLaw, ends: Sequence[End], parameters: float, tokens: float) -> float:
    """Log ratio of held-out loss to the law's training loss at N, D: a line through the branches with nearly no slope."""
    x = np.array([[1.0, math.log(e.point.parameters / parameters), math.log(e.point.tokens / tokens)] for e in ends])
    y = np.array([math.log(e.point.loss) - _at_end(law, e) for e in ends])
    middle = x.mean(0)
    middle[0] = 0.0
    # Centred, so that the prior on the slopes leaves the level alone.
    z, precision = x - middle, np.diag([0.0, *2 * [(_OFF / _SLOPE) ** 2]])
    line: Array = np.asarray(np.linalg.solve(z.T @ z + precision, z.T @ y), dtype=np.float64)
    return float(line[0] - line[1:] @ middle[1:])


def _starts(kernel: Kernel, lowest: float) -> Array:
    rows = [
        [lowest + math.log(0.6 * floor), lowest + math.log(0.4 * floor), math.log(0.25), lowest + math.log(1 - floor), 0.0,
         math.log(alpha), lowest + math.log(0.03), 0.0, *own]
        for floor in (0.75, 0.92)
        for alpha in (0.3, 0.6)
        for own in kernel_starts(kernel)
    ]  # fmt: skip
    return np.array(rows)


def _prior(count: int, lowest: float, noise: float) -> Prior:
    mean, precision = np.zeros(count), np.zeros(count)
    for index, value, spread in _PRIORS:
        if index < count:
            mean[index], precision[index] = value + (lowest if index == 0 else 0.0), (noise / spread) ** 2
    return Prior(mean, precision)
