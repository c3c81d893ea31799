"""The formulas for loss as a function of parameters N and training tokens D, in one scale-free parametrisation.

Every form is a special case of

    log L = lse(k lse((a - p x)/k, (b - q y)/k), e),  x = log N - x0,  y = log D - y0,

with lse the log of a sum of exponentials,

where exp(a - p x) is the loss that size alone would leave, exp(b - q y) the one that data alone would leave, k says how
the two combine and exp(e) is the floor:

    additive   k = 1:            C_N N^-alpha + C_D D^-beta + L0               (arXiv 2203.15556; 2404.06395, s. 4.5)
    coupled    q = k, no floor:  ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D   (arXiv 2001.08361, equation 1.5)
    skaling    all free:         (A N^-a + B D^-b)^k + E                       (arXiv 2608.07222)

p, q and k are fitted as logarithms, so that they stay positive; the centres x0 and y0 decorrelate levels from slopes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from windtunnel.laws.fit import Array, LawError, Model, Prior, log_sum_exp

FormName = Literal["additive", "coupled", "skaling"]
FORMS: tuple[FormName, ...] = ("additive", "coupled", "skaling")

_NO_FLOOR = -60.0
# Columns of theta in the order of the full parameter vector (a, log p, b, log q, log k, e).
_COLUMNS: dict[str, tuple[int, ...]] = {
    "additive": (0, 1, 2, 3, 5),
    "coupled": (0, 1, 2, 3),
    "skaling": (0, 1, 2, 3, 4, 5),
}

# Weak prior for few points: slopes about .25 within a factor of 1.8, combination about .5 within a factor of 2, floor
# about .35 of the lowest loss within a factor of 2, levels free. Published fits (alpha, beta .17 to .5; k .31 to 1) lie
# well inside.
_PRIOR_MEAN = np.array([0.0, np.log(0.25), 0.0, np.log(0.25), np.log(0.5), np.log(0.35)])
_PRIOR_SPREAD = np.array([np.inf, 0.6, np.inf, 0.6, 0.7, 0.7])


@dataclass(frozen=True)
class Coordinates:
    """Centres of log N and log D."""

    x0: float
    y0: float

    @classmethod
    def of(cls, parameters: Array, tokens: Array) -> Coordinates:
        return cls(float(np.log(parameters).mean()), float(np.log(tokens).mean()))


def free_parameters(form: str) -> int:
    """How many constants a form fits.

    Raises:
        LawError: there is no such form.
    """
    if form not in _COLUMNS:
        raise LawError("law.form", f"expected one of {', '.join(FORMS)}, got {form!r}")
    return len(_COLUMNS[form])


def model_for(form: str, parameters: Array, tokens: Array, at: Coordinates) -> Model:
    """The form at fixed points as a function of many parameter vectors, with derivatives."""
    free_parameters(form)
    x, y = np.log(parameters) - at.x0, np.log(tokens) - at.y0

    def model(theta: Array) -> tuple[Array, Array]:
        a, p, b, q, k, e = _expand(form, theta)
        inner, (share_n, share_d) = log_sum_exp([(a - p * x) / k, (b - q * y) / k])
        value, (share, share_floor) = log_sum_exp([k * inner, np.broadcast_to(e, inner.shape)])
        by_n, by_d = share * share_n, share * share_d
        by_p, by_q = -by_n * p * x, -by_d * q * y
        # d(k lse(u/k))/dk = lse(u/k) - sum_i share_i u_i/k
        by_k = share * (k * inner - share_n * (a - p * x) - share_d * (b - q * y))
        columns = [by_n, by_p, by_d, by_q, by_k, share_floor]
        if form == "coupled":
            columns[3] = by_q + by_k
        return value, np.stack([columns[i] for i in _COLUMNS[form]], axis=-1)

    return model


def _expand(form: str, theta: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    """a, p, b, q, k, e as [vectors, 1]; slopes are kept within e^±8 so that a wild step cannot overflow."""
    a, b = theta[:, 0:1], theta[:, 2:3]
    p, q = np.exp(np.clip(theta[:, 1:2], -8, 8)), np.exp(np.clip(theta[:, 3:4], -8, 8))
    if form == "additive":
        return a, p, b, q, np.ones_like(a), theta[:, 4:5]
    if form == "coupled":
        return a, p, b, q, q, np.full_like(a, _NO_FLOOR)
    return a, p, b, q, np.exp(np.clip(theta[:, 4:5], -8, 8)), theta[:, 5:6]


def starts_for(form: str, log_loss: Array, *, few: bool = False) -> Array:
    """Points to begin from: shares of floor, size and data in the mean loss times slopes, [starts, parameters]."""
    mean = float(log_loss.mean())
    floors = (0.0,) if form == "coupled" else (0.3,) if few else (0.1, 0.4, 0.75)
    balances = (0.5,) if few else (0.3, 0.7)
    slopes = (0.15, 0.4) if few else (0.12, 0.35, 0.9)
    combinations = (0.4,) if form == "skaling" else (1.0,)
    rows: list[list[float]] = []
    for floor, balance, p, q, k in itertools.product(floors, balances, slopes, slopes, combinations):
        power = q if form == "coupled" else k
        level = mean + np.log(1 - floor)
        a, b = level + power * np.log(balance), level + power * np.log(1 - balance)
        full = [a, np.log(p), b, np.log(q), np.log(k), mean + np.log(max(floor, 1e-9))]
        rows.append([float(full[i]) for i in _COLUMNS[form]])
    return np.array(rows)


def weak_prior(form: str, log_loss: Array, noise: float) -> Prior:
    """The weak prior, scaled to residuals with standard deviation ``noise`` (in log loss)."""
    mean = _PRIOR_MEAN.copy()
    mean[5] += float(log_loss.min())
    columns = list(_COLUMNS[form])
    return Prior(mean[columns], (noise / _PRIOR_SPREAD[columns]) ** 2)


def constants_of(form: str, theta: Array, at: Coordinates) -> dict[str, float]:
    """The formula's own constants in plain parameters and tokens."""
    a, p, b, q, k, e = (float(column[0, 0]) for column in _expand(form, theta[None]))
    log_n, log_d = a + p * at.x0, b + q * at.y0
    if form == "additive":
        return {"C_N": float(np.exp(log_n)), "alpha": p, "C_D": float(np.exp(log_d)), "beta": q, "L0": float(np.exp(e))}
    if form == "coupled":
        return {"N_c": float(np.exp(log_n / p)), "D_c": float(np.exp(log_d / q)), "alpha_N": p, "alpha_D": q}
    size, data = float(np.exp(log_n / k)), float(np.exp(log_d / k))
    return {"A": size, "a": p / k, "B": data, "b": q / k, "k": k, "E": float(np.exp(e))}
