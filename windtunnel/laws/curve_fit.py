"""Curve laws fitted to runs, judged by curves they were not fitted on, averaged, and asked about other schedules.

Each law is fitted to all curves, to all but each one, and to resampled blocks of points. A law's weight is the inverse
square of its mean squared error on the curves left out. The variance of what the average says is the sum of

- the weighted spread of the laws,
- the variance over resampled blocks (points of one curve are correlated: blocks of ``BLOCK`` points stay together),
- the square of ``HELD_OUT_SHARE`` times the error at the end of curves left out (root mean square, weighted), at least
  ``LEAST_ERROR``,
- the noise of one measured loss.

``HELD_OUT_SHARE`` and ``curve.FADE`` were chosen on the 25M curves of arXiv 2503.12811 and frozen; then the 100M curves were
scored, once: mean absolute error .0039, three of six end losses inside the 90 % interval, WSD's end forecast .0099 too low.
The curves left out had happened to fit well there. ``LEAST_ERROR`` was added after that score: about the error at the end of
the twelve unseen public curves, so that it makes up for the miss on them by construction and awaits a blind test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from windtunnel.laws.curve import FADE, Kernel, Scale, Steps, Timeline, constants_of, model_for
from windtunnel.laws.curve_law import Curve, CurveLaw, knots
from windtunnel.laws.fit import Array, LawError, Prior, fit_many

AVERAGED: tuple[Kernel, ...] = ("exponential", "power", "multipower", "functional")
BLOCK = 12
HELD_OUT_SHARE = 0.4
LEAST_ERROR = 0.002
"""Of the log loss."""
_NORMAL_90 = 1.6449
_FEW = 40
"""Updates at which the variance over resampled blocks is taken; it is smooth."""
_SPREAD = 1.0
"""Standard deviation of the prior on log beta (about .3) and on gamma (about .5): they stop a fit that cannot tell."""


@dataclass(frozen=True)
class KernelFit:
    """One law: fitted, refitted to resampled blocks, and judged on curves left out."""

    law: CurveLaw
    draws: tuple[CurveLaw, ...]
    mean_error: dict[str, float]
    """Mean absolute error on each curve when it was left out."""
    end_error: dict[str, float]
    """Mean prediction minus loss over the last points of each curve when it was left out."""


@dataclass(frozen=True)
class CurveForecast:
    """Losses at some updates with their 90 % interval."""

    steps: Steps
    value: Array
    low90: Array
    high90: Array

    @property
    def end(self) -> tuple[float, float, float]:
        """The last loss: value, low and high."""
        return float(self.value[-1]), float(self.low90[-1]), float(self.high90[-1])


@dataclass(frozen=True)
class Contrast:
    """How much lower one schedule ends than another, with a 90 % interval; positive is a gain."""

    gain: float
    low90: float
    high90: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low90 > 0 or self.high90 < 0


@dataclass(frozen=True)
class CurveModel:
    """All laws with their weights."""

    fits: tuple[KernelFit, ...]
    weights: tuple[float, ...]
    noise: float
    """Standard deviation of one measured log loss around the smooth curve."""
    held_out: float
    """Root mean square error (log loss) at the end of curves left out, weighted over laws."""
    curves: tuple[str, ...]

    def predict(self, rates: Array, at: Steps | None = None) -> CurveForecast:
        """The loss along a run with these learning rates.

        Args:
            rates: learning rate of each update, warmup included.
            at: updates of interest; by default about 200 of them.
        """
        steps = knots(rates, 200) if at is None else at
        logs = np.stack([np.log(fit.law.losses(rates, steps)) for fit in self.fits])
        w = np.array(self.weights)[:, None]
        mean = (w * logs).sum(0)
        spread = (w * (logs - mean) ** 2).sum(0)
        few = steps[np.unique(np.linspace(0, len(steps) - 1, _FEW).round().astype(np.int64))]
        variance: Array = (w * np.stack([_variance(fit, rates, few) for fit in self.fits])).sum(0)
        resampled: Array = np.asarray(np.interp(steps, few, variance), dtype=np.float64)
        sd = np.sqrt(spread + resampled + self.unseen**2 + self.noise**2)
        return CurveForecast(steps, np.exp(mean), np.exp(mean - _NORMAL_90 * sd), np.exp(mean + _NORMAL_90 * sd))

    def contrast(self, rates: Array, default: Array) -> Contrast:
        """How much lower (in loss) a run with ``rates`` ends than one with ``default``.

        The error on curves left out counts with the share of the two schedules' decays that differs.
        """
        gains = np.array([fit.law.final(default) - fit.law.final(rates) for fit in self.fits])
        w = np.array(self.weights)
        gain = float(w @ gains)
        spread = float(w @ (gains - gain) ** 2)
        drawn = [np.array([law.final(default) - law.final(rates) for law in fit.draws]) for fit in self.fits]
        squares = [float(np.mean((d - float(g)) ** 2)) for d, g in zip(drawn, gains, strict=True)]
        resampled = float(w @ np.array(squares))
        level = float(w @ np.array([fit.law.final(default) for fit in self.fits]))
        unlike = decay_difference(rates, default) * self.unseen * level
        half = _NORMAL_90 * math.sqrt(spread + resampled + unlike**2)
        return Contrast(gain, gain - half, gain + half)

    def to_dict(self) -> dict[str, Any]:
        fits = [
            {"law": f.law.to_dict(), "draws": [one.to_dict() for one in f.draws], "mean_error": f.mean_error,
             "end_error": f.end_error}
            for f in self.fits
        ]  # fmt: skip
        return {
            "fits": fits, "weights": list(self.weights), "noise": self.noise, "held_out": self.held_out,
            "curves": list(self.curves),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CurveModel:
        """The model that ``to_dict`` wrote.

        Raises:
            LawError: a field is missing or of the wrong kind.
        """
        try:
            fits = tuple(
                KernelFit(
                    CurveLaw.from_dict(f["law"]), tuple(CurveLaw.from_dict(one) for one in f["draws"]),
                    dict(f["mean_error"]), dict(f["end_error"]),
                )
                for f in data["fits"]
            )  # fmt: skip
            return cls(
                fits, tuple(data["weights"]), float(data["noise"]), float(data["held_out"]), tuple(data["curves"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LawError("law", f"expected a model of curves as windtunnel writes it, got {error!r}") from None

    @property
    def unseen(self) -> float:
        """Standard deviation (log loss) of what all laws together get wrong about a schedule they have not seen."""
        return max(LEAST_ERROR, HELD_OUT_SHARE * self.held_out)

    @property
    def best(self) -> CurveLaw:
        """The law with the largest weight."""
        return self.fits[int(np.argmax(self.weights))].law


def decay_difference(one: Array, other: Array) -> float:
    """The share of two schedules' decays that is not common to both: 0 for equal ones, 1 for a decay against none."""
    size = min(len(one), len(other))
    a, b = one[-size:], other[-size:]
    peak = max(float(one.max()), float(other.max()))
    both = float((peak - a).sum() + (peak - b).sum())
    return float(np.abs(a - b).sum()) / both if both > 0 else 0.0


def _variance(fit: KernelFit, rates: Array, at: Steps) -> Array:
    """Variance of the log loss over resampled blocks."""
    drawn: Array = np.log(np.stack([law.losses(rates, at) for law in fit.draws]))
    squares: Array = (drawn - np.log(fit.law.losses(rates, at))) ** 2
    return squares.mean(0)


def fit_curves(
    curves: Sequence[Curve], *, kernels: Sequence[Kernel] = AVERAGED, fade: float = FADE, draws: int = 24, seed: int = 0,
    unit: str = "nats per token",
) -> CurveModel:  # fmt: skip
    """Fits curve laws to runs of one size, batch and corpus.

    Args:
        curves: at least two runs, one of them with a decay or a step down of the learning rate.
        kernels: laws to average.
        fade: see ``curve``; 0 for the laws as published.
        draws: refits to resampled blocks.

    Raises:
        LawError: there are fewer than two curves, two have one name, or no curve's learning rate ever falls.
    """
    if len(curves) < 2 or len({c.name for c in curves}) < len(curves):
        raise LawError("curves", f"expected at least two curves with names of their own, got {len(curves)}")
    if not any(c.falls for c in curves):
        raise LawError(
            "curves", "the learning rate never falls while a loss is measured: nothing here says what a decay does",
            "add a decayed branch, or a run with one step down",
        )  # fmt: skip
    scale = scale_of(curves)
    timelines = [Timeline.of(c.rates[: c.steps[-1]], c.steps, parts=1) for c in curves]
    target = np.log(np.concatenate([c.losses for c in curves]))
    noise = point_noise(curves)
    fits = tuple(_fit(kernel, curves, timelines, target, scale, fade, noise, draws, seed, unit) for kernel in kernels)
    errors = np.array([[fit.end_error[c.name] / c.losses[-1] for c in curves] for fit in fits])
    squares = (errors**2).mean(1)
    score = (squares + noise**2) ** -0.5
    weights = score / score.sum()
    return CurveModel(
        fits, tuple(float(x) for x in weights), noise, float(np.sqrt(weights @ squares)), tuple(c.name for c in curves)
    )


def scale_of(curves: Sequence[Curve]) -> Scale:
    """The units of a fit: largest learning rate, integral and length of its runs."""
    return Scale(
        max(float(c.rates.max()) for c in curves), max(float(c.rates[: c.steps[-1]].sum()) for c in curves),
        float(max(int(c.steps[-1]) for c in curves)),
    )  # fmt: skip


def point_noise(curves: Sequence[Curve]) -> float:
    """Standard deviation of one measured log loss around the smooth curve.

    From second differences of neighbouring log losses, by their median, at least .05 %.
    """
    second = np.concatenate([np.diff(np.log(c.losses), n=2) for c in curves])
    return max(5e-4, float(np.median(np.abs(second))) / 0.6745 / math.sqrt(6))


def _fit(
    kernel: Kernel, curves: Sequence[Curve], timelines: Sequence[Timeline], target: Array, scale: Scale, fade: float,
    noise: float, draws: int, seed: int, unit: str,
) -> KernelFit:  # fmt: skip
    model = model_for(kernel, timelines, scale, fade=fade)
    begin = _starts(kernel, target)
    prior, delta = _prior(kernel, begin, noise), max(1e-3, noise)
    owner = np.repeat(np.arange(len(curves)), [len(c.steps) for c in curves])
    without = [np.ones_like(target), *(np.where(owner == i, 0.0, 1.0) for i in range(len(curves)))]
    whole, *parts = fit_many(
        model, target, begin, np.stack(without), delta=delta, priors=[prior] * len(without), iterations=80, polish=1
    )  # fmt: skip
    weights = _block_weights(curves, draws, seed)
    redone = fit_many(model, target, whole.theta[None], weights, delta=delta, priors=[prior] * draws, iterations=40)

    def law(theta: Array, residual: float = 0.0) -> CurveLaw:
        constants = constants_of(kernel, theta, scale, fade=fade)
        return CurveLaw(
            kernel, constants, fade, unit=unit, peak=scale.rate, longest=round(scale.updates), residual=residual
        )  # fmt: skip

    mean_error: dict[str, float] = {}
    end_error: dict[str, float] = {}
    for index, (curve, part) in enumerate(zip(curves, parts, strict=True)):
        wrong = np.expm1(part.residuals[owner == index]) * curve.losses
        mean_error[curve.name] = float(np.abs(wrong).mean())
        end_error[curve.name] = float(wrong[-3:].mean())
    drawn = tuple(law(fit.theta) for fit in redone)
    found = law(whole.theta, float(np.sqrt(np.mean(whole.residuals**2))))
    limits = {
        key: (float(np.percentile(v, 5)), float(np.percentile(v, 95)))
        for key in found.constants
        if (v := [one.constants[key] for one in drawn])
    }
    return KernelFit(replace(found, intervals=limits), drawn, mean_error, end_error)


def _block_weights(curves: Sequence[Curve], draws: int, seed: int) -> Array:
    """How often each point occurs when blocks of neighbouring points are drawn, [draws, points]."""
    blocks: list[Steps] = []
    begin = 0
    for curve in curves:
        blocks.append(begin + np.arange(len(curve.steps)) // BLOCK)
        begin = int(blocks[-1][-1]) + 1
    member = np.concatenate(blocks)
    generator = np.random.default_rng(seed)
    return generator.multinomial(begin, np.full(begin, 1 / begin), size=draws)[:, member].astype(np.float64)


def kernel_starts(kernel: Kernel) -> list[list[float]]:
    """Where a fit begins with the kernel's own parameters (``curve.model_for``)."""
    own: dict[str, list[list[float]]] = {
        "integral": [[]],
        "exponential": [[math.log(c)] for c in (3.0, 20.0, 150.0)],
        "power": [[math.log(c), math.log(b)] for c in (10.0, 300.0) for b in (0.3, 1.0)],
        "functional": [[math.log(c), math.log(b)] for c in (30.0, 1000.0) for b in (0.3, 0.8)],
        "multipower": [[math.log(c), math.log(b), g] for c in (30.0, 1000.0) for b in (0.3, 0.8) for g in (0.2, 0.7)],
    }
    return own[kernel]


def _starts(kernel: Kernel, target: Array) -> Array:
    lowest = float(target.min())
    rows: list[list[float]] = []
    for floor in (0.75, 0.92):
        for alpha in (0.3, 0.6):
            for last in kernel_starts(kernel):
                amount = [] if kernel == "integral" else [lowest + math.log(0.03)]
                rows.append([lowest + math.log(floor), lowest + math.log(1 - floor), math.log(alpha), *amount, *last])
    return np.array(rows)


def _prior(kernel: Kernel, starts: Array, noise: float) -> Prior:
    mean, precision = np.zeros(starts.shape[1]), np.zeros(starts.shape[1])
    if kernel in ("power", "functional", "multipower"):
        mean[5], precision[5] = math.log(0.3), (noise / _SPREAD) ** 2
    if kernel == "multipower":
        mean[6], precision[6] = 0.5, (noise / _SPREAD) ** 2
    return Prior(mean, precision)
