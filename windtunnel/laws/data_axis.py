"""The loss of one size over its compute: a power law or an exponential (arXiv 2404.06395, section 4.3 and appendix B.2).

    power        L(C) = b · C^(−a) + L0
    exponential  L(C) = b · e^(−a·C) + L0

Each has three free constants. For a given ``a`` the other two follow by linear least squares on the relative error, so the
fit is a search over one number: no start values, no local minimum of the others. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from windtunnel.base.errors import UserError

AxisForm = Literal["power", "exponential"]
AXIS_FORMS: tuple[AxisForm, ...] = ("power", "exponential")
_GRID = 400
_ROUNDS = 3


@dataclass(frozen=True)
class AxisLaw:
    """L(C) with C in units of ``scale``; ``residual`` is the root mean square relative error of the fit."""

    form: AxisForm
    a: float
    b: float
    floor: float
    scale: float
    residual: float

    def predict(self, compute: float) -> float:
        """The loss after that much compute, in the unit of the fitted losses."""
        return self.b * float(_basis(self.form, self.a, np.array([compute / self.scale]))[0]) + self.floor

    def compute_for(self, loss: float) -> float:
        """The compute after which this loss is reached; infinite if it lies at the floor or below."""
        if loss <= self.floor or self.b <= 0:
            return math.inf
        share = (loss - self.floor) / self.b
        log = -math.log(share) / self.a
        if self.form == "exponential":
            return self.scale * log
        return self.scale * math.exp(log) if log < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_axis(form: AxisForm, compute: Sequence[float], losses: Sequence[float]) -> AxisLaw:
    """The least-squares fit of one form, on relative errors, with b ≥ 0 and L0 ≥ 0.

    Raises:
        UserError: fewer than four points, which three constants would always meet.
    """
    if len(compute) < 4:
        raise UserError("data axis", f"expected four points or more for three constants, got {len(compute)}")
    y, scale = np.array(losses, float), float(np.exp(np.mean(np.log(compute))))
    x = np.array(compute, float) / scale
    low, high = (1e-3, 3.0) if form == "power" else (1e-3 / x.max(), 30.0 / x.min())
    best = (math.inf, low, 0.0, 0.0)
    for _ in range(_ROUNDS):  # each round looks closer around the best of the one before
        grid = np.geomspace(low, high, _GRID)
        best = min(best, *((*_linear(_basis(form, a, x), y, float(a)),) for a in grid))
        step = (high / low) ** (2 / _GRID)
        low, high = best[1] / step, best[1] * step
    squares, a, b, floor = best
    return AxisLaw(form, a, b, floor, scale, math.sqrt(squares / len(x)))


def _basis(form: AxisForm, a: float, x: np.ndarray) -> np.ndarray:
    return x**-a if form == "power" else np.exp(-a * x)


def _linear(basis: np.ndarray, y: np.ndarray, a: float) -> tuple[float, float, float, float]:
    """(sum of squared relative errors, a, b, L0) with the best b and L0 of at least 0."""
    columns = np.stack([basis / y, 1 / y], 1)
    (b, floor), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    if floor < 0:
        b, floor = float(columns[:, 0].sum() / (columns[:, 0] ** 2).sum()), 0.0
    if b < 0:
        b, floor = 0.0, float(columns[:, 1].sum() / (columns[:, 1] ** 2).sum())
    squares = float(((columns @ np.array([b, floor]) - 1) ** 2).sum())
    return squares, a, float(b), float(floor)
