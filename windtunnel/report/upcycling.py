"""The upcycling study in terminal and report: experts beside a dense continuation, break-even, loss over length, load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import duration, minus, si
from windtunnel.report.experts import Loads, read_loads_along
from windtunnel.report.replication import lines_figure

LN2 = math.log(2)
Fact = Mapping[str, Any]
NAMES = {"tokens": "equal tokens", "FLOPs": "equal FLOPs", "seconds": "equal seconds"}


def read_upcyclings(book: LabBook, program: str) -> list[tuple[Fact, list[Loads]]]:
    """All upcycling studies of a program, each with the load of the experts over its whole branch, a seed each."""
    out = []
    for fact in book.facts(program, "upcycling").values():
        chains = [[row for name in chain if (row := book.run(name)) is not None] for chain in fact["chains"]]
        out.append((fact, [loads for rows in chains if (loads := read_loads_along(book, rows)) is not None]))
    return out


def upcycling_title(fact: Fact) -> str:
    """What was trained, in one sentence."""
    n, seeds = fact["parameters"], len(fact["seeds"])
    return (
        f"{fact['top_k']} of {fact['experts']} experts for {si(fact['tokens'])} tokens from a checkpoint after "
        f"{si(fact['from_tokens'])}: {si(n['dense'])} parameters dense, {si(n['experts'])} with experts "
        f"({si(n['active'])} at work), {seeds} seed{'s' * (seeds > 1)}"
    )


def upcycling_columns() -> tuple[str, ...]:
    """Titles of ``upcycling_rows``."""
    return ("comparison", "dense reads", "dense", "experts", "experts lower by, 90 %", "verdict")


def upcycling_rows(fact: Fact) -> list[tuple[str, ...]]:
    """The three comparisons: tokens that the dense side read, losses in bits per byte, the difference, the verdict."""
    return [
        (NAMES[one["axis"]], si(one["dense_tokens"]), _bits(one["dense"]), _bits(one["experts"]), _interval(one["lead"]),
         one["verdict"])
        for one in fact["axes"]
    ]  # fmt: skip


def length_columns() -> tuple[str, ...]:
    """Titles of ``length_rows``."""
    return ("experts read", *NAMES.values())


def length_rows(fact: Fact) -> list[tuple[str, ...]]:
    """How much lower the experts end at each of their lengths, on each axis."""
    return [
        (si(tokens), *(_interval(axis["course"][i] if axis["course"] else None) for axis in fact["axes"]))
        for i, tokens in enumerate(fact["lengths"])
    ]


def verdicts(fact: Fact) -> list[str]:
    """One sentence for each comparison, with where the two break even."""
    out = []
    for one in fact["axes"]:
        lead = one["lead"]
        told = f" ({_interval(lead)})" if lead else ""
        turn, recent = one["break_even"], one["by_last_two"]
        bends = turn and turn["outcome"] != recent["outcome"] and len(fact["seeds"]) > 1
        other = f"; by the last two lengths alone {_turn(fact, one, recent)}" if bends else ""
        out.append(f"At {NAMES[one['axis']]} {_decided(one)}{told}; {_turn(fact, one, turn)}{other}.")
    return out


def _decided(one: Fact) -> str:
    times = f"{one['ratio']:.3g} times the tokens"
    who = {
        "the experts end lower": "the experts end lower than the dense continuation",
        "dense ends lower": "the dense continuation ends lower than the experts",
    }.get(one["verdict"])
    what = who or f"one {one['verdict'].replace('cannot tell', 'cannot tell which ends lower', 1)}"
    return what if one["axis"] == "tokens" else f"(dense reads {times}) {what}"


def _turn(fact: Fact, one: Fact, turn: Fact | None) -> str:
    """Where the lead turns, in words."""
    if turn is None:
        return "no break-even without all runs"
    if len(fact["seeds"]) < 2:
        return "a break-even needs a second seed"
    far = f"up to {10 * turn['longest'] / fact['tokens']:g} times the longest length"
    if turn["outcome"] == "ahead":
        return f"the experts lead at every length {far}"
    if turn["outcome"] == "behind":
        return f"no break-even {far}"
    if turn["outcome"] == "cannot tell":
        return "where they break even nobody can tell"
    who = "the experts overtake" if turn["outcome"] == "overtakes" else "the dense continuation overtakes"
    low = si(turn["low"]) if turn["low"] is not None else f"before {si(turn['shortest'])}"
    high = si(turn["high"]) if turn["high"] is not None else f"beyond {si(10 * turn['longest'])}"
    reach = turn["reach"]
    place = "within what was trained" if reach <= 1 else f"a forecast {reach:.3g} times beyond the longest branch"
    return f"{who} at {si(turn['at'])} tokens [{low}, {high}] of the experts{_cost(fact, one, turn['at'])}, {place}"


def _cost(fact: Fact, one: Fact, tokens: float) -> str:
    """Tokens of the experts as the cost that is compared."""
    if one["axis"] == "FLOPs":
        return f" ({si(tokens * fact['flops_per_token']['experts'])} FLOPs)"
    return f" ({duration(tokens / fact['speeds']['experts'])})" if one["axis"] == "seconds" else ""


def notes(fact: Fact) -> list[str]:
    """What one has to know to read the numbers."""
    speeds, trained = fact["speeds"], fact["trained_speeds"]
    low, high = speeds["ratio"]
    said = (
        f"speeds before training, in turns: dense {si(speeds['dense'])}, experts {si(speeds['experts'])} tokens a second "
        f"(ratio {low:.3g} to {high:.3g} over {speeds['rounds']} rounds)"
    )
    if trained["dense"] and trained["experts"]:
        said += (
            f"; in training, compiling included: {si(trained['dense'])} and {si(trained['experts'])}, ratio "
            f"{trained['dense'] / trained['experts']:.3g}"
        )
    out = [
        f"Bits per byte on held-out {', '.join(fact['on'])}, each branch with a decay over its last {100 * fact['decay']:.0f} %; "
        "between dense lengths the loss is a line over log tokens, and so is the lead that gives the break-even: its "
        "interval knows the noise over seeds, not whether the line goes on; the last two lengths are asked alone where they "
        "say something else.",
        f"{said}.",
    ]
    if fact["most_read"] > 1:
        out.append(f"The longest dense branch has read its text up to {fact['most_read']:.1f} times.")
    if fact["loads"]:
        out.append(
            f"Load of the experts over the last tenth, by seed: {'; '.join(_load(one) for one in fact['loads'])}."
        )
    return out


def _load(one: Fact) -> str:
    return f"{100 * one['uneven']:.0f} % uneven, the busiest {one['busiest']:.2f} times an even share"


def lead_figure(fact: Fact, width: int = 720, *, alone: bool = False) -> str:
    """How much lower the experts end, in percent, over the tokens that they have read: at equal tokens, FLOPs and seconds."""
    tokens = fact["lengths"]
    series = [
        {"name": NAMES[axis["axis"]], "dots": True, "line": True,
         "points": [[x, one["value"]] for x, one in zip(tokens, axis["course"], strict=False)]}
        for axis in fact["axes"]
    ]  # fmt: skip
    even = {"name": "even", "points": [[tokens[0], 0.0], [tokens[-1], 0.0]], "dots": False, "line": True}
    caption = "How much lower the experts end than the dense continuation, over the tokens that they have read."
    figure = {
        "caption": caption, "x": "tokens of the experts after the checkpoint", "y": "experts lower by, %",
        "series": [*series, *([even] if any(one["points"] for one in series) else [])], "log_x": True, "log_y": False,
    }  # fmt: skip
    return lines_figure(figure, width, alone=alone)


def loss_figure(fact: Fact, width: int) -> str:
    """The loss of finished branches of both sides over the tokens that they have read after the checkpoint."""
    series = [
        {"name": side, "dots": True, "line": True,
         "points": [[one["tokens"], one["mean"] / LN2] for one in fact["losses"][side] if one["mean"] is not None]}
        for side in ("dense", "experts")
    ]  # fmt: skip
    figure = {
        "caption": "Loss of finished branches over the tokens read after the checkpoint, seeds averaged.",
        "x": "tokens after the checkpoint", "y": "bits per byte", "series": series, "log_x": True, "log_y": False,
    }  # fmt: skip
    return lines_figure(figure, width)


def _bits(loss: float | None) -> str:
    return "–" if loss is None else f"{loss / LN2:.4f}"


def _interval(lead: Fact | None) -> str:
    if lead is None:
        return "–"
    text = f"{lead['value']:+.2f} %"
    if lead["low"] is not None:
        text += f" [{lead['low']:+.2f}, {lead['high']:+.2f}]"
    return minus(text)
