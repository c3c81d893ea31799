"""The mixture study in terminal and report: shares, what the law foretells, and the optimum beside its rivals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.report.replication import lines_figure

LN2 = math.log(2)
Fact = Mapping[str, Any]


def read_mixtures(book: LabBook, program: str) -> list[Fact]:
    """All mixture studies of a program."""
    return list(book.facts(program, "mixture").values())


def mixture_figure(fact: Fact, width: int = 720, *, alone: bool = False) -> str:
    """Each drawn mixture: its loss as the law without it foretells over the loss that it had, beside the diagonal."""
    known = [run["loss"] / LN2 for run in fact["runs"] if run["loss"] is not None]
    points = [[a, b / LN2] for a, b in zip(known, fact["law"]["left_out"], strict=True)]
    ends = [min(known), max(known)]
    series = [
        {"name": "mixtures", "points": points, "dots": True, "line": False},
        {"name": "as measured", "points": [[v, v] for v in ends], "dots": False, "line": True},
    ]
    caption = "Loss of each drawn mixture as foretold from the others, over the loss that it had."
    figure = {
        "caption": caption, "x": "measured, bits per byte", "y": "foretold, bits per byte", "series": series,
        "log_x": False, "log_y": False,
    }  # fmt: skip
    return lines_figure(figure, width, alone=alone)


def mixture_rows(fact: Fact) -> list[tuple[str, ...]]:
    """Each corpus: its share in every mixture that was tried on fresh seeds, and how often the target would read it."""
    tried = fact["mixtures_tried"]
    names = dict.fromkeys(name for mix in tried.values() for name in mix)
    out = []
    for name in names:
        shares = (f"{100 * mix.get(name, 0.0):.1f} %" for mix in tried.values())
        out.append((name, *shares, f"{fact['epochs']['optimum'].get(name, 0.0):.2f}"))
    losses = (
        "–" if None in row else f"{sum(row) / len(row) / LN2:.4f}" for row in (fact["losses"][name] for name in tried)
    )
    return [*out, ("bits per byte", *losses, "")]


def mixture_columns(fact: Fact) -> tuple[str, ...]:
    """Titles of ``mixture_rows``."""
    return ("corpus", *fact["mixtures_tried"], "times read")


def verdict_lines(fact: Fact) -> list[str]:
    """What was found, in sentences."""
    out = []
    for one in fact["against"].values():
        gain = one["gain"]
        measured = f": {_interval(gain)} lower loss, {len(one['seeds'])} fresh seeds" if gain else ""
        out.append(f"the optimum {one['verdict']}{measured}")
    law = fact["law"]
    rank = f", rank correlation {fact['rank']:.2f}" if fact["rank"] is not None else ""
    others = ", ".join(f"{form} {100 * error:.2f} %" for form, error in fact["forms"].items())
    out.append(
        f"law: {law['form']}, left-out error {100 * law['error']:.2f} % of the loss{rank} ({others}); it foretold "
        f"{_signed(fact['predicted'])} against the stratified mixture"
    )
    if law["form"] == "constant":
        out.append("the drawn mixtures do not differ by more than their noise: shares explain nothing here")
    return out


def _interval(gain: Mapping[str, Any]) -> str:
    text = _signed(gain["value"])
    return text if gain["low"] is None else f"{text} [{_signed(gain['low'], '')}, {_signed(gain['high'], '')}]"


def _signed(value: float, unit: str = " %") -> str:
    return minus(f"{value:+.2f}{unit}")


def mixture_title(fact: Fact) -> str:
    """What was trained, in one sentence."""
    where = (
        f"the last {si(fact['stage_tokens'])} of {si(fact['run_tokens'])} tokens"
        if fact["stage"] == "decay"
        else f"all {si(fact['run_tokens'])} tokens"
    )
    return (
        f"{len(fact['runs'])} mixtures of {len(fact['corpora'])} corpora in {where}, {si(fact['parameters'])} parameters, "
        f"judged on {', '.join(fact['on'])}; no corpus is read more than {fact['cap']:g} times by the target"
    )
