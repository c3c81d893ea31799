"""What a replicated claim asks for and how it is decided: rules fixed before any run. Plain numbers in, a verdict out.

A part of a claim is one number a seed, and a *region* in which the paper's sentence says that it lies. The mean's 90 %
interval over seeds (Student's t) decides: wholly inside, the part holds; wholly outside, it does not; else nobody can tell.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from windtunnel.tunnel.audit import Estimate

Verdict = Literal["holds", "does not hold", "cannot tell"]
VERDICTS: tuple[Verdict, ...] = ("holds", "does not hold", "cannot tell")
AS_GOOD = 0.5
"""Percent of the loss: two runs that differ by less count as equally good. Seed noise at 0.05M was
measured as .13 % before any claim was tried."""

ELSEWHERE = (
    ("section 3.2", "the best batch grows as the loss falls", "windtunnel tunnel batch RECIPE"),
    ("section 4.5", "L(N, D), its exponents α and β, and D/N at the optimum", "windtunnel law scale RECIPE"),
)
"""What the paper's sections 3 to 5 say besides, which is a fit and no claim: where, what, and the command that answers it."""


@dataclass(frozen=True)
class Region:
    """Where a number has to lie, between limits that are no part of it: a tie with a limit decides nothing."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"from {self.low:g} to {self.high:g}"


def decide(values: Sequence[float], region: Region) -> Verdict:
    """The verdict on one number a seed; from a single seed nobody can tell, nor where a run failed (not a number).

    Infinite is a loss that is never reached: it lies outside, and decides only if all seeds agree.
    """
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return "cannot tell"
    if any(math.isinf(value) for value in values):
        return "does not hold" if all(math.isinf(value) for value in values) else "cannot tell"
    found = Estimate.of(values)
    assert found.low is not None
    assert found.high is not None
    if region.low < found.low and found.high < region.high:
        return "holds"
    return "does not hold" if found.high < region.low or found.low > region.high else "cannot tell"


@dataclass(frozen=True)
class Part:
    """One decided sentence of a claim: what is counted, in which unit, where it has to lie, and one number a seed."""

    says: str
    counts: str
    unit: str
    region: Region
    values: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        return decide(self.values, self.region)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what is not finite is null."""
        found = Estimate.of([v for v in self.values if math.isfinite(v)]).to_dict() if self._finite else None
        limits = {name: v for name in ("low", "high") if math.isfinite(v := getattr(self.region, name))}
        return {
            "says": self.says, "counts": self.counts, "unit": self.unit, "region": limits, "asks": str(self.region),
            "values": [v if math.isfinite(v) else None for v in self.values], "estimate": found, "verdict": self.verdict,
        }  # fmt: skip

    @property
    def _finite(self) -> bool:
        return any(math.isfinite(value) for value in self.values)


def together(parts: Sequence[Part]) -> Verdict:
    """A claim holds if all its parts do, and does not hold if one of them does not."""
    found = {part.verdict for part in parts}
    if "does not hold" in found:
        return "does not hold"
    return "holds" if found == {"holds"} else "cannot tell"


def percent(value: float, reference: float) -> float:
    """How much higher a loss is than another, in percent of that."""
    return 100 * (value / reference - 1)
