"""Which decay a run of some length should have, in terminal and report: what ``law schedule`` answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, si
from windtunnel.laws.design import DecayRule
from windtunnel.report.figures import NARROW
from windtunnel.report.svg import Axis, Canvas, x_axis, y_axis

Fact = Mapping[str, Any]
DESIGN = "design"
SHARE_COLUMNS = ("share", "loss above the best", "can tell")


def read_designs(book: LabBook, program: str, *, share: bool = False) -> list[Fact]:
    """The decays that were asked for, the shortest run first.

    Args:
        share: leave out which runs were left out, since they may be another program's.
    """
    found = sorted(book.facts(program, DESIGN).values(), key=lambda fact: (fact["steps"], fact["label"]))
    return [{**fact, "left_out": []} for fact in found] if share else found


def design_title(fact: Fact) -> str:
    """What was asked, in one line."""
    tokens = f" ({si(fact['tokens'])} tokens)" if fact["tokens"] else ""
    return f"decay for {fact['steps']:,} updates{tokens}; {fact['label']}"


def law_lines(fact: Fact) -> list[str]:
    """The law that answered, and how good it is."""
    weights = ", ".join(f"{kernel} {weight:.0%}" for kernel, weight in fact["weights"].items())
    return [
        f"law from {len(fact['curves'])} curves, {fact['decays']} of them with a falling rate: {weights}",
        f"error at the end of curves left out {100 * fact['held_out']:.2f} %, noise of a point {100 * fact['noise']:.2f} %",
    ]


def design_rows(fact: Fact) -> list[tuple[str, str]]:
    """The best decay by the law beside the usual one, and what it is said to gain."""
    value, low, high = fact["expected"]
    least, most = fact["gain90"]
    return [
        ("best by the law", str(_rule(fact["chosen"]))),
        ("", f"starts after update {fact['start']:,}, takes {fact['steps'] - fact['start']:,}"),
        ("expected loss", f"{value:.4f} [{low:.4f}, {high:.4f}] {fact['unit']} (90 %)"),
        ("usual decay", f"{fact['usual_expected']:.4f} with {_rule(fact['usual'])}"),
        ("expected gain", minus(f"{fact['gain']:.4f} [{least:.4f}, {most:.4f}] (90 %)")),
    ]


def advice_line(fact: Fact) -> str:
    """What a branch of a recipe says to take the best decay, where the law can tell it from the usual one."""
    if not fact["tells"]:
        return "the law cannot tell the two apart: keep the usual decay"
    rule = _rule(fact["chosen"])
    return f'take it: form = "{rule.form}", tokens = "{100 * rule.share:.3g}%", floor = {rule.floor:g}'


def alike_line(fact: Fact) -> str:
    """The shares that are as good for all the law knows."""
    near, far = fact["as_good"]
    return f"shares that it cannot tell from the best: {100 * near:.3g} % to {100 * far:.3g} %"


def share_rows(fact: Fact) -> list[tuple[str, ...]]:
    """Each share with its best form and floor: loss above the best, and whether the law can tell."""
    return [
        (f"{100 * s:.3g} %", minus(f"{excess:+.4f}"), "worse" if tells else "") for s, excess, tells in fact["shares"]
    ]


def form_line(fact: Fact) -> str:
    """Each form with its best share and floor."""
    return "by form: " + ", ".join(f"{form} " + minus(f"{excess:+.4f}") for form, excess in fact["forms"])


def note_lines(fact: Fact) -> list[str]:
    """What limits the answer."""
    return [f"note: {text}" for text in (*fact["notes"], *(f"left out: {why}" for why in fact["left_out"]))]


def share_figure(fact: Fact, width: int = 720) -> str:
    """Loss above the best over the share that the decay takes; hollow where the law cannot tell it from the best."""
    narrow = width < NARROW
    left, right, top, base = 52, width - 12, 28, 170 if narrow else 210
    shares = [100 * share for share, _, _ in fact["shares"]]
    canvas = Canvas(width, base + 40, f"Loss above that of the best decay over its share: {design_title(fact)}")
    x = Axis.over(shares, left + 8, right, log=True)
    y = Axis.over([0.0, *(excess for _, excess, _ in fact["shares"])], base, top, margin=0.08)
    y_axis(canvas, y, left, right, f"loss above the best, {fact['unit']}", count=4)
    x_axis(canvas, x, base, "share of all updates, %", count=4 if narrow else 7, show=lambda v: f"{v:g}")
    points = [(x(share), y(excess)) for share, (_, excess, _) in zip(shares, fact["shares"], strict=True)]
    canvas.path(points, "l0")
    for place, (share, _, tells) in zip(points, fact["shares"], strict=True):
        if share == fact["chosen"]["share"]:
            canvas.diamond(*place, 6.5, "best")
        else:
            canvas.circle(*place, 4.5, "d0" if tells else "hollow")
    return canvas.render()


def _rule(said: Fact) -> DecayRule:
    return DecayRule(said["share"], said["form"], said["floor"])
