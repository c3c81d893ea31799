"""The loss of a small model over the shares of its data, from runs on drawn mixtures (RegMix, arXiv 2407.01492). Needs no torch.

log L(w) is a regression on the shares w ≥ 0, Σw = 1:

    constant   a
    linear     Σ b_i·w_i                                       the log-linear law of mixtures
    quadratic  Σ b_i·w_i + Σ c_ij·w_i·w_j, c shrunk             corpora that help or hinder each other (Scheffé 1958)
    smooth     Σ b_i·w_i + a Gaussian process of √w             anything smooth

All four are one kernel regression with unit noise: a flat prior on b, a prior of one strength on the rest. Its leave-one-out
errors have a closed form (Rasmussen & Williams 2006, equation 5.12), by which form, strength and length are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from windtunnel.base.errors import UserError
from windtunnel.laws.fit import Array

MixtureForm = Literal["constant", "linear", "quadratic", "smooth"]
MIXTURE_FORMS: tuple[MixtureForm, ...] = ("constant", "linear", "quadratic", "smooth")
"""Simplest first."""
_FLAT = 1e5
"""Prior variance over the noise of what is not to be shrunk."""
_STRENGTHS = tuple(float(v) for v in np.geomspace(0.1, 1e4, 11))
_LENGTHS = (0.25, 0.5, 1.0)
_SIMPLER = 1.05
"""A simpler form is preferred if its left-out error is at most this many times the best one's."""
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


@dataclass(frozen=True)
class MixtureLaw:
    """A fitted form. ``left_out`` holds each run's loss as the others foretell it, ``error`` the root mean square of the
    relative errors of these."""

    form: MixtureForm
    strength: float
    length: float
    shares: Array
    dual: Array
    centre: float
    left_out: tuple[float, ...]
    error: float

    def predict(self, shares: Array) -> Array:
        """Losses of mixtures: [k] or [n, k] shares to [n], in the unit of the fitted losses."""
        kernel = _kernel(self.form, np.atleast_2d(shares), self.shares, self.strength, self.length)
        return np.exp(self.centre + kernel @ self.dual)

    def to_dict(self) -> dict[str, Any]:
        """Form, constants and how well it foretells runs that it has not seen, as JSON."""
        return {
            "form": self.form, "strength": self.strength, "length": self.length, "error": self.error,
            "left_out": list(self.left_out),
        }  # fmt: skip


def _kernel(form: MixtureForm, a: Array, b: Array, strength: float, length: float) -> Array:
    if form == "constant":
        return _FLAT * np.ones((len(a), len(b)))
    out = _FLAT * (a @ b.T)
    if form == "quadratic":
        out += strength * (_products(a) @ _products(b).T)
    elif form == "smooth":
        apart = ((np.sqrt(a)[:, None, :] - np.sqrt(b)[None, :, :]) ** 2).sum(-1)
        out += strength * np.exp(-apart / (2 * length**2))
    return out


def _products(shares: Array) -> Array:
    """w_i·w_j of all pairs, times k² so that equal shares give 1."""
    count = shares.shape[1]
    i, j = np.triu_indices(count, 1)
    return count**2 * shares[:, i] * shares[:, j]


def fit_mixture(form: MixtureForm, shares: Sequence[Sequence[float]], losses: Sequence[float]) -> MixtureLaw:
    """The best fit of one form, by its leave-one-out error.

    Args:
        shares: [m, k], each row sums to 1.
        losses: m positive numbers.

    Raises:
        UserError: fewer runs than corpora and two, with which nothing can be left out; or a loss is not finite.
    """
    x, y = np.array(shares, float), np.array(losses, float)
    if len(y) < x.shape[1] + 2:
        raise UserError(
            "law mixture", f"expected {x.shape[1] + 2} mixtures or more of {x.shape[1]} corpora, got {len(y)}",
            "raise --mixtures, or mix fewer corpora",
        )  # fmt: skip
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise UserError("law mixture", "expected positive losses, got one that is not", "leave the run out")
    return min((_fitted(form, x, y, s, length) for s, length in _constants(form)), key=lambda law: law.error)


def _constants(form: MixtureForm) -> Iterator[tuple[float, float]]:
    lengths = _LENGTHS if form == "smooth" else (1.0,)
    strengths = _STRENGTHS if form in ("quadratic", "smooth") else (0.0,)
    yield from ((strength, length) for strength in strengths for length in lengths)


def _fitted(form: MixtureForm, x: Array, y: Array, strength: float, length: float) -> MixtureLaw:
    log = np.log(y)
    centre = float(log.mean())
    inverse = np.linalg.inv(_kernel(form, x, x, strength, length) + np.eye(len(y)))
    dual = inverse @ (log - centre)
    missed = dual / np.diag(inverse)
    left_out = np.exp(log - missed)
    error = math.sqrt(float(np.mean((left_out / y - 1) ** 2)))
    return MixtureLaw(form, strength, length, x, dual, centre, tuple(map(float, left_out)), error)


def choose_mixture_law(laws: Sequence[MixtureLaw]) -> MixtureLaw:
    """The simplest of the laws (given simplest first) whose left-out error is within 5 % of the best one's."""
    best = min(law.error for law in laws)
    return next(law for law in laws if law.error <= _SIMPLER * best)


def into_limits(shares: Array, limits: Array) -> Array:
    """Shares that keep their limits: what lies above goes to the other corpora in proportion to the room that they have.

    Raises:
        UserError: the limits leave room for less than the whole.
    """
    if float(limits.sum()) < 1 - 1e-9:
        raise UserError("law mixture", f"expected limits with room for all tokens, got room for {limits.sum():.0%}")
    held = np.minimum(shares / shares.sum(), limits)
    room, excess = limits - held, 1.0 - float(held.sum())
    return held + (excess * room / room.sum() if excess > 0 else 0.0)


def best_mixture(law: MixtureLaw, limits: Array, starts: Sequence[Array]) -> Array:
    """The shares at which a law is lowest within limits.

    From each start, share moves between two corpora, the pair that gains most, as long as that lowers the loss; in steps
    from a fifth to a thousandth. The sum stays 1 and no share leaves 0 … limit.
    """
    found = [_descend(law, into_limits(start, limits), limits) for start in starts]
    return found[int(np.argmin(law.predict(np.array(found))))]


def _descend(law: MixtureLaw, at: Array, limits: Array) -> Array:
    count = len(at)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    here = float(law.predict(at)[0])
    for step in _STEPS:
        while True:
            moved = np.repeat(at[None, :], len(pairs), 0)
            for row, (i, j) in enumerate(pairs):
                much = max(0.0, min(step, float(at[i]), float(limits[j] - at[j])))
                moved[row, i] -= much
                moved[row, j] += much
            losses = law.predict(moved)
            best = int(np.argmin(losses))
            if not losses[best] < here * (1 - 1e-9):
                break
            at, here = moved[best], float(losses[best])
    return at


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, of numbers without ties; None where it is not defined."""
    ranks = [np.argsort(np.argsort(np.array(values, float))).astype(float) for values in (a, b)]
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
