"""The forecast ledger in the report: every forecast of the home with its outcome, and how many of the blind ones held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from windtunnel.base.units import minus, si

Row = Mapping[str, Any]
COLUMNS = ("target", "kind", "sealed", "parameters", "tokens", "forecast, 90 %", "outcome", "error", "verdict")


def ledger_rows(data: Row, program: str, *, share: bool = False) -> list[tuple[str, ...]]:
    """A line for each forecast: of a law that of the average, of an adaptation that of each corpus.

    Args:
        data: ``ledger.forecasts``' data.
        program: the report's own.
        share: leave other programs out.
    """
    rows = [r for r in data["forecasts"] if r["corpus"] == "average" or r["before"] is not None]
    return [_cells(row) for row in rows if not share or row["program"] == program]


def _cells(row: Row) -> tuple[str, ...]:
    target = f"{row['program']}/{row['branch']}" + (f", {row['corpus']}" if row["before"] is not None else "")
    said, outcome = row["expected"], row["outcome"]
    if said is None:
        return (target, row["kind"], *("" for _ in COLUMNS[2:]))
    verdict = "open" if outcome is None else "inside" if row["inside_90"] else "miss"
    if (curve := row["curve"]) is not None:
        verdict += f"; whole curve {100 * curve['mean_error']:.1f} % off, {100 * curve['inside_90']:.0f} % in its band"
    return (
        target, row["kind"], row["time"][:10], si(row["parameters"]), si(row["tokens"]),
        f"{said['value']:.4f} [{said['low90']:.4f}, {said['high90']:.4f}]", "–" if outcome is None else f"{outcome:.4f}",
        "–" if outcome is None else minus(f"{100 * row['relative_error']:+.2f} %"), verdict,
    )  # fmt: skip


def coverage_lines(data: Row) -> list[str]:
    """What the blind forecasts with an outcome say about the intervals."""
    laws, adapted = [data[key] for key in ("blind", "inside_90", "blind_trunks")], data["adaptations"]
    of_adaptations = _coverage(" of adaptations, by corpus,", adapted["scored"], adapted["inside_90"])
    out = [text for text in (_coverage("", *laws), of_adaptations) if text]
    return out or ["No blind forecast has an outcome yet: nothing is known about the intervals."]


def _coverage(what: str, count: int, inside: int, trunks: int | None = None) -> str:
    if not count:
        return ""
    text = f"Of {count} blind forecasts{what} with an outcome, {inside} lie inside their 90 % interval"
    if trunks is None or trunks == count:
        return f"{text}."
    return f"{text}; they are about {trunks} trunk{'s' if trunks > 1 else ''}, whose branches err together."


def left_out(data: Row, rows: Sequence[tuple[str, ...]]) -> bool:
    """Whether the coverage counts forecasts that the table does not show."""
    return len(rows) < sum(r["corpus"] == "average" or r["before"] is not None for r in data["forecasts"])
