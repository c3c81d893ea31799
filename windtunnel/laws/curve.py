"""The loss along a run as a function of its learning rates: the formulas, for one law and for many at once.

Every law is a special case of

    L(t) = L0 + A S(t)^-alpha + B S(t)^-fade sum_k (eta_k - eta_{k-1}) G_k(t),    S(t) = sum_{i<=t} eta_i,

with the sum over all updates k <= t, the warmup's rises included (eta_0 = 0). The first part is progress, measured by the
integral of the learning rate; the second one is what a change of the learning rate has done by update t: a drop takes
B S^-fade times its height off the loss as G grows from 0 to 1. The published laws have fade = 0. They forecast the loss
after a decay too low on schedules they were not fitted on, the more the longer the run; ``FADE`` corrects that with one
number. The laws differ in G:

    integral     no second part (B = 0)
    exponential  1 - exp(-n/tau),             n = t - k + 1 updates since the change  (annealing law, arXiv 2408.11029)
    power        1 - (1 + n/tau)^-beta                                               (the same with a power kernel)
    multipower   1 - (1 + C eta_k^-gamma S_k)^-beta,  S_k = sum_{k<=i<=t} eta_i      (multi-power law, arXiv 2503.12811)
    functional   as multipower with gamma = 0: the noise of a functional scaling law (arXiv 2509.19189) integrated by
                 parts, whose memory runs in the integral of the learning rate

The annealing law writes S2 = sum_{i<=t} m_i, m_i = lambda m_{i-1} + (eta_{i-1} - eta_i), which is the exponential row
with lambda = exp(-1/tau) and its constant C = B (1 - lambda).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from windtunnel.laws.fit import Array, LawError, Model, log_sum_exp

Kernel = Literal["integral", "exponential", "power", "multipower", "functional"]
KERNELS: tuple[Kernel, ...] = ("integral", "exponential", "power", "multipower", "functional")
Steps = NDArray[np.int64]

CONSTANTS: dict[str, tuple[str, ...]] = {
    "integral": ("L0", "A", "alpha"),
    "exponential": ("L0", "A", "alpha", "B", "tau"),
    "power": ("L0", "A", "alpha", "B", "tau", "beta"),
    "multipower": ("L0", "A", "alpha", "B", "C", "beta", "gamma"),
    "functional": ("L0", "A", "alpha", "B", "C", "beta"),
}
"""Constants of each law, in plain units: S and B^-1 in learning rate (times updates), tau in updates."""

FADE = 0.1
"""Chosen on the nine curves of the 25M model of arXiv 2503.12811 (0, .1, .2, .3 tried) and frozen; see docs/decisions.md."""

_SMALLEST_RATE = 1e-4
"""Where a schedule ends at zero, eta^-gamma is taken at this share of the peak."""


@dataclass(frozen=True)
class Timeline:
    """What the laws need to know of a run: the integral at some updates, and the changes of the learning rate.

    Changes are gathered into blocks that end where a loss is asked for, at most ``parts`` of one sign between two such
    updates; each block is represented by its mean, weighted by the size of the changes.
    """

    updates: Array
    """Updates done, [points]."""
    integral: Array
    """Sum of the learning rate up to there, [points]."""
    change: Array
    """Change of the learning rate (negative for a drop), [blocks]."""
    log_rate: Array
    """Logarithm of the learning rate after the change, [blocks]."""
    since_update: Array
    """Updates before the change, [blocks]."""
    since_integral: Array
    """Integral before the change, [blocks]."""

    @classmethod
    def of(cls, rates: Array, at: Steps, *, parts: int = 2) -> Timeline:
        """The timeline of a run.

        Args:
            rates: the learning rate of each update, the first of the run (warmup included) first.
            at: updates at which the loss is wanted, rising, each between 1 and ``len(rates)``.
            parts: blocks of changes between two of them; 0 for one block a change (exact).

        Raises:
            LawError: a rate is negative or not finite, or an update lies outside the run.
        """
        if len(rates) == 0 or not np.isfinite(rates).all() or (rates < 0).any() or rates.max() <= 0:
            raise LawError("curve.rates", "expected learning rates of at least zero, not all of them zero")
        if len(at) == 0 or at[0] < 1 or at[-1] > len(rates) or (np.diff(at) <= 0).any():
            raise LawError("curve.steps", f"expected rising updates between 1 and {len(rates)}")
        total = np.concatenate([[0.0], np.cumsum(rates)])
        change = np.diff(rates, prepend=0.0)
        where = np.flatnonzero(np.abs(change) > 1e-9 * rates.max())
        sizes = np.abs(change[where])
        block = np.cumsum(_breaks(where, change[where], at, float(rates.max()), parts)) - 1
        weight = np.bincount(block, sizes)

        def mean(values: Array) -> Array:
            return np.bincount(block, sizes * values) / weight

        log_rate = np.log(np.maximum(rates[where], _SMALLEST_RATE * rates.max()))
        return cls(
            at.astype(np.float64), total[at], np.bincount(block, change[where]).astype(np.float64), mean(log_rate),
            mean(where.astype(np.float64)), mean(total[where]),
        )  # fmt: skip


def _breaks(where: Steps, change: Array, at: Steps, peak: float, parts: int) -> NDArray[np.bool_]:
    """Whether a new block begins at each change."""
    first = np.ones(len(where), dtype=bool)
    if parts:
        interval = np.searchsorted(at, where, side="right")  # a change at update k + 1 counts from that update on
        begin = np.concatenate([[0], at])[interval]
        length = np.concatenate([at, [where[-1] + 1]])[interval] - begin
        part = (where - begin) * parts // np.maximum(length, 1)
        large = np.abs(change) > peak / 64
        same = (np.diff(interval) == 0) & (np.diff(part) == 0) & (change[1:] * change[:-1] > 0)
        first[1:] = ~same | large[1:] | large[:-1]
    return first


@dataclass(frozen=True)
class Scale:
    """Units in which the parameters of a fit are of the order of one: learning rate, its integral, updates."""

    rate: float
    integral: float
    updates: float


def model_for(kernel: str, timelines: Sequence[Timeline], scale: Scale, *, fade: float = 0.0) -> Model:
    """log L at the points of all timelines, one after the other, as a function of many parameter vectors.

    Parameters: log L0, log of A S^-alpha at the scale, log alpha, log of B times the scale's rate, then the kernel's own:
    log(updates/tau), or log of C eta^-gamma S at the scale; log beta; gamma.
    """
    if kernel not in CONSTANTS:
        raise LawError("law.kernel", f"expected one of {', '.join(KERNELS)}, got {kernel!r}")
    log_s = [np.log(t.integral / scale.integral) for t in timelines]
    parts = [_Changes.of(kernel, t, scale) for t in timelines]

    def model(theta: Array) -> tuple[Array, Array]:
        floor, level, alpha = theta[:, 0:1], theta[:, 1:2], np.exp(np.clip(theta[:, 2:3], -8, 4))
        values: list[Array] = []
        slopes: list[Array] = []
        for log_integral, changes in zip(log_s, parts, strict=True):
            progress = level - alpha * log_integral
            log_base, (share_floor, share_progress) = log_sum_exp([np.broadcast_to(floor, progress.shape), progress])
            columns = [share_floor, share_progress, -share_progress * alpha * log_integral]
            if kernel == "integral":
                values.append(log_base)
                slopes.append(np.stack(columns, axis=-1))
                continue
            base = np.exp(log_base)
            amount = np.exp(np.clip(theta[:, 3:4], -30, 30)) * np.exp(-fade * log_integral)
            done, by_own = changes.at(theta[:, 4:])
            loss = np.maximum(base + amount * done, 1e-6 * base)
            columns = [column * base / loss for column in columns]
            columns += [amount * done / loss, *(amount * own / loss for own in by_own)]
            values.append(np.log(loss))
            slopes.append(np.stack(columns, axis=-1))
        return np.concatenate(values, axis=1), np.concatenate(slopes, axis=1)

    return model


@dataclass(frozen=True)
class _Changes:
    """sum_k change_k G_k(t) of one timeline and its derivatives by the kernel's parameters."""

    kernel: str
    change: Array
    elapsed: Array
    """Updates, or the integral of the learning rate, since each change, in units of the scale, [blocks, points]."""
    log_rate: Array
    passed: NDArray[np.bool_]

    @classmethod
    def of(cls, kernel: str, timeline: Timeline, scale: Scale) -> _Changes:
        if kernel in ("multipower", "functional"):
            elapsed = (timeline.integral[None, :] - timeline.since_integral[:, None]) / scale.integral
        else:
            elapsed = (timeline.updates[None, :] - timeline.since_update[:, None]) / scale.updates
        return cls(
            kernel, timeline.change / scale.rate, np.maximum(elapsed, 0.0), timeline.log_rate - np.log(scale.rate), elapsed > 0
        )  # fmt: skip

    def at(self, own: Array) -> tuple[Array, list[Array]]:
        """Values and derivatives, each [vectors, points], for the kernel's parameters [vectors, own]."""
        rows = [self._one(vector) for vector in own]
        return np.stack([row[0] for row in rows]), [np.stack(c) for c in zip(*(row[1:] for row in rows), strict=True)]

    def _one(self, own: Array) -> tuple[Array, ...]:
        pace = np.exp(np.clip(own[0], -30, 30))
        if self.kernel == "exponential":
            x = pace * self.elapsed
            rest = np.exp(-x)
            return self.change @ (1 - rest), self.change @ (x * rest)
        beta = np.exp(np.clip(own[1], -8, 4))
        gamma = np.clip(own[2], -4, 4) if self.kernel == "multipower" else 0.0
        x = self.elapsed * (pace * np.exp(-gamma * self.log_rate))[:, None] if gamma else pace * self.elapsed
        log_x = np.log1p(x)
        rest = np.exp(-beta * log_x)
        inner = beta * rest * (x / (1 + x))
        found = (self.change @ (1 - rest), self.change @ inner, self.change @ (beta * log_x * rest))
        if self.kernel == "multipower":
            return (*found, (self.change * -self.log_rate) @ inner)
        return found


def constants_of(kernel: str, theta: Array, scale: Scale, *, fade: float = 0.0) -> dict[str, float]:
    """The law's constants in plain units; parameters that ran away in a fit count as they did in it (``model_for``)."""
    theta = np.concatenate([theta[:2], np.clip(theta[2:3], -8, 4), np.clip(theta[3:5], -30, 30), theta[5:]])
    theta[5:6], theta[6:7] = np.clip(theta[5:6], -8, 4), np.clip(theta[6:7], -4, 4)
    alpha = float(np.exp(theta[2]))
    found = {"L0": float(np.exp(theta[0])), "A": float(np.exp(theta[1]) * scale.integral**alpha), "alpha": alpha}
    if kernel == "integral":
        return found
    found["B"] = float(np.exp(theta[3]) / scale.rate * scale.integral**fade)
    pace = float(np.exp(theta[4]))
    if kernel in ("exponential", "power"):
        found["tau"] = scale.updates / pace
    else:
        gamma = float(theta[6]) if kernel == "multipower" else 0.0
        found["C"] = pace * scale.rate**gamma / scale.integral
    if kernel != "exponential":
        found["beta"] = float(np.exp(theta[5]))
    if kernel == "multipower":
        found["gamma"] = float(theta[6])
    return found


def theta_of(kernel: str, constants: Mapping[str, float], scale: Scale, *, fade: float = 0.0) -> Array:
    """The inverse of ``constants_of``."""
    c = constants
    theta = [np.log(max(c["L0"], 1e-30)), np.log(c["A"]) - c["alpha"] * np.log(scale.integral), np.log(c["alpha"])]
    if kernel != "integral":
        theta.append(np.log(c["B"] * scale.rate) - fade * np.log(scale.integral))
    if kernel in ("exponential", "power"):
        theta.append(np.log(scale.updates / c["tau"]))
    elif kernel != "integral":
        theta.append(np.log(c["C"] * scale.integral) - c.get("gamma", 0.0) * np.log(scale.rate))
    if kernel in ("power", "multipower", "functional"):
        theta.append(np.log(c["beta"]))
    if kernel == "multipower":
        theta.append(c["gamma"])
    return np.array(theta, dtype=np.float64)
