"""Loss as a function of non-embedding parameters N and training tokens D: fitted and named laws, compute optima.

Losses are nats per UTF-8 byte unless a law says otherwise. The formulas and their sources stand in ``forms``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import Array, Fitted, LawError, Prior, bootstrap, fit_robust
from windtunnel.laws.forms import Coordinates, FormName, constants_of, free_parameters, model_for, starts_for
from windtunnel.laws.points import Point, check_points, columns, far_off

_CONSTANTS = {
    "additive": ("C_N", "alpha", "C_D", "beta", "L0"),
    "coupled": ("N_c", "D_c", "alpha_N", "alpha_D"),
    "skaling": ("A", "a", "B", "b", "k", "E"),
}
_DATA = ("C_D", "beta", "L0", "D_c", "B", "b", "E")
"""Constants of the data term, and of the floor from which it cannot be told with one D."""

REACH = 10.0
"""Times beyond the fitted range up to which a form without a floor, and refitted constants, are believed."""


@dataclass(frozen=True)
class LossLaw:
    """A formula with its constants in plain parameters and tokens.

    ``sizes`` and ``lengths`` are the smallest and largest N and D that it was fitted on; ``intervals`` holds the 95 %
    interval of each constant where a bootstrap was possible; ``warnings`` says what the design could not identify.
    """

    form: str
    constants: Mapping[str, float]
    sizes: tuple[float, float]
    lengths: tuple[float, float]
    name: str = "fitted"
    source: str = ""
    unit: str = "nats per byte"
    points: int = 0
    residual: float = 0.0
    """Root mean square of the log residuals."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    warnings: tuple[str, ...] = ()
    counts: str = "body"
    """What N counts: ``body`` (non-embedding parameters) or ``body+head``."""
    batch: float | None = None
    """Tokens in a batch of the runs that it was fitted on; None where it is not known or not one."""
    base_lr: float | None = None
    """Their base learning rate."""
    draws: tuple[tuple[float, ...], ...] = ()
    """The constants refitted to resampled trunks, in the order of ``constants``."""

    def __post_init__(self) -> None:
        wanted = _CONSTANTS.get(self.form)
        if wanted is None or set(wanted) != set(self.constants):
            raise LawError("law", f"expected a form of {', '.join(_CONSTANTS)} with its constants, got {self.form!r}")
        if not all(math.isfinite(v) and v >= 0 for v in self.constants.values()):
            raise LawError("law", f"expected finite constants of at least zero, got {dict(self.constants)}")
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))
        object.__setattr__(self, "intervals", MappingProxyType(dict(self.intervals)))

    @property
    def floor(self) -> float | None:
        """The loss that no size and no data go below; None for a form without one."""
        return self.constants.get("L0", self.constants.get("E"))

    def predict(self, parameters: float, tokens: float, *, force: bool = False) -> float:
        """The loss at N, D.

        Raises:
            LawError: N or D is not positive, or a law without a floor is asked about more than 10 times its largest N.
        """
        for what, value in (("parameters", parameters), ("tokens", tokens)):
            if not (math.isfinite(value) and value > 0):
                raise LawError(f"law.{what}", f"expected a positive number, got {value}")
        reach = parameters / self.sizes[1]
        if self.floor is None and reach > REACH and not force:
            raise LawError(
                "law.parameters",
                f"the {self.form} law has no floor and was fitted up to N = {si(self.sizes[1])}, "
                f"got {si(parameters)} ({reach:.3g}×, at most {REACH:g}×)",
                "fit larger proxies, use a law with a floor, or force it",
            )
        return float(self.losses(np.array([float(parameters)]), np.array([float(tokens)]))[0])

    def losses(self, parameters: Array, tokens: Array) -> Array:
        """The losses for arrays of N and D, without any check of range."""
        n, d, c = np.log(parameters), np.log(tokens), self.constants
        if self.form == "additive":
            return c["C_N"] * np.exp(-c["alpha"] * n) + c["C_D"] * np.exp(-c["beta"] * d) + c["L0"]
        ln_a, a, ln_b, b, k = self._bracket()
        return np.exp(k * np.logaddexp(ln_a - a * n, ln_b - b * d)) + (self.floor or 0.0)

    def outside(self, parameters: float, tokens: float) -> list[str]:
        """One sentence for each axis on which this point lies beyond the fitted range."""
        notes: list[str] = []
        for what, value, (low, high) in (("N", parameters, self.sizes), ("D", tokens, self.lengths)):
            if value > high * 1.001:
                notes.append(f"{what} = {si(value)} is {value / high:.3g}× the largest fitted ({si(high)})")
            elif value < low / 1.001:
                notes.append(f"{what} = {si(value)} is {low / value:.3g}× below the smallest fitted ({si(low)})")
        return notes

    def reach(self, parameters: float, tokens: float) -> float:
        """How many times beyond the fitted range of N or D this lies; at most 1 within it."""
        pairs = ((parameters, self.sizes), (tokens, self.lengths))
        return max(max(value / high, low / value) for value, (low, high) in pairs)

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D that minimise the loss at C = 6ND FLOPs.

        All forms rise with A N^-a + B D^-b, whose minimum on a hyperbola is N = G (C/6)^(b/(a+b)), D = (C/6)/N with
        G = (aA/bB)^(1/(a+b)) (arXiv 2404.06395, section 4.5; 2203.15556, equation 4).

        Raises:
            LawError: the FLOPs are not positive, or an exponent is zero.
        """
        if not (math.isfinite(flops) and flops > 0):
            raise LawError("law.flops", f"expected a positive number, got {flops}")
        ln_a, a, ln_b, b, _ = self._bracket()
        if not (a > 0 and b > 0 and math.isfinite(ln_a) and math.isfinite(ln_b)):
            raise LawError("law", "this law does not fall with both N and D, so that it has no optimum")
        budget = math.log(flops / 6)
        ln_n = (math.log(a) + ln_a - math.log(b) - ln_b + b * budget) / (a + b)
        return math.exp(ln_n), math.exp(budget - ln_n)

    def tokens_per_parameter(self, flops: float) -> float:
        """D/N at the optimum of C = 6ND."""
        n, d = self.optimum(flops)
        return d / n

    def _bracket(self) -> tuple[float, float, float, float, float]:
        """log A, a, log B, b and k of (A N^-a + B D^-b)^k."""
        c = self.constants
        if self.form == "additive":
            return _log(c["C_N"]), c["alpha"], _log(c["C_D"]), c["beta"], 1.0
        if self.form == "coupled":
            ratio = c["alpha_N"] / c["alpha_D"]
            return ratio * _log(c["N_c"]), ratio, _log(c["D_c"]), 1.0, c["alpha_D"]
        return _log(c["A"]), c["a"], _log(c["B"]), c["b"], c["k"]

    def drawn(self) -> list[LossLaw]:
        """One law for each draw that falls with both N and D."""
        names = _CONSTANTS[self.form]
        laws = [replace(self, constants=dict(zip(names, draw, strict=True)), draws=()) for draw in self.draws]
        return [law for law in laws if all(value > 0 for key, value in law.constants.items() if key not in ("L0", "E"))]

    @property
    def setting(self) -> str:
        """The batch and base learning rate that it is for, in words; empty where they are not known."""
        if self.batch is None or self.base_lr is None:
            return ""
        return f"for batches of {si(self.batch)} tokens at a base learning rate of {self.base_lr:g}"

    def to_dict(self) -> dict[str, Any]:
        more: dict[str, Any] = {} if self.counts == "body" else {"counts": self.counts}
        more |= {key: value for key in ("batch", "base_lr") if (value := getattr(self, key)) is not None}
        if self.draws:
            more["draws"] = [list(draw) for draw in self.draws]
        return {
            "form": self.form, "constants": dict(self.constants),
            "sizes": list(self.sizes), "lengths": list(self.lengths), "name": self.name, "source": self.source,
            "unit": self.unit, "points": self.points, "residual": self.residual,
            "intervals": {key: list(value) for key, value in self.intervals.items()}, "warnings": list(self.warnings),
            **more,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LossLaw:
        """The law that ``to_dict`` wrote.

        Raises:
            LawError: a field is missing, unknown or of the wrong kind.
        """
        try:
            values = dict(data)
            for key in ("sizes", "lengths"):
                low, high = cast("list[float]", values[key])
                values[key] = (float(low), float(high))
            values["intervals"] = {str(k): (float(v[0]), float(v[1])) for k, v in values.get("intervals", {}).items()}
            values["warnings"] = tuple(str(w) for w in values.get("warnings", ()))
            values["draws"] = tuple(tuple(float(v) for v in draw) for draw in values.get("draws", ()))
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise LawError("law", f"expected a law as windtunnel writes it, got {error!r}") from None


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def fit_loss_law(
    points: Sequence[Point], form: FormName | str = "additive", *, delta: float = 1e-3, prior: Prior | None = None,
    draws: int = 0, seed: int = 0, unit: str = "nats per byte", name: str = "fitted", counts: str = "body",
) -> LossLaw:  # fmt: skip
    """Fits one form to finished runs.

    Args:
        points: runs; all of one batch size and base learning rate, or the law mixes what those do with N and D.
        form: ``additive``, ``coupled`` or ``skaling``.
        delta: where the Huber loss of log residuals turns linear (1e-3 in the published refits; about 1.5 standard
            deviations of the seed noise where points are few).
        prior: for few points, ``forms.weak_prior``.
        draws: bootstrap draws over trunks for 95 % intervals of the constants; 0 for none.
        counts: what N counts in the points, ``body`` or ``body+head``; kept with the law.

    Raises:
        LawError: the points cannot be used (``check_points``), or are fewer than the form's constants plus one.
    """
    count = free_parameters(form)
    check_points(points)
    if prior is None and len(points) <= count:
        raise LawError("points", f"the {form} law has {count} constants and needs more points, got {len(points)}")
    n, d, log_loss = columns(points)
    at = Coordinates.of(n, d)
    model = model_for(form, n, d, at)
    fitted = fit_robust(model, log_loss, starts_for(form, log_loss), delta=delta, prior=prior)
    law = LossLaw(
        form, constants_of(form, fitted.theta, at), (float(n.min()), float(n.max())), (float(d.min()), float(d.max())),
        name=name, unit=unit, points=len(points), residual=float(np.sqrt(np.mean(fitted.residuals**2))), counts=counts,
    )  # fmt: skip
    kept: tuple[tuple[float, ...], ...] = ()
    intervals: dict[str, tuple[float, float]] = {}
    if draws:
        thetas = bootstrap(model, log_loss, fitted.theta[None], [p.cluster for p in points],
                           delta=delta, prior=prior, draws=draws, seed=seed)  # fmt: skip
        drawn = [constants_of(form, theta, at) for theta in thetas]
        kept = tuple(tuple(c[key] for key in _CONSTANTS[form]) for c in drawn)
        for key in law.constants:
            low, high = np.percentile([c[key] for c in drawn], [2.5, 97.5])
            intervals[key] = (float(low), float(high))
    warnings = (*_unidentified(law, fitted, n, d, log_loss, prior), *far_off(points, fitted.residuals))
    if len(np.unique(d)) < 2:  # what nothing moved keeps its first value in every draw
        intervals = {key: value for key, value in intervals.items() if key not in _DATA}
    return replace(law, intervals=intervals, draws=kept, warnings=warnings)


def _unidentified(law: LossLaw, fitted: Fitted, n: Array, d: Array, log_loss: Array, prior: Prior | None) -> list[str]:
    """What these points say nothing about."""
    notes: list[str] = []
    sizes, lengths = len(np.unique(n)), len(np.unique(d))
    if lengths < 2:
        notes.append("all points have one D: the data term cannot be told from the floor")
    if prior is None and law.floor is not None and sizes < 3:
        notes.append(f"{sizes} sizes cannot tell the size term from the floor: read no meaning into the constants")
    if law.floor is not None and law.floor < 0.02 * math.exp(float(log_loss.min())):
        notes.append("the fit drives the floor to zero: the constants describe these points, not what lies beyond")
    matrix = fitted.jacobian.T @ fitted.jacobian
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    condition = float(np.linalg.cond(matrix / np.outer(scale, scale)))
    if np.ptp(np.log(n)) > 0 and lengths > 1 and abs(float(np.corrcoef(np.log(n), np.log(d))[0, 1])) > 0.995:
        notes.append("D is a power of N in all points: the size term and the data term cannot be told apart")
    elif prior is None and condition > 1e8:
        notes.append(f"the points hardly separate the constants (condition number {condition:.1g})")
    return notes


def _paper(corpus: str, c_n: float, alpha: float, c_d: float, beta: float, floor: float, printed: float) -> LossLaw:
    """A law as printed, with N and D in billions, turned into plain units."""
    return LossLaw(
        "additive",
        {"C_N": c_n * 1e9**alpha, "alpha": alpha, "C_D": c_d * 1e9**beta, "beta": beta, "L0": floor},
        (0.031e9, 2.0e9), (0.5e9, 120e9), name=f"minicpm-{corpus}",
        source=f"arXiv 2404.06395, figure 10; printed with {printed:g} tokens per parameter at 1e21 FLOPs", points=36,
    )  # fmt: skip


NAMED: Mapping[str, LossLaw] = MappingProxyType({
    law.name: law
    for law in (
        _paper("code", 3.32e-2, 0.37, 2.17e-1, 0.34, 0.17, 194.93),
        _paper("english", 8.08e-2, 0.26, 2.97e-1, 0.18, 0.27, 166.04),
        _paper("chinese", 5.14e-2, 0.35, 3.90e-1, 0.18, 0.40, 833.95),
        _paper("ultratext", 7.54e-2, 0.30, 2.92e-1, 0.30, 0.25, 95.60),
        _paper("chinese-yayi", 1.53e-1, 0.19, 3.76e-1, 0.17, 0.35, 112.79),
        _paper("average", 7.15e-2, 0.29, 3.00e-1, 0.23, 0.31, 191.87),
    )
})  # fmt: skip
"""The paper's six laws, from the rounded constants of its figure 10.

Their ratios D/N at 1e21 FLOPs are 193.7, 176.9, 879, 91.2, 105.8 and 183.9; the paper prints 194.93, 166.04, 833.95,
95.60, 112.79 and 191.87, from constants with more digits.
"""


def named_law(name: str) -> LossLaw:
    """One of ``NAMED``.

    Raises:
        LawError: there is none of that name.
    """
    if name not in NAMED:
        raise LawError("law", f"expected one of {', '.join(NAMED)}, got {name!r}")
    return NAMED[name]
