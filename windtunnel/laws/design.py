"""Which decay a curve law would choose for a run of a given length, and whether it can tell that from the usual one.

The candidates are decays of the schedules that can be trained (``train.schedule``): shares of all updates, forms and floors
on a grid. The chosen one has the lowest forecast loss at the end, averaged over the laws; what it is said to gain is
``CurveModel.contrast``, which counts the laws' disagreement, the resampled blocks and what all laws together get wrong about
decays that they have not seen. A gain whose 90 % interval contains zero is no reason to leave the usual decay.

A law knows the decays that it was fitted to. Unless asked to look anywhere, candidates take at most ``REACH`` times the share
of the longest decay among the runs and end no lower than they did; what is extrapolation nevertheless is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from windtunnel.laws.curve_fit import Contrast, CurveModel
from windtunnel.laws.curve_law import Curve
from windtunnel.laws.fit import Array, LawError
from windtunnel.train.schedule import FORMS, Form, Schedule

SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FLOORS = (0.1, 0.03, 0.01, 0.0)
REACH = 2.0
_NEARLY = 0.85
"""The last loss of a curve is a mean that ends a little before the decay does, and so above its floor."""


@dataclass(frozen=True)
class DecayRule:
    """A decay: the share of all updates that it takes, its form and the share of the peak at which it ends."""

    share: float = 0.1
    form: Form = "linear"
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise LawError("decay.form", f"expected one of {', '.join(FORMS)}, got {self.form!r}")
        if not (0 < self.share <= 1 and 0 <= self.floor < 1):
            raise LawError(
                "decay", f"expected a share in (0, 1] and a floor in [0, 1), got {self.share:g} and {self.floor:g}"
            )

    def schedule(self, steps: int, warmup: int) -> Schedule:
        """The schedule of a run of ``steps`` updates; the decay begins after the warmup at the earliest."""
        decay = max(1, min(steps - warmup, round(self.share * steps)))
        return Schedule(warmup, steps - decay, decay, self.form, self.floor)

    def __str__(self) -> str:
        return f"{self.form}, {100 * self.share:g} % of the updates, down to {self.floor:g} of the peak"


@dataclass(frozen=True)
class Design:
    """The chosen decay beside the usual one."""

    steps: int
    warmup: int
    peak: float
    chosen: DecayRule
    usual: DecayRule
    expected: tuple[float, float, float]
    """Loss at the end with the chosen decay: value, low and high of the 90 % interval."""
    usual_expected: float
    gain: Contrast
    """How much lower the chosen decay ends."""
    shares: tuple[tuple[float, float, bool], ...]
    """For each share, with the best form and floor for it: loss above the chosen one, and whether the law can tell."""
    forms: tuple[tuple[Form, float], ...]
    """For each form, with its best share and floor: loss above the chosen one."""
    notes: tuple[str, ...] = ()

    @property
    def tells(self) -> bool:
        """Whether the chosen decay ends lower by more than the law may be wrong."""
        return self.gain.low90 > 0

    @property
    def recommended(self) -> DecayRule:
        """The chosen decay where the law can tell, else the usual one."""
        return self.chosen if self.tells else self.usual

    @property
    def start(self) -> int:
        """The update after which the chosen decay begins."""
        return self.chosen.schedule(self.steps, self.warmup).stable_end or 0

    @property
    def as_good(self) -> tuple[float, float]:
        """The smallest and largest share that the law cannot tell from the chosen one."""
        alike = [share for share, _, tells in self.shares if not tells]
        return min(alike), max(alike)

    def to_dict(self) -> dict[str, Any]:
        rules = {
            name: {"share": rule.share, "form": rule.form, "floor": rule.floor}
            for name, rule in (("chosen", self.chosen), ("usual", self.usual), ("recommended", self.recommended))
        }
        return {
            "steps": self.steps, "warmup": self.warmup, "peak": self.peak, **rules, "start": self.start,
            "expected": list(self.expected), "usual_expected": self.usual_expected, "gain": self.gain.gain,
            "gain90": [self.gain.low90, self.gain.high90], "tells": self.tells,
            "shares": [list(row) for row in self.shares], "forms": [list(row) for row in self.forms],
            "notes": list(self.notes),
        }  # fmt: skip


def rates_of(schedule: Schedule, peak: float, steps: int) -> Array:
    """The learning rate of each update of a run."""
    return peak * np.array([schedule.factor(step) for step in range(1, steps + 1)])


def design(
    model: CurveModel, curves: Sequence[Curve], steps: int, *, warmup: int = 0, usual: DecayRule | None = None,
    anywhere: bool = False,
) -> Design:  # fmt: skip
    """Chooses decay start, length, form and floor for a run of ``steps`` updates.

    Args:
        model: laws fitted to ``curves``.
        curves: the runs behind them: their lowest floor and greatest length bound what the laws know.
        warmup: updates of linear warmup of the run to be designed.
        usual: the decay to beat; by default linear over 10 % down to a tenth of the peak.
        anywhere: also decays longer and lower than the runs can speak for.

    Raises:
        LawError: the run is shorter than its warmup plus ten updates.
    """
    usual = usual or DecayRule()
    if steps < warmup + 10:
        raise LawError("schedule.steps", f"expected at least {warmup + 10} updates (warmup + 10), got {steps}")
    peak = max(float(curve.rates.max()) for curve in curves)
    weights = np.array(model.weights)

    def rates(rule: DecayRule) -> Array:
        return rates_of(rule.schedule(steps, warmup), peak, steps)

    def loss(rule: DecayRule) -> float:
        return float(weights @ [fit.law.final(rates(rule)) for fit in model.fits])

    candidates = _candidates(curves, int(steps), warmup, anywhere)
    table = {rule: loss(rule) for rule in candidates}
    # Equal within rounding: the shorter decay, the higher floor and the form named first.
    chosen = min(table, key=lambda rule: round(table[rule], 7))
    best = rates(chosen)
    by_share: list[tuple[float, float, bool]] = []
    for share in sorted({rule.share for rule in table}):
        rule = min((r for r in table if r.share == share), key=table.__getitem__)
        tells = rule is not chosen and model.contrast(best, rates(rule)).low90 > 0
        by_share.append((share, table[rule] - table[chosen], tells))
    by_form: tuple[tuple[Form, float], ...] = tuple(
        (form, min(v for r, v in table.items() if r.form == form) - table[chosen]) for form in FORMS
    )
    return Design(
        int(steps), warmup, peak, chosen, usual, model.predict(best).end, loss(usual), model.contrast(best, rates(usual)),
        tuple(by_share), by_form, tuple(_notes(curves, steps, chosen)),
    )  # fmt: skip


def _candidates(curves: Sequence[Curve], steps: int, warmup: int, anywhere: bool) -> list[DecayRule]:
    most = 1.0 if anywhere else REACH * longest_share(curves)
    lowest = 0.0 if anywhere else _NEARLY * lowest_floor(curves)
    shares = sorted({min(share, (steps - warmup) / steps) for share in SHARES if share <= max(most, 1.001 * SHARES[0])})
    floors = [floor for floor in FLOORS if floor >= lowest] or [round(lowest / _NEARLY, 3)]
    return [DecayRule(share, form, floor) for share in shares for form in FORMS for floor in floors]


def lowest_floor(curves: Sequence[Curve]) -> float:
    """The lowest share of its own peak to which any run's learning rate fell while losses were measured."""
    found = [1.0]
    for curve in curves:
        rates = curve.rates[: curve.steps[-1]]
        found.append(float(rates[int(rates.argmax()) :].min() / rates.max()))
    return min(found)


def longest_share(curves: Sequence[Curve]) -> float:
    """The largest share of a run's updates that its learning rate took to fall from the peak."""
    found = [0.0]
    for curve in curves:
        rates = curve.rates[: curve.steps[-1]]
        if rates[-1] < 0.999 * rates.max():
            found.append(1 - (float(np.flatnonzero(rates >= 0.999 * rates.max())[-1]) + 1) / len(rates))
    return max(found)


def _notes(curves: Sequence[Curve], steps: int, chosen: DecayRule) -> list[str]:
    notes: list[str] = []
    longest = max(int(curve.steps[-1]) for curve in curves)
    if steps > 1.05 * longest:
        notes.append(
            f"{steps:,} updates are {steps / longest:.3g}× the longest run that the law was fitted to ({longest:,})"
        )
    widest = longest_share(curves)
    if chosen.share > 1.1 * widest:
        notes.append(
            f"no fitted run decayed over more than {100 * widest:.2g} % of its updates: {100 * chosen.share:.2g} % is beyond that"
        )
    low = lowest_floor(curves)
    if chosen.floor < _NEARLY * low:
        notes.append(f"no fitted run went below {low:.2g} of the peak: a floor of {chosen.floor:g} is extrapolation")
    return notes
