"""Which of two recipes is better: paired seeds, thresholds fixed beforehand, and an answer only when the noise allows one.

Arms are compared by the log losses of runs that share a seed (init and data order): d_i = log loss of B - log loss of A, so
that a positive mean speaks for A. With n pairs the standard deviation of a difference is estimated from the pairs (n - 1
degrees of freedom) and from the registry of seed noise at this size (two independent runs differ with variance 2 sigma²):

    s² = ((n - 1) s_pairs² + nu 2 sigma²) / (n - 1 + nu)

If pairing takes part of the noise away the registry's share makes s too large, which costs power and no false picks. At most
``REGISTRY_MOST`` degrees of freedom are taken from the registry, so that pairs of an unlike recipe are heard.

Looking again after more runs is allowed and paid for: look k may spend alpha / 2^k, which adds up to less than alpha for any
number of looks (a union bound). With the half-width h_k = t(1 - alpha_k / 2) s / sqrt(n), at each look

    A or B       |mean| > h_k
    too close    |mean| + h_k <= least: whatever the difference is, it is smaller than what matters
    more         otherwise: so many pairs as bring h below the larger of least / 2 and |mean|

``least``, the smallest difference that matters, and alpha are fixed before the first look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import LawError, student_quantile

Outcome = Literal["A", "B", "too close", "more"]
REGISTRY_MOST = 10.0
_MOST_RUNS = 1000


@dataclass(frozen=True)
class Thresholds:
    """What is fixed before the first look: the least relative difference that matters, and the share of false picks."""

    least: float = 0.005
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise LawError("decision.least", f"expected a share above 0 and below 1, got {self.least:g}")
        if not 0 < self.alpha < 0.5:
            raise LawError("decision.alpha", f"expected a share above 0 and below .5, got {self.alpha:g}")

    def spent(self, look: int) -> float:
        """The share of alpha that look ``look`` (from 1) may spend."""
        return self.alpha / 2**look


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of log loss from seed to seed at one size, and the degrees of freedom behind it."""

    sd: float
    freedom: float
    source: str = ""


@dataclass(frozen=True)
class Decision:
    """What one look says."""

    outcome: Outcome
    look: int
    pairs: int
    mean: float
    """Mean log loss of B minus that of A; positive where A is better."""
    half_width: float
    sd: float
    """Standard deviation of one paired difference."""
    freedom: float
    more: int
    """Further pairs to train before the next look; 0 unless the outcome is ``more``."""
    thresholds: Thresholds

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half_width, self.mean + self.half_width

    def to_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome, "look": self.look, "pairs": self.pairs, "mean": self.mean, "interval": list(self.interval),
            "sd": self.sd, "freedom": self.freedom, "more": self.more, "least": self.thresholds.least,
            "alpha": self.thresholds.alpha,
        }  # fmt: skip


def registry(groups: Mapping[float, Sequence[Sequence[float]]]) -> dict[float, SeedNoise]:
    """Seed noise by size, from groups of runs that differ in nothing but their seeds.

    Args:
        groups: N to the losses of each group; groups of one run say nothing.

    Raises:
        LawError: a loss is not finite and positive.
    """
    found: dict[float, SeedNoise] = {}
    for size, several in groups.items():
        squares, freedom = 0.0, 0
        for losses in several:
            logs = _logs(losses)
            squares += float(((logs - logs.mean()) ** 2).sum()) if len(logs) else 0.0
            freedom += max(0, len(logs) - 1)
        if freedom and squares > 0:
            found[size] = SeedNoise(
                math.sqrt(squares / freedom), float(freedom), f"{freedom} degrees of freedom at {si(size)}"
            )
    return found


def noise_at(known: Mapping[float, SeedNoise], size: float) -> SeedNoise | None:
    """The registry's entry for a size; for a size without one, the nearest within a factor of four at half its freedom."""
    if size in known:
        return known[size]
    near = [s for s in known if max(s / size, size / s) <= 4]
    if not near:
        return None
    best = known[min(near, key=lambda s: abs(math.log(s / size)))]
    return SeedNoise(best.sd, best.freedom / 2, f"{best.source}, the nearest size")


def decide(
    a: Mapping[int, float], b: Mapping[int, float], thresholds: Thresholds, *, noise: SeedNoise | None = None, look: int = 1,
) -> Decision:  # fmt: skip
    """One look at two arms.

    Args:
        a: seed to loss, of arm A.
        b: the same of arm B; seeds that only one arm has are not used.
        thresholds: fixed before the first look.
        noise: of single runs at this size.
        look: the how-manieth look this is, from 1.

    Raises:
        LawError: the arms share no seed, a loss is not finite and positive, or the look is not counted from 1.
    """
    seeds = sorted(set(a) & set(b))
    if not seeds:
        raise LawError(
            "decision", "expected seeds that both arms have run, found none", "train both with the same seeds"
        )
    if look < 1:
        raise LawError("decision.look", f"expected a look from 1 on, got {look}")
    d = _logs([b[seed] for seed in seeds]) - _logs([a[seed] for seed in seeds])
    n, mean = len(d), float(d.mean())
    sd, freedom = _spread(d, noise)
    if not freedom:
        return Decision("more", look, n, mean, math.inf, math.nan, 0.0, 2, thresholds)
    half = _half_width(sd, freedom, n, thresholds.spent(look))
    outcome: Outcome = "more"
    if abs(mean) > half:
        outcome = "A" if mean > 0 else "B"
    elif abs(mean) + half <= thresholds.least:
        outcome = "too close"
    more = 0
    if outcome == "more":
        goal = max(thresholds.least / 2, abs(mean))
        more = max(1, runs_needed(sd, goal, thresholds.spent(look + 1), known=freedom - (n - 1)) - n)
    return Decision(outcome, look, n, mean, half, sd, freedom, more, thresholds)


def follow(
    pairs: Sequence[tuple[float, float]], thresholds: Thresholds, *, noise: SeedNoise | None = None, first: int = 3,
    looks: int = 5,
) -> Decision:  # fmt: skip
    """What looks lead to that train as many pairs as the one before asked for: the last look.

    Args:
        pairs: losses of A and B that are there to be trained, in the order in which they would be; the looks end with them.
        first: pairs of the first look.
        looks: the most that are taken.

    Raises:
        LawError: there are no pairs, or a loss is not finite and positive.
    """
    wanted, found = first, None
    for look in range(1, looks + 1):
        trained = pairs[:wanted]
        a, b = ({seed: pair[arm] for seed, pair in enumerate(trained)} for arm in (0, 1))
        found = decide(a, b, thresholds, noise=noise, look=look)
        if found.outcome != "more" or len(trained) == len(pairs):
            break
        wanted = found.pairs + found.more
    if found is None:
        raise LawError("decision.looks", f"expected one or more, got {looks}")
    return found


def runs_needed(sd: float, half_width: float, alpha: float, *, known: float = 0.0) -> int:
    """The number of pairs whose interval is at most so wide, if their spread stays what it is; at most 1000."""
    low, high = 2, _MOST_RUNS
    while low < high:
        middle = (low + high) // 2
        if _half_width(sd, middle - 1 + known, middle, alpha) <= half_width:
            high = middle
        else:
            low = middle + 1
    return low


def detectable(sd: float, pairs: int, thresholds: Thresholds, *, known: float = 0.0, power: float = 0.8) -> float:
    """The relative difference that a first look at so many pairs finds with this power (normal approximation)."""
    freedom = max(1.0, pairs - 1 + known)
    return (
        _half_width(1.0, freedom, pairs, thresholds.spent(1)) + student_quantile(freedom, power) / math.sqrt(pairs)
    ) * sd


def _spread(d: Any, noise: SeedNoise | None) -> tuple[float, float]:
    """Standard deviation of one difference and its degrees of freedom."""
    own = len(d) - 1
    borrowed = min(noise.freedom, REGISTRY_MOST) if noise else 0.0
    if own + borrowed == 0:
        return math.nan, 0.0
    squares = float(((d - d.mean()) ** 2).sum()) + (borrowed * 2 * noise.sd**2 if noise else 0.0)
    return math.sqrt(squares / (own + borrowed)), own + borrowed


def _half_width(sd: float, freedom: float, pairs: int, alpha: float) -> float:
    return student_quantile(freedom, 1 - alpha / 2) * sd / math.sqrt(pairs)


def _logs(losses: Sequence[float]) -> Any:
    values = np.asarray(losses, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise LawError(
            "decision", f"expected finite positive losses, got {list(losses)}", "a diverged run lost: leave it out"
        )
    return np.log(values)
