"""L(N, D) corpus by corpus, as in figure 10 of arXiv 2404.06395: what each one says about the best size, and how well known.

Each corpus gets the additive law (the paper's), its constants, and the compute-optimal N and D of a budget. With six or more
independent trunks the interval of an optimum comes from a bootstrap over trunks; with fewer it is the range over the forms of
law, which is narrower than what is not known and says so. How well each form predicts the largest size without having seen it
stands beside it: the form that does best there is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import LawError
from windtunnel.laws.forms import FORMS, free_parameters, weak_prior
from windtunnel.laws.heldout import extrapolate, seed_noise
from windtunnel.laws.loss import LossLaw, fit_loss_law
from windtunnel.laws.optimum import FLOPS
from windtunnel.laws.points import Point, check_points, columns

_TRUNKS = 6
_DRAWS = 100
Cost = Callable[[float], float]
"""N to training FLOPs a token."""


@dataclass(frozen=True)
class CorpusLaw:
    """One corpus: its law, what each form says about the largest size left out, and the best use of a budget."""

    corpus: str
    law: LossLaw
    held_out: Mapping[str, float]
    """Form to mean log error on the largest size when it was left out."""
    best: tuple[float, float]
    """N and D."""
    ratio: tuple[float, float, float]
    """D/N at the optimum: value, low, high."""
    interval: str
    """Where the interval comes from."""
    points: tuple[Point, ...] = field(default=(), repr=False)
    line: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    """N and D of the best use of rising budgets, three decades around the points."""

    @property
    def best_form(self) -> str:
        """The form nearest to the largest size left out; the additive one where no size could be left out."""
        return min(self.held_out, key=lambda form: abs(self.held_out[form]), default="additive")

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus, "law": self.law.to_dict(), "held_out": dict(self.held_out), "best_form": self.best_form,
            "parameters": self.best[0], "tokens": self.best[1], "tokens_per_parameter": list(self.ratio),
            "interval": self.interval, "points": [point.to_dict() for point in self.points],
            "line": [list(pair) for pair in self.line],
        }  # fmt: skip


def six(n: float) -> float:
    """FLOPs a token by the paper's count, 6N."""
    return 6.0 * n


def cost_between(known: Mapping[float, float]) -> Cost:
    """Exact FLOPs a token as a function of N: through the shapes that are known, with the outermost slopes beyond them.

    Raises:
        LawError: fewer than two sizes are known.
    """
    if len(known) < 2:
        raise LawError("law.flops", f"expected at least two sizes for an exact count, got {len(known)}", "write 6ND")
    x = np.log(sorted(known))
    y = np.log([known[size] for size in sorted(known)])

    def cost(n: float) -> float:
        at = math.log(n)
        i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
        return math.exp(y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))

    return cost


def best_use(law: LossLaw, budget: float, cost: Cost = six) -> tuple[float, float]:
    """N and D of lowest loss at a budget of FLOPs when a token costs ``cost(N)``.

    Raises:
        LawError: the budget is not positive.
    """
    if cost is six:
        return law.optimum(budget)
    middle, _ = law.optimum(budget)
    sizes = middle * np.exp(np.linspace(-7, 7, 561))
    tokens = np.array([budget / cost(float(n)) for n in sizes])
    index = int(np.argmin(law.losses(sizes, tokens)))
    return float(sizes[index]), float(tokens[index])


def law_of(corpus: str, points: Sequence[Point], budget: float, *, cost: Cost = six, counts: str = "body") -> CorpusLaw:
    """Fits one corpus.

    Args:
        points: at least two sizes; N in the convention ``counts``.
        budget: FLOPs whose best use is asked for.
        cost: FLOPs a token by N.

    Raises:
        LawError: the points cannot be used or have one size only.
    """
    check_points(points)
    noise = seed_noise(points)
    n, d, log_loss = columns(points)
    trunks = len({p.cluster for p in points})
    drawn = _DRAWS if trunks >= _TRUNKS else 0
    laws: dict[str, LossLaw] = {}
    for form in FORMS:
        few = len(points) <= free_parameters(form) + 2 or len(np.unique(n)) < 4
        prior = weak_prior(form, log_loss, noise.sd) if few else None
        law = fit_loss_law(
            points, form, delta=max(1e-2, 4 * noise.sd) if few else 1e-3, prior=prior, counts=counts, name=corpus,
            draws=drawn if form == "additive" else 0,
        )  # fmt: skip
        laws[form] = replace(law, warnings=(*law.warnings, *_design(n, d, prior is not None)))
    largest = np.unique(n)[-1]
    held_out: dict[str, float] = {}
    for form in FORMS:
        if len(np.unique(n)) > 2:
            held_out[form] = extrapolate(form, points, float(largest), float(d.max()), noise).held_out[-1]
    law = laws["additive"]
    best = best_use(law, budget, cost)
    others = law.drawn() if drawn else list(laws.values())
    ratios = [t / size for size, t in (best_use(one, budget, cost) for one in others)]
    low, high = (float(v) for v in np.percentile(ratios, [5, 95])) if drawn else (min(ratios), max(ratios))
    source = (
        f"90 %, {trunks} trunks resampled"
        if drawn
        else f"range of {len(others)} forms; {trunks} trunks are too few to resample"
    )
    spent = [cost(p.parameters) * p.tokens for p in points]
    line = tuple(best_use(law, float(c), cost) for c in np.geomspace(min(spent) / 30, max(spent) * 30, 40))
    return CorpusLaw(corpus, law, held_out, best, (best[1] / best[0], low, high), source, tuple(points), line)


def _design(n: Any, d: Any, prior: bool) -> list[str]:
    """What this design cannot identify, where a prior hides it from the fit itself."""
    notes: list[str] = []
    sizes, lengths = len(np.unique(n)), len(np.unique(d))
    span_n, span_d = float(n.max() / n.min()), float(d.max() / d.min())
    if prior and sizes < 4:
        notes.append(f"{sizes} sizes: the floor and the exponents lean on a weak prior")
    if span_n < 4:
        notes.append(f"the sizes span a factor of {span_n:.2g} only: alpha is hardly known")
    if lengths > 1 and span_d < 4:
        notes.append(f"the lengths span a factor of {span_d:.2g} only: beta is hardly known")
    return notes


def averaged(points: Mapping[str, Sequence[Point]], weights: Mapping[str, float]) -> list[Point]:
    """One point a run with the weighted mean of its losses on some corpora.

    Raises:
        LawError: the corpora do not hold the same runs.
    """
    total = sum(weights.values())
    several = [points[name] for name in weights]
    if len({len(part) for part in several}) != 1:
        raise LawError("points", "expected the same runs for every corpus", "score them all")
    out: list[Point] = []
    for group in zip(*several, strict=True):
        if len({(p.cluster, p.tokens, p.seed) for p in group}) != 1:
            raise LawError("points", "expected the same runs in the same order for every corpus")
        loss = sum(w / total * p.loss for w, p in zip(weights.values(), group, strict=True))
        out.append(replace(group[0], loss=loss))
    return out


@dataclass(frozen=True)
class Saved:
    """FLOPs of a study that grows branches from trunks against independent runs for the same points."""

    spent: float
    independent: float
    sizes: int
    lengths: int

    @property
    def share(self) -> float:
        return self.spent / self.independent

    def __str__(self) -> str:
        return (
            f"ledger: {si(self.spent)}FLOPs for {self.sizes} trunks with {self.lengths} branches each; as independent runs "
            f"{si(self.independent)}FLOPs: {100 * self.share:.0f} %"
        )


def check_flops(flops: str) -> None:
    """Raises for an unknown way to count FLOPs.

    Raises:
        LawError: it is neither 6ND nor exact.
    """
    if flops not in FLOPS:
        raise LawError("law.flops", f"expected one of {', '.join(FLOPS)}, got {flops!r}")
