"""L(N, D) corpus by corpus, as in figure 10 of arXiv 2404.06395: what each one says about the best size, and how well known.

Each corpus gets the additive law (the paper's), its constants, and the compute-optimal N and D of a budget. That optimum is the
mean (in logs) of what all forms of law say, weighted by how well each predicts the sizes that it was not fitted on, and its 90 %
interval is combined as in ``forecast``: what seed noise makes of the constants (with six or more independent trunks a
bootstrap over them says that), the spread of the forms, and half of how far the optimum of that budget moves when the largest
size is left out, which grows with the distance to the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import Array, LawError, student_quantile
from windtunnel.laws.forecast import combined, run_noise, weights_of
from windtunnel.laws.forms import FORMS, constants_of, free_parameters, weak_prior
from windtunnel.laws.heldout import Extrapolation, Noise, extrapolate, seed_noise
from windtunnel.laws.loss import LossLaw, fit_loss_law
from windtunnel.laws.optimum import FLOPS, best_for
from windtunnel.laws.points import Point, check_points, columns

_TRUNKS = 6
_DRAWS = 100
_WIDEST = 50.0
"""Log half-width at which an interval stops: nothing is known, and larger numbers could not be written down."""
Line = tuple[tuple[float, float], ...]
Band = tuple[tuple[float, float, float], ...]
_INTERVALS = 9
"""Budgets along the line of best use whose intervals are computed; between them they are interpolated."""
Cost = Callable[[float], float]
"""N to training FLOPs a token."""


@dataclass(frozen=True)
class BestUse:
    """N and D of lowest loss at a budget, and their 90 % intervals."""

    best: tuple[float, float]
    sizes90: tuple[float, float]
    lengths90: tuple[float, float]
    ratio: tuple[float, float, float]
    """D/N: value, low, high."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.best[0], "tokens": self.best[1], "tokens_per_parameter": list(self.ratio),
            "parameters90": list(self.sizes90), "tokens90": list(self.lengths90),
        }  # fmt: skip


@dataclass(frozen=True)
class CorpusLaw:
    """One corpus: its law, what each form says about the largest size left out, and the best use of a budget."""

    corpus: str
    law: LossLaw
    held_out: Mapping[str, float]
    """Form to mean log error on the largest size when it was left out."""
    use: BestUse
    """Of the budget, for training alone."""
    interval: str
    """Where the intervals come from."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of each form in the optimum."""
    laws: tuple[LossLaw, ...] = field(default=(), repr=False)
    """The law of each form, in the order of the weights."""
    points: tuple[Point, ...] = field(default=(), repr=False)
    line: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    """N and D of the best use of rising budgets, three decades around the points."""
    band: tuple[tuple[float, float, float], ...] = field(default=(), repr=False)
    """Along the line: N and the limits of the 90 % interval of D."""
    served: float = 0.0
    """Tokens read and written in use, which the budget pays for too in ``with_use``."""
    with_use: BestUse | None = None

    @property
    def best(self) -> tuple[float, float]:
        """N and D."""
        return self.use.best

    def loss(self, n: float, d: float) -> float:
        """The weighted mean of the forms."""
        logs = [math.log(law.predict(n, d, force=True)) for law in self.laws]
        return math.exp(sum(w * v for w, v in zip(self.weights.values(), logs, strict=True)))

    @property
    def best_form(self) -> str:
        """The form nearest to the largest size left out; the additive one where no size could be left out."""
        return min(self.held_out, key=lambda form: abs(self.held_out[form]), default="additive")

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus, "law": self.law.to_dict(), "held_out": dict(self.held_out), "best_form": self.best_form,
            **self.use.to_dict(), "weights": dict(self.weights), "interval": self.interval,
            "points": [point.to_dict() for point in self.points], "line": [list(pair) for pair in self.line],
            "band": [list(limits) for limits in self.band],
            **({"with_use": {"inference_tokens": self.served, **self.with_use.to_dict()}} if self.with_use else {}),
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


def best_use(law: LossLaw, budget: float, cost: Cost = six, served: float = 0.0) -> tuple[float, float]:
    """N and D of lowest loss at a budget of FLOPs when a token costs ``cost(N)``.

    Args:
        served: tokens read and written in use, which the budget pays for too: a third of a trained token each, as 2N is of 6N.

    Raises:
        LawError: the budget is not positive, or too small for that use.
    """
    if cost is six:
        return best_for(law, budget, served)
    middle, _ = law.optimum(budget)
    sizes = middle * np.exp(np.linspace(-7, 7, 141))
    tokens = np.array([budget / cost(float(n)) for n in sizes]) - served / 3
    losses = np.full(len(sizes), np.inf)
    losses[tokens > 0] = law.losses(sizes[tokens > 0], tokens[tokens > 0])
    inner = np.where(
        np.isfinite(losses[:-2] + losses[2:]), losses[1:-1], np.inf
    )  # neighbours that can be paid for, too
    index = int(np.argmin(inner)) + 1
    if not math.isfinite(inner[index - 1]):
        words = f"expected tokens in use that {budget:.3g} FLOPs can pay for, got {served:.3g}"
        raise LawError("--inference-tokens", words, "raise the budget")
    low, middle_loss, high = losses[index - 1 : index + 2]
    bend = low - 2 * middle_loss + high
    # The minimum of a parabola through the three lowest: a grid alone would move in steps.
    shift = float(np.clip(0.5 * (low - high) / bend, -1, 1)) if bend > 0 else 0.0
    n = float(sizes[index] * (sizes[1] / sizes[0]) ** shift)
    return n, budget / cost(n) - served / 3


def law_of(
    corpus: str, points: Sequence[Point], budget: float, *, cost: Cost = six, counts: str = "body", served: float = 0.0
) -> CorpusLaw:
    """Fits one corpus.

    Args:
        points: at least two sizes; N in the convention ``counts``.
        budget: FLOPs whose best use is asked for.
        cost: FLOPs a token by N.
        served: tokens in use; with some, the best use of a budget that pays for them too is asked for besides.

    Raises:
        LawError: the points cannot be used or have one size only, or the budget is too small for that use.
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
    middle = best_use(laws["additive"], budget, cost)
    answers = {form: extrapolate(form, points, *middle, noise) for form in FORMS}
    weights: dict[str, float] = dict(zip(FORMS, weights_of(list(answers.values()), noise), strict=True))
    held_out = {form: a.held_out[-1] for form, a in answers.items()} if len(np.unique(n)) > 2 else {}
    together = _Together(laws, answers, weights, points, noise, cost)
    noises = f"{trunks} trunks resampled" if drawn else f"seed noise ({trunks} trunks are too few to resample)"
    source = f"90 %: {noises}, spread of the forms by their error on sizes left out, the largest size left out"
    spent = [cost(p.parameters) * p.tokens for p in points]
    line, band = together.line(min(spent) / 30, max(spent) * 30)
    return CorpusLaw(
        corpus, laws["additive"], held_out, together.use(budget), source, weights, tuple(laws.values()), tuple(points), line,
        band, served, together.use(budget, served) if served else None,
    )  # fmt: skip


def _logs(best: tuple[float, float]) -> Array:
    """log N, log D and log D/N."""
    n, d = best
    return np.log([n, d, d / n])


@dataclass(frozen=True)
class _Together:
    """All forms of one corpus, with their weights: what they say together of the best use of a budget."""

    laws: Mapping[str, LossLaw]
    answers: Mapping[str, Extrapolation]
    weights: Mapping[str, float]
    points: Sequence[Point]
    noise: Noise
    cost: Cost

    def best(self, budget: float, served: float = 0.0) -> tuple[float, float]:
        """The weighted mean of the forms in log N, and what is left for D."""
        found = {form: best_use(self.laws[form], budget, self.cost, served)[0] for form in self.weights}
        size = math.exp(sum(w * math.log(found[form]) for form, w in self.weights.items()))
        return size, budget / self.cost(size) - served / 3

    def use(self, budget: float, served: float = 0.0) -> BestUse:
        """The best use with its 90 % intervals."""
        w, several = list(self.weights.values()), list(self.answers.values())
        best, noise = self.best(budget, served), self.noise
        run, freedom = run_noise(several, w, noise, len(self.points))

        def at(law: LossLaw) -> Array:
            return _logs(best_use(law, budget, self.cost, served))

        values = np.stack([at(self.laws[form]) for form in self.answers])
        moved = np.stack([at(_law(a, a.smaller.theta)) - at(_law(a, a.fitted.theta)) for a in several])
        drawn = [at(law) for law in self.laws["additive"].drawn()]
        if drawn:
            constants = np.tile(np.var(np.stack(drawn), axis=0), (len(several), 1))
        else:
            constants = np.stack([_constants(a, self.points, at, noise.sd) for a in several]) * run / noise.sd**2
        # How far the optimum of this budget moves without the largest size already grows with the distance.
        limits: list[tuple[float, float]] = []
        for i, centre in enumerate(_logs(best)):
            _, variance = combined(values[:, i].tolist(), constants[:, i].tolist(), (moved[:, i] ** 2).tolist(), w, 1.0)
            half = min(student_quantile(freedom, 0.95) * math.sqrt(variance), _WIDEST)
            limits.append((math.exp(centre - half), math.exp(centre + half)))
        return BestUse(best, limits[0], limits[1], (best[1] / best[0], *limits[2]))

    def line(self, low: float, high: float) -> tuple[Line, Band]:
        """The best use of training budgets from ``low`` to ``high``, and the 90 % limits of D along it."""
        budgets = np.geomspace(low, high, 40)
        line = tuple(self.best(float(c)) for c in budgets)
        asked = np.geomspace(low, high, _INTERVALS)
        ratios = np.log([self.use(float(c)).ratio for c in asked])
        off = [np.interp(np.log(budgets), np.log(asked), ratios[:, i] - ratios[:, 0]) for i in (1, 2)]
        return line, tuple((n, d * math.exp(a), d * math.exp(b)) for (n, d), a, b in zip(line, *off, strict=True))


def _law(answer: Extrapolation, theta: Array) -> LossLaw:
    """A form with these parameters."""
    return LossLaw(answer.form, constants_of(answer.form, theta, answer.at), (1, 1), (1, 1))


def _constants(answer: Extrapolation, points: Sequence[Point], at: Callable[[LossLaw], Array], noise: float) -> Array:
    """Variance of the optimum from seed noise through the fitted constants, by finite differences."""
    theta = answer.fitted.theta
    rows: list[Array] = []
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-3
        rows.append((at(_law(answer, theta + step)) - at(_law(answer, theta - step))) / 2e-3)
    return np.array([answer.variance(points, noise, gradient) for gradient in np.stack(rows, axis=1)])


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
            f"ledger: {si(self.spent)} FLOPs for {self.sizes} trunks with {self.lengths} branches each; as independent runs "
            f"{si(self.independent)} FLOPs: {100 * self.share:.0f} %"
        )


def check_flops(flops: str) -> None:
    """Raises for an unknown way to count FLOPs.

    Raises:
        LawError: it is neither 6ND nor exact.
    """
    if flops not in FLOPS:
        raise LawError("law.flops", f"expected one of {', '.join(FLOPS)}, got {flops!r}")
