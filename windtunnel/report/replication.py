"""The page of a replication: the table of claims, each with its figure; as HTML like the report, and as Markdown."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from windtunnel import __version__
from windtunnel.base.units import minus
from windtunnel.report.cost import cost_line, together
from windtunnel.report.figures import NARROW
from windtunnel.report.svg import (
    FIGURE_CSS,
    SERIES,
    Axis,
    Canvas,
    compact,
    counts,
    spread,
    text_width,
    x_axis,
    y_axis,
)  # fmt: skip
from windtunnel.report.templates import environment, package_text
from windtunnel.tunnel.claims import ELSEWHERE

WIDE, SLIM = 720, 340
Fact = Mapping[str, Any]


def lines_figure(figure: Fact, width: int, *, alone: bool = False) -> str:
    """Named series over one axis: dots where something was measured, lines to join them or for a formula.

    Names stand at the lines' ends; on a phone in rows above the plot, each behind a dot of its colour.
    """
    narrow = width < NARROW
    series = [s for s in figure["series"] if s["points"]]
    room = 0 if narrow else max([text_width(s["name"], 11) for s in series] + [0]) + 20
    top = 36 + (16 * len(series) if narrow else 0)
    height, left, right = 280 + top, 58, width - room - 8
    canvas = Canvas(width, height, figure["caption"])
    xs = [x for s in series for x, _ in s["points"]]
    ys = [y for s in series for _, y in s["points"]]
    if not xs:
        canvas.text(left, 60, "nothing was measured", "m")
        return canvas.render(alone=alone)
    x = Axis.over(xs, left, right, log=figure["log_x"], margin=0.04)
    y = Axis.over(ys, height - 44, top, log=figure["log_y"])
    y_axis(canvas, y, left, right, figure["y"], show=compact if figure["log_y"] else None)
    show = counts if max(xs) >= 1000 else compact if figure["log_x"] else None
    x_axis(canvas, x, height - 44, figure["x"], count=4 if narrow else 6, show=show)
    ends = spread([y(s["points"][-1][1]) + 4 for s in series], 14, top, height - 48)
    for i, (one, end) in enumerate(zip(series, ends, strict=True)):
        style, places = i % SERIES, [(x(a), y(b)) for a, b in one["points"]]
        if one["line"]:
            canvas.path(places, f"l{style}" + ("" if one["dots"] else " dash"))
        if one["dots"]:
            for place in places:
                canvas.circle(*place, 3.5, f"d{style}")
        if narrow:
            canvas.circle(left + 4, 32 + 16 * i - 4, 3.5, f"d{style}")
            canvas.text(left + 14, 32 + 16 * i, one["name"], "k")
        else:
            canvas.text(right + 10, end, one["name"], f"k f{style}")
    return canvas.render(alone=alone)


def replication_figures(facts: Sequence[Fact]) -> Iterator[tuple[str, int, str]]:
    """Claim, number of the figure and the figure as an SVG file of its own."""
    for fact in facts:
        for index, figure in enumerate(fact["figures"]):
            yield fact["name"], index, lines_figure(figure, WIDE, alone=True)


def replication_page(program: str, size: str, facts: Sequence[Fact]) -> str:
    """One HTML file that needs no network and no script."""
    style = FIGURE_CSS + package_text("page.css")
    sections = [{**fact, "figures": [_both(f) for f in fact["figures"]], "rows": rows_of(fact)} for fact in facts]
    return environment().get_template("replication.html.j2").render(
        program=program, size=size, sections=sections, setting=setting_of(facts), version=__version__, style=Markup(style),
        cost=together(fact["cost"] for fact in facts), elsewhere=ELSEWHERE,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )  # fmt: skip


def _both(figure: Fact) -> dict[str, Any]:
    """A figure for a page and for a phone."""
    wide, slim = (Markup(lines_figure(figure, width)) for width in (WIDE, SLIM))
    return {"caption": figure["caption"], "wide": wide, "slim": slim}


def rows_of(fact: Fact) -> list[dict[str, str]]:
    """The decided sentences of a claim as text."""
    return [
        {"says": p["says"], "counts": p["counts"], "measured": measured(p), "asks": minus(f"{p['asks']} {p['unit']}"),
         "verdict": p["verdict"]}
        for p in fact["parts"]
    ]  # fmt: skip


def measured(part: Fact) -> str:
    """A mean over seeds with its 90 % interval."""
    found = part["estimate"]
    if found is None:
        return "never reached" if part["verdict"] == "does not hold" else "–"
    value = f"{_short(found['value'])} {part['unit']}"
    if found["low"] is not None:
        value += f" [{_short(found['low'])}, {_short(found['high'])}]"
    return value


def _short(value: float) -> str:
    digits = 2 if abs(value) < 100 else 0
    text = f"{value:+.{digits}f}" if math.isfinite(value) else "–"
    return minus(text)


def setting_of(facts: Sequence[Fact]) -> str:
    """What was trained, in one sentence."""
    if not facts:
        return ""
    one = facts[0]
    seeds = sorted({len(fact["seeds"]) for fact in facts})
    shown = " or ".join(map(str, seeds))
    corpora = ", ".join(f"{name} {100 * w / sum(one['mixture'].values()):.0f} %" for name, w in one["mixture"].items())
    return (
        f"The model is {one['model']} with {one['parameters']:,} non-embedding parameters; {one['unit']:g}N of tokens stand "
        f"for the paper's 20N; a step is {one['batch']:,} tokens in rows of {one['row']}; {shown} seeds differ in weights and "
        f"data order. Corpora: {corpora}."
    )


def replication_markdown(program: str, size: str, facts: Sequence[Fact], figures: Mapping[str, Sequence[str]]) -> str:
    """The table and each claim's numbers as Markdown; ``figures`` names the SVG files of each claim."""
    rule = (
        "A sentence holds if the 90 % interval over seeds lies wholly inside what it asks for, does not hold if it lies wholly "
        "outside, and otherwise nobody can tell. The limits were fixed in code before any run."
    )
    made = f"`windtunnel replicate` with the recipe `{program}` at the size `{size}` wrote this page."
    out = [
        "# The paper's claims, tried here", "", f"{made} arXiv 2404.06395, sections 3 to 5. {rule}", "", setting_of(facts), "",
        "| claim | in the paper | verdict |", "|---|---|---|",
        *(f"| {fact['says']} | {fact['where']} | **{fact['verdict']}** |" for fact in facts), "",
        *(f"- {where}, {what}: no claim here; `{verb}` answers it" for where, what, verb in ELSEWHERE), "",
    ]  # fmt: skip
    for fact in facts:
        out += [f"## {fact['says']}", "", f"{fact['where']}; `--claim {fact['name']}`; {cost_line(fact['cost'])}", ""]
        if fact["parts"]:
            out += ["| sentence | measured | asked | verdict |", "|---|---|---|---|"]
            out += [
                f"| {r['says']} | {r['counts']}: {r['measured']} | {r['asks']} | {r['verdict']} |"
                for r in rows_of(fact)
            ]
            out.append("")
        out += [f"- {note}" for note in fact["notes"]] + ([""] if fact["notes"] else [])
        for name, figure in zip(figures.get(fact["name"], ()), fact["figures"], strict=False):
            out += [f"![{figure['caption']}]({name})", ""]
    return "\n".join(out)
