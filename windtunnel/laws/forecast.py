"""What the proxies say about a run that has not been trained: a value, intervals, and two naive opinions beside it.

The value is the weighted mean over forms of law, in log loss; a form's weight falls with the fourth power of its error
on proxies that it was not fitted on (``heldout``). The variance of the forecast is the sum of

- the seed noise of the target itself,
- .6 of the variance of the fitted constants (the rest shows up in the next term already: both say what few points
  leave open),
- the weighted spread of the forms,
- the square of half the error on the largest size when it was left out, times the ratio of the two log-distances: a
  form that misses the last step by 1 % may miss one twice as long by 2 %, half of it mended by having seen that size,
- a floor of .1 % squared.

Intervals use Student's t with the degrees of freedom behind the noise plus four for the residuals. The constants were
set so that the 90 % interval covers 85 to 95 % in each planted world of ``bench/forecast_coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import LawError
from windtunnel.laws.forms import FORMS, constants_of
from windtunnel.laws.heldout import Extrapolation, Noise, assumed_noise, extrapolate, seed_noise
from windtunnel.laws.loss import REACH, LossLaw
from windtunnel.laws.points import Point, check_points, columns, far_off
from windtunnel.laws.sealed import Forecast, FormForecast, Interval, Sealed, freeze, read_forecast, score

__all__ = ["Forecast", "FormForecast", "Interval", "Sealed", "forecast", "freeze", "read_forecast", "score"]

_CONSTANTS_SHARE, _HELD_OUT_SHARE, _FLOOR, _RESIDUAL_FREEDOM = 0.6, 0.5, 0.001, 4.0


def forecast(
    points: Sequence[Point], parameters: float, tokens: float, *, forms: Sequence[str] = FORMS,
    unit: str = "nats per byte", force: bool = False,
) -> Forecast:  # fmt: skip
    """Forecasts the loss at N, D from proxies of at least three sizes.

    Args:
        points: final losses of decayed proxies; branches of one trunk share a cluster, seeds are trunks of their own.
        parameters: non-embedding parameters N of the target.
        tokens: its training tokens D, decay included.
        forms: candidate forms.
        force: keep forms without a floor beyond ten times the largest proxy.

    Raises:
        LawError: the points cannot be used, are fewer than six or of fewer than three sizes, or no form may answer.
    """
    check_points(points, sizes=3)
    for what, value in (("parameters", parameters), ("tokens", tokens)):
        if not (math.isfinite(value) and value > 0):
            raise LawError(f"forecast.{what}", f"expected a positive number, got {value}")
    if len(points) < 6:
        raise LawError("points", f"expected at least 6, got {len(points)}", "add decay branches to the proxies")
    n, d, _ = columns(points)
    reach = parameters / float(n.max())
    warnings: list[str] = []
    allowed = [f for f in forms if f != "coupled" or force or reach <= REACH]
    if len(allowed) < len(forms):
        warnings.append(f"the coupled form has no floor and is left out {reach:.3g}× beyond the largest proxy")
    if not allowed:
        raise LawError(
            "forecast", f"no form may extrapolate {reach:.3g}× in N", "fit larger proxies or add a form with a floor"
        )
    noise = seed_noise(points)
    answers = [extrapolate(form, points, parameters, tokens, noise) for form in allowed]
    weights = weights_of(answers, noise)
    ratio = distance_ratio(points, parameters, tokens)
    expected = _combine(answers, weights, noise, ratio, len(points))
    names = [si(size) for size in sorted({float(size) for size in n})]
    details = tuple(
        FormForecast(_law(a, points, unit), math.exp(a.value), w, dict(zip(names, a.held_out, strict=True)))
        for a, w in zip(answers, weights, strict=True)
    )
    warnings += details[0].law.outside(parameters, tokens)
    warnings += far_off(points, answers[weights.index(max(weights))].fitted.residuals)
    warnings += assumed_noise(points)
    if len({float(length) for length in d}) < 2:
        warnings.append("all proxies have one D: the effect of data comes from the prior alone")
    return Forecast(
        parameters=float(parameters), tokens=float(tokens), unit=unit, expected=expected, noise=noise.sd, forms=details,
        naive=naive_forecasts(points, parameters, tokens), points=tuple(points), warnings=tuple(warnings),
    )  # fmt: skip


def unlike_setting(batch: float, rate: float, proxies: Sequence[tuple[float, float]]) -> list[str]:
    """Where a target's batch (tokens) or base learning rate is not the proxies', with the factor: a law is for theirs.

    Args:
        proxies: batch and base learning rate of each.
    """
    notes: list[str] = []
    asked = (("batch", batch, f"{si(batch)} tokens"), ("base learning rate", rate, f"{rate:g}"))
    for index, (what, own, shown) in enumerate(asked):
        theirs = sorted({proxy[index] for proxy in proxies})
        if any(not math.isclose(own, other, rel_tol=1e-6) for other in theirs):
            words = " to ".join(f"{own / other:.3g}×" for other in dict.fromkeys((theirs[-1], theirs[0])))
            notes.append(f"the target's {what} of {shown} is {words} that of the proxies, for which the law is")
    return notes


def distance_ratio(points: Sequence[Point], parameters: float, tokens: float) -> float:
    """Log-distance from proxies to target over that between the two largest sizes; at least one half."""
    n, d, _ = columns(points)
    sizes = np.unique(n)
    beyond = max(0.0, math.log(parameters / sizes[-1])) + max(0.0, math.log(tokens / float(d.max())))
    return max(0.5, beyond / math.log(sizes[-1] / sizes[-2]))


def weights_of(answers: Sequence[Extrapolation], noise: Noise) -> list[float]:
    """Inverse fourth power of the held-out error, the largest size counting as much as all others together."""
    scores: list[float] = []
    for answer in answers:
        others = answer.held_out_rms[:-1]
        mean_square = 0.5 * answer.held_out_rms[-1] ** 2 + 0.5 * sum(e**2 for e in others) / len(others)
        scores.append((mean_square + noise.sd**2) ** -2)
    return [score / sum(scores) for score in scores]


def _combine(
    answers: Sequence[Extrapolation], weights: Sequence[float], noise: Noise, ratio: float, count: int
) -> Interval:
    run, freedom = run_noise(answers, weights, noise, count)
    mean, variance = combined(
        [a.value for a in answers], [a.sd**2 * run / noise.sd**2 for a in answers],
        [a.held_out_rms[-1] ** 2 for a in answers], weights, ratio,
    )  # fmt: skip
    return Interval.around(mean, math.sqrt(run + variance + _FLOOR**2), freedom)


def run_noise(
    answers: Sequence[Extrapolation], weights: Sequence[float], noise: Noise, count: int
) -> tuple[float, float]:
    """Variance of one run's log loss from seeds and residuals, and the degrees of freedom behind it."""
    squares = float(np.array(weights) @ np.array([np.sum(a.fitted.residuals**2) for a in answers]))
    # About five constants are fitted; the residuals speak with the weight of four repeats.
    residual = squares / max(count - 5, count / 3)
    freedom = noise.freedom + _RESIDUAL_FREEDOM
    return (noise.freedom * noise.sd**2 + _RESIDUAL_FREEDOM * residual) / freedom, freedom


def combined(
    values: Sequence[float], constants: Sequence[float], left_out: Sequence[float], weights: Sequence[float], ratio: float
) -> tuple[float, float]:  # fmt: skip
    """What several forms say together: mean, and its variance without the noise of a run.

    Args:
        values: of each form.
        constants: variance of each from its fitted constants.
        left_out: square of what leaving the largest size out changes.
        weights: summing to one.
        ratio: log-distance to the target over that between the two largest sizes.
    """
    w, v = np.array(weights), np.array(values)
    mean = float(w @ v)
    spread, held_out = float(w @ (v - mean) ** 2), float(w @ np.array(left_out))
    return mean, _CONSTANTS_SHARE * float(w @ np.array(constants)) + spread + (_HELD_OUT_SHARE * ratio) ** 2 * held_out


def _law(answer: Extrapolation, points: Sequence[Point], unit: str) -> LossLaw:
    n, d, _ = columns(points)
    return LossLaw(
        answer.form, constants_of(answer.form, answer.fitted.theta, answer.at),
        (float(n.min()), float(n.max())), (float(d.min()), float(d.max())), unit=unit, points=len(points),
        residual=float(np.sqrt(np.mean(answer.fitted.residuals**2))),
    )  # fmt: skip


def naive_forecasts(points: Sequence[Point], parameters: float, tokens: float) -> dict[str, Interval]:
    """Two rules anybody would try, at the D nearest to the target's; intervals from their error on the last size."""
    noise, ratio = seed_noise(points), distance_ratio(points, parameters, tokens)
    sizes = sorted({p.parameters for p in points})
    at = np.log(sizes)
    losses = np.array([_nearest(points, size, tokens) for size in sizes])

    def line(upto: int, where: float) -> float:
        slope = (losses[upto] - losses[upto - 1]) / (at[upto] - at[upto - 1])
        return float(losses[upto] + slope * (where - at[upto]))

    answers = {
        "largest": (float(losses[-1]), float(losses[-2] - losses[-1])),
        "line": (line(-1, math.log(parameters)), line(-2, float(at[-1])) - float(losses[-1])),
    }
    return {
        key: Interval.around(value, math.hypot(noise.sd, error * ratio), noise.freedom)
        for key, (value, error) in answers.items()
    }


def _nearest(points: Sequence[Point], size: float, tokens: float) -> float:
    """Mean log loss of one size at the D nearest to ``tokens``."""
    mine = [p for p in points if p.parameters == size]
    length = min((p.tokens for p in mine), key=lambda d: (abs(math.log(d / tokens)), d))
    return float(np.mean([math.log(p.loss) for p in mine if p.tokens == length]))
