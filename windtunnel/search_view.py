"""What ``windtunnel tunnel search`` says: the best trials, what is chosen, whether that was enough, the check. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import read_json
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.program import Program
from windtunnel.report.cost import cost_line, cost_of_studies
from windtunnel.tunnel.space import Axis, from_dicts, shown_value
from windtunnel.views import View, line, table

_SHOWN = 5


def search_view(home: Home, book: LabBook, program: Program) -> View:
    """The record of the program's search, and what all searches of the program have cost.

    Raises:
        ArtefactError: there is none.
    """
    fact = read_json(home.search(program.name, program.search_key))
    cost = cost_of_studies(book, program.name, ("search", "check"))
    drawn = line(f"windtunnel report {program.name} draws the loss over each parameter")
    parts = (*_parts(program.name, fact), line(f"the search with its check: {cost_line(cost)}"), drawn)
    return View({"program": program.name, "until": "search", **fact, "cost": cost}, parts)


def _parts(name: str, fact: Mapping[str, Any]) -> Iterator[RenderableType]:
    trials, space = fact["trials"], from_dicts(fact["space"])
    names = [axis.name for axis in space]
    known = sorted((t for t in trials if t["loss"] is not None), key=lambda t: t["loss"])
    rows = [(t["number"] + 1, f"{t['loss']:.4f}", *(shown_value(t[axis]) for axis in names)) for t in known[:_SHOWN]]
    lost = len(trials) - len(known)
    unfinished = f", {lost} diverged, failed or given up" if lost else ""
    title = f"search of '{name}': {len(trials)} trials on {fact['size']}{unfinished}; the best:"
    right = range(2 + len(names))
    yield table(("trial", "nats per byte", *names), rows, title=title, right=list(right))
    best = ", ".join(f"{axis} {shown_value(fact['choices'][axis])}" for axis in names)
    yield line(f"chosen: {best}", "bold")
    if fact["edges"]:
        yield line(f"on the edge of the space: {', '.join(fact['edges'])}; widen it to be sure", "yellow")
    if gap := fact.get("gap"):
        axes = sum(isinstance(axis, Axis) for axis in space)
        more = f"; about {gap['more']} more trials to get under the seed noise" if gap["more"] else ""
        yield line(
            f"left to find in {axes} axes: {gap['value']:.2g} nats per byte, {gap['high']:.2g} at most (90 %); seed noise"
            f" {gap['noise']:.2g}{more}"
        )
    if check := fact.get("check"):
        losses = ", ".join(
            f"{rate:.4g}: {'diverged' if loss is None else format(loss, '.4f')}"
            for rate, loss in zip(check["rates"], check["losses"], strict=True)
        )
        verdict = "is best there too" if check["carries_over"] else "is not the best of the three there"
        yield line(f"at {check['size']}, nats per byte by learning rate: {losses}; the chosen one {verdict}")
