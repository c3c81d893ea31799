"""The batch law from runs: tokens to a loss over batch size, their lowest points, and the line through these.

The protocol of arXiv 2404.06395, section 3.2 and appendix A.2. For each size and each loss level the tokens that each batch
needed to reach it are read off its curve of held-out loss; a parabola over log batch gives the best batch and how much half
and double of it cost; all minima together give B = a / L^b.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from scipy import special as _special  # pyright: ignore[reportMissingTypeStubs]

from windtunnel.laws.batch import BatchLaw
from windtunnel.laws.fit import Array, LawError

_stdtrit = cast("Callable[[float, float], float]", _special.stdtrit)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
WARNING = (
    "This law is tied to one tokenizer and corpus: an absolute loss in nats per token means something else under another, "
    "and the best batch with it."
)


@dataclass(frozen=True)
class BatchRun:
    """One size trained with one batch: (tokens, held-out loss in nats per token) at several finished lengths."""

    parameters: float
    batch: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Minimum:
    """The best batch of one size at one loss. ``half`` and ``double``: the share of tokens that these batches cost more.

    ``edge`` is ``"small"`` or ``"large"`` where the best of the batches is the last one on that side: such a minimum is no
    point of the law.
    """

    parameters: float
    loss: float
    batch: float
    tokens: float
    half: float
    double: float
    edge: str = ""


def tokens_to_reach(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Tokens after which a curve first lies at a loss, on a straight line between two lengths in log-log; None outside them."""
    ordered = sorted(points)
    if any(d <= 0 or not math.isfinite(v) or v <= 0 for d, v in ordered):
        raise LawError("law.batch", "expected positive tokens and losses, got another value")
    for (d0, v0), (d1, v1) in itertools.pairwise(ordered):
        if v0 >= loss >= v1 and v0 > v1:
            share = math.log(v0 / loss) / math.log(v0 / v1)
            return math.exp(math.log(d0) + share * math.log(d1 / d0))
    return None


def levels(runs: Sequence[BatchRun], count: int = 5) -> list[float]:
    """Losses, evenly spaced in log, that all runs of one size reach within their lengths; none if there are none."""
    low = max(min(v for _, v in run.points) for run in runs)
    high = min(max(v for _, v in run.points) for run in runs)
    return np.geomspace(high, low, count + 2)[1:-1].tolist() if low < high else []


def find_minima(runs: Sequence[BatchRun], count: int = 5) -> list[Minimum]:
    """The best batch of every size at several losses, from the loss that all its batches reached.

    Raises:
        LawError: a size has fewer than three batches.
    """
    out: list[Minimum] = []
    for size in sorted({run.parameters for run in runs}):
        mine = sorted((run for run in runs if run.parameters == size), key=lambda run: run.batch)
        if len({run.batch for run in mine}) < 3:
            raise LawError("law.batch", f"expected 3 batches of a size or more, got {len(mine)}", "add some")
        for loss in levels(mine, count):
            found = [(run.batch, d) for run in mine if (d := tokens_to_reach(run.points, loss)) is not None]
            if len(found) >= 3:
                out.append(_minimum(size, loss, found))
    return out


def polynomial(x: Array, y: Array, degree: int) -> Array:
    """Least-squares coefficients, the highest power first."""
    return np.asarray(np.polyfit(x, y, degree), dtype=np.float64)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _minimum(size: float, loss: float, found: Sequence[tuple[float, float]]) -> Minimum:
    """Of a least-squares parabola of log tokens over log2 batch, through up to five batches around the lowest."""
    x: Array = np.log2([b for b, _ in found])
    y: Array = np.log([d for _, d in found])
    lowest = int(np.argmin(y))
    if lowest in (0, len(found) - 1):
        batch, tokens = found[lowest]
        return Minimum(size, loss, batch, tokens, math.nan, math.nan, "small" if lowest == 0 else "large")
    for side in (2, 1):
        first, last = max(0, lowest - side), min(len(found) - 1, lowest + side)
        fit = polynomial(x[first : last + 1] - x[lowest], y[first : last + 1], 2)
        c, b, a = float(fit[0]), float(fit[1]), float(fit[2])
        place = -b / (2 * c) if c > 0 else math.nan
        if x[first] - x[lowest] <= place <= x[last] - x[lowest]:
            break
    cost = math.expm1(c)
    return Minimum(size, loss, 2 ** (x[lowest] + place), math.exp(a - c * place * place), cost, cost)


@dataclass(frozen=True)
class FittedBatchLaw:
    """B = a / L^b with 90 % intervals from leaving out one size after another (jackknife, Student's t).

    Minima of one size share their runs, so that sizes and not points are independent; with fewer than three there is no
    interval.
    """

    law: BatchLaw
    exponent_low: float | None
    exponent_high: float | None
    coefficient_low: float | None
    coefficient_high: float | None
    minima: tuple[Minimum, ...]

    def to_dict(self) -> dict[str, Any]:
        names = ("exponent_low", "exponent_high", "coefficient_low", "coefficient_high")
        return {
            "coefficient": self.law.coefficient, "exponent": self.law.exponent, "losses": list(self.law.losses),
            "warning": self.law.warning, **{name: getattr(self, name) for name in names},
            "minima": [{k: v if v == v else None for k, v in asdict(m).items()} for m in self.minima],
        }  # fmt: skip


def fit_batch_law(minima: Sequence[Minimum], source: str = "this tunnel") -> FittedBatchLaw:
    """The line through all minima that lie inside their batches, log B over log L.

    Raises:
        LawError: fewer than two such minima with different losses.
    """
    inside = [m for m in minima if not m.edge]
    if len({m.loss for m in inside}) < 2:
        raise LawError(
            "law.batch", f"expected best batches at 2 losses or more, got {len(inside)} of {len(minima)} inside the grid",
            "add smaller or larger batches",
        )  # fmt: skip
    intercept, exponent = _line(inside)
    losses = (min(m.loss for m in inside), max(m.loss for m in inside))
    law = BatchLaw("tunnel", math.exp(intercept), exponent, losses, source, WARNING)
    sizes = sorted({m.parameters for m in inside})
    parts = [[m for m in inside if m.parameters != size] for size in sizes]
    if len(sizes) < 3 or any(len({m.loss for m in part}) < 2 for part in parts):
        return FittedBatchLaw(law, None, None, None, None, tuple(minima))
    left: Array = np.array([_line(part) for part in parts])
    count = len(sizes)
    error = np.sqrt((count - 1) / count * ((left - left.mean(0)) ** 2).sum(0)) * _stdtrit(count - 1, 0.95)
    return FittedBatchLaw(
        law, exponent - error[1], exponent + error[1], math.exp(intercept - error[0]), math.exp(intercept + error[0]),
        tuple(minima),
    )  # fmt: skip


def _line(minima: Sequence[Minimum]) -> tuple[float, float]:
    slope, intercept = polynomial(
        np.array([-math.log(m.loss) for m in minima]), np.array([math.log(m.batch) for m in minima]), 1
    )
    return float(intercept), float(slope)
