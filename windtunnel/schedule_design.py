"""The verb ``law schedule``: which decay a run of a given length should have, by the law of runs alike. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType

from windtunnel.base.errors import UserError
from windtunnel.base.units import Length, si
from windtunnel.comparison import find_run, open_book
from windtunnel.curve_runs import CurveSet, read_curves, set_for, usual_rule
from windtunnel.laws.curve_fit import CurveModel, fit_curves
from windtunnel.laws.design import DecayRule, Design, design
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
    usual, whose = None if against is None else parse_rule(against), ""
    if all(name.endswith(".csv") for name in sources):
        made = read_curves([Path(name) for name in sources], warmup)
    elif len(sources) > 1:
        raise UserError("SOURCE", "expected one run or CSV files, got several names that are not all .csv files")
    else:
        book = open_book(home)
        row = find_run(book, sources[0])
        made = set_for(book, sources[0], row)
        if usual is None and (own := usual_rule(book, row)) is not None:
            usual, whose = own
    steps = _steps(length, made)
    model = fit_curves(made.curves, unit=made.unit)
    found = design(model, made.curves, steps, warmup=made.warmup, usual=usual or DecayRule(), anywhere=anywhere)
    if whose:
        found = replace(found, notes=(*found.notes, f"the usual decay is that of {whose}; --against names another"))
    return _view(made, model, found)


def _steps(length: str, made: CurveSet) -> int:
    asked = Length.parse(length, "--length")
    if asked.unit == "steps":
        return round(asked.value)
    if made.step_tokens is None or asked.unit not in ("tokens", "per_parameter"):
        wish = "steps, for example '20000 steps'" if made.step_tokens is None else "tokens or steps"
        raise UserError("--length", f"expected {wish}, got {length!r}")
    return max(1, round(asked.tokens(parameters=made.parameters) / made.step_tokens))


def _view(made: CurveSet, model: CurveModel, found: Design) -> View:
    value, low, high = found.expected
    gain, rule = found.gain, found.chosen
    decay = found.steps - found.start
    tokens = f" ({si(found.steps * made.step_tokens)} tokens)" if made.step_tokens else ""
    weights = ", ".join(f"{f.law.kernel} {w:.0%}" for f, w in zip(model.fits, model.weights, strict=True))
    parts: list[RenderableType] = [
        line(f"decay for {found.steps:,} updates{tokens}; {made.label}", "bold"),
        line(f"  law from {len(made.curves)} curves, {made.decays} of them with a falling rate: {weights}"),
        line(
            f"  error at the end of curves left out {100 * model.held_out:.2f} %, noise of a point {100 * model.noise:.2f} %"
        ),
        line(f"  best by the law   {rule}"),
        line(f"                    starts after update {found.start:,}, takes {decay:,}"),
        line(f"  expected loss     {value:.4f} [{low:.4f}, {high:.4f}] {made.unit} (90 %)"),
        line(f"  usual decay       {found.usual_expected:.4f} with {found.usual}"),
        line(f"  expected gain     {gain.gain:.4f} [{gain.low90:.4f}, {gain.high90:.4f}] (90 %)"),
    ]
    if found.tells:
        parts.append(
            line(f'take it: form = "{rule.form}", length = "{100 * rule.share:.3g}%", floor = {rule.floor:g}', "bold")
        )
    else:
        parts.append(line("the law cannot tell the two apart: keep the usual decay", "bold"))
    near, far = found.as_good
    parts.append(line(f"  shares that it cannot tell from the best: {100 * near:.3g} % to {100 * far:.3g} %"))
    rows = [(f"{100 * s:.3g} %", f"{excess:+.4f}", "worse" if tells else "") for s, excess, tells in found.shares]
    parts.append(table(("share", "loss above the best", "can tell"), rows, right=(0, 1)))
    parts.append(line("by form: " + ", ".join(f"{form} {excess:+.4f}" for form, excess in found.forms)))
    parts += [line(f"note: {text}") for text in (*found.notes, *(f"left out: {why}" for why in made.left_out))]
    data = {
        **found.to_dict(), "curves": [c.name for c in made.curves], "unit": made.unit, "held_out": model.held_out,
        "weights": {f.law.kernel: w for f, w in zip(model.fits, model.weights, strict=True)},
        "left_out": list(made.left_out),
    }  # fmt: skip
    return View(data, tuple(parts))
