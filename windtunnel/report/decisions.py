"""Which of two recipes is better, in terminal and report: arms, looks and the verdict of a decision that is kept.

A fact holds its arms in the order of their identities; ``turned`` gives it as it was asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.laws.decision import Outcome, Thresholds, detectable
from windtunnel.report.values import Value, values_figure

Fact = Mapping[str, Any]
DECISION = "decision"
ARM_COLUMNS = ("", "arm", "seeds", "mean bits per byte")
_LN2 = math.log(2)


def read_decisions(book: LabBook, program: str, *, share: bool = False) -> list[Fact]:
    """The decisions that a program has an arm in, as they were asked, the oldest thresholds first.

    Args:
        share: leave out those with an arm of another program.
    """
    every = [fact for one in book.programs() for fact in book.facts(one, DECISION).values() if "arms" in fact]
    own = any if not share else all
    found = [fact for fact in every if own(arm["program"] == program for arm in fact["arms"])]
    return [turned(fact, fact["swapped"]) for fact in sorted(found, key=lambda fact: str(fact["fixed"]))]


def turned(fact: Fact, swapped: bool) -> dict[str, Any]:
    """A decision with its arms in the other order, if it was asked so."""
    if not swapped:
        return dict(fact)
    looks = [{**look, "outcome": turned_outcome(look["outcome"]), "mean": -look["mean"]} for look in fact["looks"]]
    return {**fact, "arms": fact["arms"][::-1], "looks": looks}


def turned_outcome(outcome: Outcome) -> Outcome:
    """What an outcome is called once the arms have changed places."""
    other: dict[Outcome, Outcome] = {"A": "B", "B": "A"}
    return other.get(outcome, outcome)


def decision_title(fact: Fact) -> str:
    """Both arms in a line."""
    return " against ".join(arm["name"] for arm in fact["arms"])


def arm_rows(fact: Fact) -> list[tuple[str, ...]]:
    """Both arms: name, seeds and mean loss, as the last look found them."""
    shown = [
        f"{sum(losses.values()) / len(losses) / _LN2:.4f}" if (losses := arm["losses"]) else "" for arm in fact["arms"]
    ]
    return [
        (letter, arm["name"], str(len(arm["losses"])), mean)
        for letter, arm, mean in zip("AB", fact["arms"], shown, strict=True)
    ]


def terms_line(fact: Fact) -> str:
    """What was fixed before the first look."""
    return (
        f"on {', '.join(fact['corpora'])}; fixed {fact['fixed']}: less than {100 * fact['least']:g} % does not matter, at most"
        f" {100 * fact['alpha']:g} % false picks over all looks"
    )


def noise_line(fact: Fact) -> str:
    """The seed noise that the last look took from other runs."""
    noise = fact["looks"][-1]["noise"]
    if noise is None:
        return "seed noise: this home has no repeated runs near this size, the pairs speak alone"
    size = max(arm["size"] for arm in fact["arms"])
    return f"seed noise at {si(size)}: {100 * noise['sd']:.2f} % ({noise['source']})"


def look_lines(fact: Fact) -> list[str]:
    """Every look: its pairs, and the difference with its interval."""
    lines: list[str] = []
    for number, look in enumerate(fact["looks"], 1):
        mean, half = 100 * look["mean"], look["half_width"]
        spread = ", spread not known yet" if half is None else f" [{mean - 100 * half:+.3f}, {mean + 100 * half:+.3f}]"
        lines.append(f"look {number}, {_pairs(len(look['seeds']))}: B − A = " + minus(f"{mean:+.3f} %{spread}"))
    return lines


def verdict_line(fact: Fact) -> str:
    """What the last look says."""
    more, names = fact["looks"][-1]["more"], [arm["name"] for arm in fact["arms"]]
    return {
        "A": f"A is better: {names[0]}",
        "B": f"B is better: {names[1]}",
        "too close": f"too close: whatever the difference is, it is under {100 * fact['least']:g} %",
        "more": f"need {_more(more)}",
    }[fact["looks"][-1]["outcome"]]


def power_lines(fact: Fact) -> list[str]:
    """The difference that so many pairs can find; nothing where the spread is not known."""
    look = fact["looks"][-1]
    if look["sd"] is None:
        return []
    pairs, limits = len(look["seeds"]), Thresholds(fact["least"], fact["alpha"])
    least = detectable(look["sd"], pairs, limits, known=look["freedom"] - (pairs - 1))
    return [f"with {_pairs(pairs)} a difference of {100 * least:.2g} % is found four times in five"]


def decision_figure(fact: Fact, width: int = 720) -> str:
    """Every look with its interval, over what does not matter."""
    rows = [
        Value(
            f"look {number}", 100 * look["mean"],
            None if look["half_width"] is None else 100 * (look["mean"] - look["half_width"]),
            None if look["half_width"] is None else 100 * (look["mean"] + look["half_width"]),
        )
        for number, look in enumerate(fact["looks"], 1)
    ]  # fmt: skip
    return values_figure(rows, "loss of B above that of A, %", width, digits=3, band=100 * fact["least"])


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"


def _more(count: int) -> str:
    if count == 1:
        return "1 more pair of runs (A and B with the same new seed)"
    return f"{count} more pairs of runs (A and B with the same {count} new seeds)"
