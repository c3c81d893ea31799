"""The verb ``law schedule``: which decay a run of a given length should have, by the law of runs alike. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import UserError
from windtunnel.base.units import Length
from windtunnel.comparison import find_run, open_book
from windtunnel.curve_runs import CurveSet, alike, read_curves, set_for, usual_rule
from windtunnel.home import keep_fact
from windtunnel.laws.curve_fit import CurveModel, fit_curves
from windtunnel.laws.design import DecayRule, Design, design
from windtunnel.report.decay_design import (
    DESIGN,
    SHARE_COLUMNS,
    advice_line,
    alike_line,
    design_rows,
    design_title,
    form_line,
    law_lines,
    note_lines,
    share_rows,
)
from windtunnel.train.schedule import FORMS, Form
from windtunnel.views import View, line, table


def parse_rule(text: str, name: str = "--against") -> DecayRule:
    """Reads FORM:SHARE:FLOOR, for example linear:10%:0.1.

    Raises:
        UserError: it is something else.
    """
    form, _, rest = text.partition(":")
    share, _, floor = rest.partition(":")
    known: Form | None = next((one for one in FORMS if one == form), None)
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        if known is None:
            raise ValueError
        return DecayRule(value, known, float(floor or "0.1"))
    except ValueError:
        raise UserError(name, f"expected FORM:SHARE:FLOOR such as linear:10%:0.1, got {text[:60]!r}") from None


def schedule(
    home: Path, sources: Sequence[str], length: str, *, warmup: int | None = None, against: str | None = None,
    anywhere: bool = False,
) -> View:  # fmt: skip
    """Chooses the decay for a run of some length from one run of a home and those alike, or from tables.

    The answer for a run of a home becomes a fact of its program.

    Args:
        sources: one run of the home, or CSV files with the columns step, lr, loss.
        length: of the run to be designed, its decay included: tokens, or steps.
        warmup: updates of warmup of the tables; for runs it is known.
        against: the decay to beat, FORM:SHARE:FLOOR; without it, the run's own, that of its newest branch or of the newest
            run alike, and for tables a linear tenth to a tenth.
        anywhere: also decays longer and lower than the runs can speak for.

    Raises:
        UserError: the sources, the length or the rule are not what they should be.
        LawError: no law can be fitted to these curves.
    """
    usual, whose, row = None if against is None else parse_rule(against), "", None
    if all(name.endswith(".csv") for name in sources):
        made = read_curves([Path(name) for name in sources], warmup)
    elif len(sources) > 1:
        raise UserError("SOURCE", "expected one run or CSV files, got several names that are not all .csv files")
    else:
        with closing(open_book(home)) as book:
            row = find_run(book, sources[0])
            made = set_for(book, sources[0], row)
            if usual is None and (own := usual_rule(book, row)) is not None:
                usual, whose = own
    steps = _steps(length, made)
    model = fit_curves(made.curves, unit=made.unit)
    found = design(model, made.curves, steps, warmup=made.warmup, usual=usual or DecayRule(), anywhere=anywhere)
    if whose:
        found = replace(found, notes=(*found.notes, f"the usual decay is that of {whose}; --against names another"))
    fact = _fact(made, model, found)
    unkept = "" if row is None else _keep(home, row, fact, anywhere)
    return _view(fact, unkept)


def _keep(home: Path, row: Mapping[str, Any], fact: Mapping[str, Any], anywhere: bool) -> str:
    """Records the answer for the report; why it could not, where the home is only to be read."""
    asked = [alike(row["config"]), fact["steps"], fact["usual"], anywhere]
    try:
        keep_fact(home, row["program"], DESIGN, content_hash(asked)[:12], fact)
    except UserError as error:
        return str(error)
    return ""


def _steps(length: str, made: CurveSet) -> int:
    asked = Length.parse(length, "--length")
    if asked.unit == "steps":
        return round(asked.value)
    if made.step_tokens is None or asked.unit not in ("tokens", "per_parameter"):
        wish = "steps, for example '20000 steps'" if made.step_tokens is None else "tokens or steps"
        raise UserError("--length", f"expected {wish}, got {length!r}")
    return max(1, round(asked.tokens(parameters=made.parameters) / made.step_tokens))


def _fact(made: CurveSet, model: CurveModel, found: Design) -> dict[str, Any]:
    return {
        **found.to_dict(), "as_good": list(found.as_good), "label": made.label, "unit": made.unit,
        "tokens": found.steps * made.step_tokens if made.step_tokens else None,
        "curves": [c.name for c in made.curves], "decays": made.decays, "held_out": model.held_out, "noise": model.noise,
        "weights": {f.law.kernel: w for f, w in zip(model.fits, model.weights, strict=True)},
        "left_out": list(made.left_out),
    }  # fmt: skip


def _view(fact: dict[str, Any], unkept: str) -> View:
    parts: list[RenderableType] = [
        line(design_title(fact), "bold"),
        *(line(f"  {text}") for text in law_lines(fact)),
        *(line(f"  {what:<18}{text}") for what, text in design_rows(fact)),
        line(advice_line(fact), "bold"),
        line(f"  {alike_line(fact)}"),
        table(SHARE_COLUMNS, share_rows(fact), right=(0, 1)),
        line(form_line(fact)),
        *(line(text) for text in note_lines(fact)),
    ]
    if unkept:
        parts.append(line(f"not kept for the report: {unkept}"))
    return View(fact, tuple(parts))
