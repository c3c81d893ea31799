"""The report of a program with what its home knows beside it: forecasts of whole curves, what a decay now would give, and the
ledger. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.curve_runs import curve_of, curve_score
from windtunnel.decay_now import read_now
from windtunnel.laws.design import rates_of
from windtunnel.laws.sealed import CURVE
from windtunnel.ledger import forecasts, target_run
from windtunnel.model.shape import Shape
from windtunnel.report.curve_forecast import CurvePicture, Line
from windtunnel.report.page import write_report
from windtunnel.report.programme import target_runs
from windtunnel.train.schedule import Schedule

Row = Mapping[str, Any]


def write_program_report(
    book: LabBook, home: Path, program: str, out: Path, *, share: bool = False, fit: bool = True
) -> Path:
    """Writes the report of a program with all that its home knows beside it, and returns its path.

    Args:
        share: leave out all text that was trained on or written by a model, and other programs.
        fit: fit the laws that a decay from now needs, if they are not kept yet.

    Raises:
        UserError: the book knows no such program, or the file cannot be written.
    """
    now = [read_now(home, book, row, fit=fit) for row in target_runs(book, program)[:1]]
    return write_report(
        book, program, out, share=share, curves=curve_pictures(book, program), ledger=forecasts(home).data, now=now
    )


def curve_pictures(book: LabBook, program: str) -> list[CurvePicture]:
    """All forecasts of whole curves of a program, the newest first."""
    found = sorted(book.facts(program, CURVE).values(), key=lambda one: str(one["facts"].get("time", "")), reverse=True)
    return [curve_picture(book, program, content) for content in found]


def curve_picture(book: LabBook, program: str, content: Row) -> CurvePicture:
    """A forecast of a whole curve with the runs that it read, and the run that it is about once that has been trained."""
    facts = content["facts"]
    said, row = facts["curve"], target_run(book, program, facts)
    each, steps = float(said["step_tokens"]), [float(step) for step in said["steps"]]

    def over(values: list[float], at: list[float] = steps) -> Line:
        return [(each * step, value) for step, value in zip(at, values, strict=True)]

    runs = tuple(key[:10] for key in facts["runs"])
    proxies: dict[float, list[Line]] = {}
    for one in book.runs(program=program):
        if Path(one["folder"]).name.endswith(runs) and (curve := curve_of(book, one, said["stretch"])) is not None:
            size = float(Shape(**one["config"]["shape"]).body)
            proxies.setdefault(size, []).append(over(curve.losses.tolist(), curve.steps.tolist()))
    seen = curve_of(book, row, said["stretch"], whole=True) if row else None
    return CurvePicture(
        facts["branch"], f"N = {si(content['forecast']['parameters'])}", over(said["value"]), over(said["low90"]),
        over(said["high90"]), _rate(facts, row, each, int(steps[-1])),
        {f"N = {si(size)}": proxies[size] for size in sorted(proxies)},
        over(seen.losses.tolist(), seen.steps.tolist()) if seen else (), content["hash"], facts["kind"],
        str(facts.get("time", "")), facts["branch_is"], curve_score(book, row, said) if row else None,
    )  # fmt: skip


def _rate(facts: Row, row: Row | None, each: float, steps: int) -> Line:
    """(tokens, learning rate) of the target; nothing where neither the forecast nor a run tells its schedule."""
    schedule = facts.get("schedule") or (row and row["config"]["schedule"])
    if not schedule:
        return ()
    rates = rates_of(Schedule(**schedule), facts["base_lr"], steps).tolist()
    return [(each * (step + 1), rate) for step, rate in enumerate(rates)]
