"""What corpora are worth in the decay, in terminal and report: a row for each candidate, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.report.values import Value, values_figure

Fact = Mapping[str, Any]


def read_decay_data(book: LabBook, program: str) -> list[Fact]:
    """All studies of decay data of a program."""
    return list(book.facts(program, "decay-data").values())


def value_title(fact: Fact) -> str:
    """What was trained, in one sentence."""
    return (
        f"{100 * fact['share']:g} % of each in the last {si(fact['branch_tokens'])} of {si(fact['tokens'])} tokens, "
        f"{si(fact['parameters'])} parameters, {len(fact['seeds'])} seeds"
    )


def value_columns(fact: Fact) -> tuple[str, ...]:
    """Titles of ``value_rows``."""
    return ("candidate", f"value on {', '.join(fact['on'])}, 90 %", "on the trunk's own text", "times read", "verdict")


def value_rows(fact: Fact) -> list[tuple[str, ...]]:
    """Each candidate, best first: how much lower the loss ends than with the trunk's own data, how often it was read."""
    rows: list[tuple[str, ...]] = []
    for one in fact["candidates"]:
        read = f"{one['read']:.2f}" if one["read"] is not None else "–"
        rows.append((one["name"], _text(one["value"]), _text(one["own"]), read, one["verdict"]))
    return rows


def value_figure(fact: Fact, width: int = 720, *, alone: bool = False) -> str:
    """The values with their intervals."""
    shown = [
        Value(one["name"], one["value"]["value"], one["value"]["low"], one["value"]["high"])
        for one in fact["candidates"]
        if one["value"] is not None
    ]
    return values_figure(shown, "held-out loss below the trunk's own decay, %", width, alone=alone)


def _text(found: Fact | None) -> str:
    if found is None:
        return "–"
    text = f"{found['value']:+.2f} %"
    if found["low"] is not None:
        text += f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return minus(text)
