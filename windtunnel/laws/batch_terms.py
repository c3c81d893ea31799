"""The three-term law of loss in parameters N, batch M and steps K, and the batch that it calls best.

    L(N, M, K) = E + A N^−a + B M^−b + C K^−c        (arXiv 2607.01487; M in tokens, D = M·K)

With D fixed a larger batch means fewer steps, so that the last two terms have a minimum, at
M = (b B / (c C))^(1/(b+c)) · D^(c/(b+c)), whatever the size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from windtunnel.laws.fit import Array, LawError, Model, Prior, bootstrap, fit_robust, log_sum_exp

NAMES = ("E", "A", "a", "B", "b", "C", "c")
_SPREAD = np.array([2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
"""Of the weak prior, in logarithms: levels within a factor of e^2, slopes within e."""
_SLOPE = 0.4


@dataclass(frozen=True)
class BatchPoint:
    """A finished run: parameters, tokens in a batch, steps, held-out loss, and the trunk whose noise it shares."""

    parameters: float
    batch: float
    steps: float
    loss: float
    cluster: str

    @property
    def tokens(self) -> float:
        return self.batch * self.steps


@dataclass(frozen=True)
class Spread:
    """A value with its 90 % interval from resampled trunks; without enough trunks there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {name: v if v is None or math.isfinite(v) else None for name, v in asdict(self).items()}


@dataclass(frozen=True)
class ThreeTermLaw:
    """The law with its constants in plain parameters, tokens and steps.

    ``sizes``, ``batches`` and ``tokens`` are the ranges of the runs behind it, ``residual`` the root mean square of the log
    residuals, ``draws`` the constants refitted to resampled trunks.
    """

    constants: Mapping[str, float]
    sizes: tuple[float, float]
    batches: tuple[float, float]
    tokens: tuple[float, float]
    residual: float
    draws: tuple[Mapping[str, float], ...] = field(default=(), repr=False)

    def loss(self, parameters: float, batch: float, steps: float) -> float:
        """The loss of a run."""
        k = self.constants
        return k["E"] + k["A"] * parameters ** -k["a"] + k["B"] * batch ** -k["b"] + k["C"] * steps ** -k["c"]

    def best_batch(self, tokens: float) -> Spread:
        """The batch in tokens with the lowest loss after D tokens."""
        return self._over(lambda k: _best(k, tokens))

    def cost(self, tokens: float, factor: float) -> Spread:
        """The share of tokens, and so of exact FLOPs, that this multiple of the best batch takes more to the same loss.

        Infinite where that batch never gets there.
        """
        return self._over(lambda k: _cost(k, tokens, factor * _best(k, tokens)))

    def cost_of(self, tokens: float, batch: float) -> Spread:
        """As ``cost``, for a batch in tokens."""
        return self._over(lambda k: _cost(k, tokens, batch))

    def band(self, tokens: float, share: float = 0.05) -> tuple[float, float]:
        """The batches that cost at most this share more than the best one."""
        best = _best(self.constants, tokens)
        ends: list[float] = []
        for direction in (-1.0, 1.0):
            low, high = 0.0, 20.0
            for _ in range(60):
                middle = 0.5 * (low + high)
                inside = _cost(self.constants, tokens, best * 2 ** (direction * middle)) <= share
                low, high = (middle, high) if inside else (low, middle)
            ends.append(best * 2 ** (direction * low))
        return ends[0], ends[1]

    @property
    def exponent(self) -> Spread:
        """Of the best batch as a power of D: c / (b + c)."""
        return self._over(lambda k: k["c"] / (k["b"] + k["c"]))

    def _over(self, value: Callable[[Mapping[str, float]], float]) -> Spread:
        drawn = [value(draw) for draw in self.draws]
        if not drawn:
            return Spread(value(self.constants))
        low, high = np.percentile(np.nan_to_num(drawn, posinf=1e300), [5, 95])
        return Spread(value(self.constants), float(low), float(high) if high < 1e299 else math.inf)

    def to_dict(self) -> dict[str, Any]:
        return {
            "constants": dict(self.constants), "sizes": list(self.sizes), "batches": list(self.batches),
            "tokens": list(self.tokens), "residual": self.residual, "exponent": self.exponent.to_dict(),
        }  # fmt: skip


def _best(k: Mapping[str, float], tokens: float) -> float:
    power = 1 / (k["b"] + k["c"])
    return math.exp(power * (math.log(k["b"] * k["B"] / (k["c"] * k["C"])) + k["c"] * math.log(tokens)))


def _cost(k: Mapping[str, float], tokens: float, batch: float) -> float:
    best = _best(k, tokens)
    reached = k["B"] * best ** -k["b"] + k["C"] * (tokens / best) ** -k["c"]
    left = reached - k["B"] * batch ** -k["b"]  # what the term of the steps may still be
    if left <= 0:
        return math.inf
    return (k["C"] / left) ** (1 / k["c"]) * batch / tokens - 1


def fit_three_terms(points: Sequence[BatchPoint], *, noise: float = 2e-3, draws: int = 100) -> ThreeTermLaw:
    """Fits the law to finished runs by the Huber loss of log residuals with a weak prior.

    Args:
        noise: standard deviation of the log loss from seed to seed; the Huber loss turns linear at 1.5 of it.
        draws: refits to resampled trunks for intervals, where there are six trunks or more.

    Raises:
        LawError: fewer than eight points, or fewer than three batches or two lengths.
    """
    if any(not (math.isfinite(v) and v > 0) for p in points for v in (p.parameters, p.batch, p.steps, p.loss)):
        raise LawError("law.batch", "expected positive numbers in every run, got another value")
    batches, lengths = {p.batch for p in points}, {round(math.log(p.tokens), 2) for p in points}
    if len(points) < 8 or len(batches) < 3 or len(lengths) < 2:
        got = f"{len(points)} runs with {len(batches)} batches and {len(lengths)} lengths"
        raise LawError("law.batch", f"expected 8 runs with 3 batches and 2 lengths or more, got {got}", "add some")
    logs = np.log(np.array([[p.parameters, p.batch, p.steps] for p in points]))
    target: Array = np.log(np.array([p.loss for p in points]))
    centre: Array = logs.mean(0)
    mean = float(target.mean())
    level = np.array([math.log(0.4), math.log(0.2), math.log(0.1), math.log(0.3)]) + mean
    slope = math.log(_SLOPE)
    prior = Prior(np.array([level[0], level[1], slope, level[2], slope, level[3], slope]), (noise / _SPREAD) ** 2)
    starts = np.array([
        [mean + math.log(e), mean + math.log((1 - e) * n), math.log(p), mean + math.log((1 - e) * (1 - n) * 0.3),
         math.log(q), mean + math.log((1 - e) * (1 - n) * 0.7), math.log(q)]
        for e, n, p, q in itertools.product((0.1, 0.5), (0.2, 0.5), (0.2, 0.6), (0.25, 0.8))
    ])  # fmt: skip
    model = _model(logs - centre)
    fitted = fit_robust(model, target, starts, delta=1.5 * noise, prior=prior)
    clusters = [p.cluster for p in points]
    thetas: Sequence[Array] = ()
    if draws and len(set(clusters)) >= 6:
        thetas = list(
            bootstrap(model, target, fitted.theta[None], clusters, delta=1.5 * noise, prior=prior, draws=draws)
        )
    spans = [(min(v), max(v)) for v in zip(*((p.parameters, p.batch, p.tokens) for p in points), strict=True)]
    return ThreeTermLaw(
        _constants(fitted.theta, centre), spans[0], spans[1], spans[2], float(np.sqrt(np.mean(fitted.residuals**2))),
        tuple(_constants(theta, centre) for theta in thetas),
    )  # fmt: skip


def _model(x: Array) -> Model:
    """The law at fixed points, [points, 3] centred logarithms, as a function of many parameter vectors."""

    def model(theta: Array) -> tuple[Array, Array]:
        slopes = [np.exp(np.clip(theta[:, i : i + 1], -8, 4)) for i in (2, 4, 6)]
        terms = [theta[:, i : i + 1] - s * x[:, j] for j, (i, s) in enumerate(zip((1, 3, 5), slopes, strict=True))]
        floor = np.broadcast_to(theta[:, 0:1], terms[0].shape)
        value, (by_e, *shares) = log_sum_exp([floor, *terms])
        columns = [by_e]
        for j, (share, s) in enumerate(zip(shares, slopes, strict=True)):
            columns += [share, -share * s * x[:, j]]
        return value, np.stack(columns, axis=-1)

    return model


def _constants(theta: Array, centre: Array) -> dict[str, float]:
    e, *rest = theta.tolist()
    out = {"E": math.exp(e)}
    for j, (big, small) in enumerate((("A", "a"), ("B", "b"), ("C", "c"))):
        slope = math.exp(min(4.0, max(-8.0, rest[2 * j + 1])))
        out |= {big: math.exp(rest[2 * j] + slope * float(centre[j])), small: slope}
    return out
