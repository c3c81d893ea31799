"""What a lab book tells about the laws of each held-out corpus, with their maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.laws.loss import LossLaw
from windtunnel.report.contour import contour_figure

_MAPPED = ("average",)
"""The corpora whose map the page shows; of a study without them, the first one's."""


@dataclass(frozen=True)
class Row:
    """One corpus: its constants, the best use of the budget, and what its map needs."""

    corpus: str
    alpha: str
    beta: str
    floor: str
    parameters: float
    tokens: float
    ratio: str
    error: str
    law: LossLaw
    points: tuple[tuple[float, float], ...]
    mapped: bool
    line: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...]

    def draw(self, width: int) -> str:
        """The map of the law."""
        return contour_figure(
            lambda n, d: self.law.predict(n, d, force=True), self.points, self.line, band=self.band,
            target={"": (self.parameters, self.tokens)}, unit=self.law.unit, width=width, alone=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The study: what it cost and what each corpus says."""

    rows: tuple[Row, ...]
    trunks: int
    points: int
    share: float
    counts: str
    flops: str
    budget: float
    interval: str
    warnings: tuple[str, ...]


def read_scale(book: LabBook, program: str) -> Scale | None:
    """The laws by corpus in the paper's convention, or in the one that was asked for; None where there are none."""
    facts = book.facts(program, "scale")
    fact = facts.get("body, 6ND") or next(iter(facts.values()), None)
    if not fact or not fact["laws"]:
        return None
    names = [one["corpus"] for one in fact["laws"]]
    mapped = [name for name in _MAPPED if name in names] or names[:1]
    rows = tuple(_row(one, one["corpus"] in mapped) for one in fact["laws"])
    points = fact["laws"][0]["points"]
    warnings = dict.fromkeys(text for row in rows for text in row.law.warnings)
    return Scale(
        rows, len({p["cluster"] for p in points}), len(points), fact["spent"] / fact["independent"], fact["counts"],
        "6N FLOPs" if fact["flops"] == "6ND" else "its exact FLOPs, with head and attention", fact["budget"],
        fact["laws"][0]["interval"], tuple(warnings),
    )  # fmt: skip


def _row(one: Mapping[str, Any], mapped: bool) -> Row:
    law = LossLaw.from_dict(one["law"])
    value, low, high = one["tokens_per_parameter"]
    best = one["held_out"].get(one["best_form"])
    said = "" if best is None or best != best else minus(f"{100 * best:+.2f} % ({one['best_form']})")
    c = law.constants
    # Facts of before have one interval for all budgets.
    band = one.get("band") or [(n, d * low / value, d * high / value) for n, d in one["line"]]
    return Row(
        one["corpus"], f"{c['alpha']:.3f}", f"{c['beta']:.3f}", f"{c['L0']:.3f}", one["parameters"], one["tokens"],
        f"{si(value)} [{si(low)}, {si(high)}]", said, law, tuple((p["parameters"], p["tokens"]) for p in one["points"]), mapped,
        tuple((float(n), float(d)) for n, d in one["line"]), tuple((n, a, b) for n, a, b in band),
    )  # fmt: skip
