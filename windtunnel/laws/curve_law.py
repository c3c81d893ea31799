"""A fitted or published law of the loss along a run, and the runs that it is fitted to. Formulas: ``curve``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from windtunnel.laws.curve import CONSTANTS, KERNELS, Scale, Steps, Timeline, model_for, theta_of
from windtunnel.laws.fit import Array, LawError

_CHUNK = 4_000_000
"""At most so many pairs of a change and an update at a time."""


@dataclass(frozen=True)
class Curve:
    """One run: its learning rates, update by update, and losses measured at some updates."""

    name: str
    rates: Array
    """Learning rate of each update, the run's first one (warmup included) first."""
    steps: Steps
    """Updates done when each loss was measured, rising."""
    losses: Array
    """Same unit in all curves of a fit."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses) or len(self.steps) < 8:
            raise LawError(f"curve '{self.name}'", f"expected at least 8 losses, one a step, got {len(self.losses)}")
        if not (np.isfinite(self.losses).all() and (self.losses > 0).all()):
            raise LawError(f"curve '{self.name}'", "expected finite positive losses", "leave diverged runs out")
        if self.steps[0] < 1 or self.steps[-1] > len(self.rates) or (np.diff(self.steps) <= 0).any():
            raise LawError(f"curve '{self.name}'", f"expected rising steps between 1 and {len(self.rates)}")

    @property
    def falls(self) -> bool:
        """Whether the learning rate falls while losses are measured."""
        rates = self.rates[: self.steps[-1]]
        return bool((np.diff(rates[self.steps[0] - 1 :]) < -1e-6 * rates.max()).any())

    @classmethod
    def averaged(cls, name: str, rates: Array, losses: Array, *, skip: int = 0, points: int = 120) -> Curve:
        """A curve from the noisy loss of every update: means over stretches, each placed at its middle.

        Args:
            rates: learning rate of each update.
            losses: training loss of each update, before it; NaN where none was recorded.
            skip: updates to leave out at the start (warmup and the steep first part).
            points: stretches.

        Raises:
            LawError: fewer than eight stretches have a loss.
        """
        edges = np.unique(np.linspace(skip, len(losses), points + 1).round().astype(np.int64))
        steps: list[int] = []
        means: list[float] = []
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            part = losses[low:high]
            if np.isfinite(part).any():
                # The loss of update i (from 0) was computed before it: after i updates.
                steps.append(max(1, round((low + high - 1) / 2)))
                means.append(float(np.nanmean(part)))
        return cls(name, rates, np.array(steps, dtype=np.int64), np.array(means))


@dataclass(frozen=True)
class CurveLaw:
    """A law with its constants in plain units (``curve``)."""

    kernel: str
    constants: Mapping[str, float]
    fade: float = 0.0
    name: str = "fitted"
    source: str = ""
    unit: str = "nats per token"
    peak: float = 0.0
    """The largest learning rate of the fitted runs; 0 where it is not known."""
    longest: int = 0
    """Updates of the longest fitted run."""
    residual: float = 0.0
    """Root mean square of the log residuals."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """90 % intervals of the constants."""

    def __post_init__(self) -> None:
        wanted = CONSTANTS.get(self.kernel)
        if wanted is None or set(wanted) != set(self.constants):
            raise LawError(
                "law.kernel", f"expected one of {', '.join(KERNELS)} with its constants, got {self.kernel!r}"
            )
        if not all(math.isfinite(v) and (v > 0 or k in ("gamma", "L0")) for k, v in self.constants.items()):
            raise LawError("law", f"expected positive finite constants, got {dict(self.constants)}")
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))
        object.__setattr__(self, "intervals", MappingProxyType(dict(self.intervals)))

    def losses(self, rates: Array, at: Steps, *, exact: bool = False) -> Array:
        """The loss after each of the updates ``at``.

        Args:
            rates: learning rate of each update, warmup included.
            at: rising updates, between 1 and ``len(rates)``.
            exact: every change of the learning rate on its own; else gathered into blocks (difference below 1e-4).
        """
        scale = Scale(float(rates.max()), float(rates.sum()), float(len(rates)))
        theta = theta_of(self.kernel, self.constants, scale, fade=self.fade)[None]
        size = max(1, _CHUNK // len(rates)) if exact else len(at)
        blocks = 0 if exact else max(2, 1024 // len(at))
        parts: list[Array] = []
        for begin in range(0, len(at), size):
            upto = at[begin : begin + size]
            timeline = Timeline.of(rates[: upto[-1]], upto, parts=blocks)
            parts.append(np.exp(model_for(self.kernel, [timeline], scale, fade=self.fade)(theta)[0][0]))
        return np.concatenate(parts)

    def predict(self, rates: Array, *, points: int = 400) -> Array:
        """The loss after every update, interpolated between ``points`` of them and where the learning rate turns."""
        at = knots(rates, points)
        return np.interp(np.arange(1, len(rates) + 1), at, self.losses(rates, at))

    def final(self, rates: Array) -> float:
        """The loss at the end of a run."""
        return float(self.losses(rates, np.array([len(rates)]))[-1])

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel, "constants": dict(self.constants), "fade": self.fade, "name": self.name,
            "source": self.source, "unit": self.unit, "peak": self.peak, "longest": self.longest, "residual": self.residual,
            "intervals": {key: list(value) for key, value in self.intervals.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CurveLaw:
        """The law that ``to_dict`` wrote.

        Raises:
            LawError: a field is missing, unknown or of the wrong kind.
        """
        try:
            values = dict(data)
            pairs = cast("Mapping[str, list[float]]", values.get("intervals", {}))
            values["intervals"] = {key: (float(v[0]), float(v[1])) for key, v in pairs.items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise LawError("law", f"expected a curve law as windtunnel writes it, got {error!r}") from None


def knots(rates: Array, points: int) -> Steps:
    """About ``points`` updates spread over a run, and those around a jump or turn of the learning rate."""
    total = len(rates)
    even = np.unique(np.linspace(1, total, min(points, total)).round().astype(np.int64))
    turn = np.abs(np.diff(rates, n=2, prepend=rates[:1], append=rates[-1:])) > 1e-3 * rates.max()
    near = np.flatnonzero(turn)
    if len(near) > points:  # a schedule that turns everywhere has no turns
        return even
    extra = np.concatenate([near, near + 1, near + 2])
    return np.unique(np.concatenate([even, np.clip(extra, 1, total)])).astype(np.int64)


def _published(size: str, *values: float) -> CurveLaw:
    return CurveLaw(
        "multipower", dict(zip(CONSTANTS["multipower"], values, strict=True)), name=f"multipower-{size}",
        source="arXiv 2503.12811, fitted by its authors to cosine and constant (24k steps) and one two-stage curve",
        peak=3e-4, longest=24000,
    )  # fmt: skip


PUBLISHED: Mapping[str, CurveLaw] = MappingProxyType({
    law.name: law
    for law in (
        _published("25M", 3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
        _published("100M", 2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
        _published("400M", 2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
    )
})  # fmt: skip
"""The multi-power law of arXiv 2503.12811 with its authors' constants (unrounded, from their released code)."""
