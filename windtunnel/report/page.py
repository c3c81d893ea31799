"""The report: one HTML file that needs no network and no script, made from the lab book alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from windtunnel import __version__
from windtunnel.base.artefact import write_bytes
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import duration, si
from windtunnel.report import (
    answers,
    batches,
    by_corpus,
    context,
    curves,
    decay_data,
    decay_design,
    decisions,
    dynamics,
    experts,
    figures,
    mixtures,
    programme,
    story,
    studies,
    upcycling,
)
from windtunnel.report import ledger as ledgers
from windtunnel.report.cost import read_cost
from windtunnel.report.curve_forecast import CurvePicture
from windtunnel.report.decay_now import NOW_COLUMNS, Now
from windtunnel.report.svg import FIGURE_CSS
from windtunnel.report.templates import environment, human, macro, package_text, times, visible
from windtunnel.report.words import Words

WIDE, SLIM = 720, 340
_FORMULAS = {
    "additive": Markup("L = C<sub>N</sub> N<sup>−α</sup> + C<sub>D</sub> D<sup>−β</sup> + L<sub>0</sub>"),
    "coupled": Markup(
        "L = ((N<sub>c</sub>/N)<sup>α<sub>N</sub>/α<sub>D</sub></sup> + D<sub>c</sub>/D)<sup>α<sub>D</sub></sup>"
    ),
    "skaling": Markup("L = (A N<sup>−a</sup> + B D<sup>−b</sup>)<sup>k</sup> + E"),
}


@dataclass(frozen=True)
class Pair:
    """One figure for a page and for a phone."""

    wide: Markup
    slim: Markup

    @classmethod
    def of(cls, draw: Callable[[int], str], wide: int = WIDE) -> Pair:
        return cls(Markup(draw(wide)), Markup(draw(SLIM)))


@dataclass(frozen=True)
class Section:
    """A section of the page with the words that it is the first to use."""

    id: str
    short: str
    title: str
    html: Markup
    words: list[tuple[str, str]]


def write_report(
    book: LabBook, program: str, out: Path, *, share: bool = False, curves: Sequence[CurvePicture] = (),
    ledger: Mapping[str, Any] | None = None, now: Sequence[Now] = (),
) -> Path:  # fmt: skip
    """Writes the report of a program as one HTML file and returns its path.

    Args:
        book: the lab book; every number of the page comes from it.
        program: its name.
        out: the file; an earlier one is replaced.
        share: leave out samples, answers and all other text that was trained on or written by a model, and other programs.
        curves: forecasts of whole curves.
        ledger: the forecasts of the home, as ``ledger.forecasts`` tells them.
        now: what trunks would give if they decayed now.

    Raises:
        UserError: the book knows no such program, or the file cannot be written.
    """
    if program not in book.programs():
        known = ", ".join(book.programs()) or "none"
        raise UserError("report", f"expected a program of this lab book ({known}), got {program!r}")
    write_bytes(out, render(book, program, share=share, curves=curves, ledger=ledger, now=now).encode())
    return out


def render(
    book: LabBook, program: str, *, share: bool = False, curves: Sequence[CurvePicture] = (),
    ledger: Mapping[str, Any] | None = None, now: Sequence[Now] = (),
) -> str:  # fmt: skip
    """The report as HTML text; arguments as ``write_report``'s."""
    forecasts, runs = story.read_forecasts(book, program), programme.target_runs(book, program)
    bodies = {
        "forecast": _forecast(book, program, forecasts),
        "question": _question(book, program, runs),
        "tunnel": _tunnel(book, program),
        "coordinates": _coordinates(book, program),
        "transfer": _transfer(book, program),
        "batch": _batch(book, program),
        "law": _law(forecasts),
        "scale": _scale(book, program),
        "curve": _curve(curves),
        "schedule": _schedule(book, program, share),
        "training": _training(book, runs),
        "now": _now(now),
        "experts": _experts(book, runs),
        "upcycling": _upcycling(book, program),
        "decay": _decay(book, runs),
        "worth": _worth(book, program),
        "mixture": _mixture(book, program),
        "dynamics": _dynamics(book, program),
        "answers": _answers(book, program, runs),
        "context": _context(book, program),
        "samples": _samples(book, program, share),
        "decisions": _decisions(book, program, share),
        "ledger": _ledger(ledger, program, share),
        "cost": _cost(book, program),
        "provenance": _provenance(book, program, forecasts, share),
    }
    words, sections = Words(), []
    lede = _lede(forecasts, runs)
    for key, html in bodies.items():
        if html is not None:
            short, title = _TITLES[key]
            seen = f"{lede if not sections else ''} {title} {visible(html)}"
            sections.append(Section(key, short, title, html, words.first_in(seen)))
    style = FIGURE_CSS + package_text("page.css")
    missing = _missing(bodies, forecasts, runs, _with_tunnel(book, program))
    return environment().get_template("page.html.j2").render(
        program=program, share=share, lede=lede, sections=sections, missing=missing,
        style=Markup(style), style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=__version__,
    )  # fmt: skip


_TITLES = {
    "forecast": ("Forecast and outcome", "The sealed forecast beside the outcome"),
    "question": ("Question", "What was asked"),
    "tunnel": ("Tunnel", "What the tunnel found"),
    "coordinates": ("Coordinates", "Do wide models compute with changes as large as narrow ones?"),
    "transfer": ("Transfer", "What carries over, and what it costs where it does not"),
    "batch": ("Batch", "Which batch, and what half or double of it costs"),
    "law": ("Law", "The law and its points"),
    "scale": ("By corpus", "The law corpus by corpus"),
    "curve": ("Whole curve", "The whole curve, forecast"),
    "schedule": ("Choice of decay", "Which decay the law would choose"),
    "training": ("Trunk and branches", "The trunk and its branches"),
    "now": ("Decay now", "What a decay now would give"),
    "experts": ("Experts", "Which experts the tokens went to"),
    "upcycling": ("Upcycling", "Experts beside a dense continuation"),
    "decay": ("Decay data", "What the decay data did"),
    "worth": ("Worth in the decay", "What each corpus is worth in the decay"),
    "dynamics": ("Inside the decay", "What happens to gradients in the decay"),
    "mixture": ("Mixture", "Which shares of which corpora"),
    "answers": ("Answers", "What post-training changed"),
    "context": ("Longer context", "What the longer context brought"),
    "samples": ("Samples", "The first samples"),
    "decisions": ("Decisions", "Which of two recipes is better"),
    "ledger": ("Ledger", "Every forecast of this home"),
    "cost": ("Cost", "What it cost"),
    "provenance": ("Provenance", "Provenance"),
}


def _with_tunnel(book: LabBook, program: str) -> bool:
    """Whether the program's recipe asks for a tunnel; one that is not known does."""
    recipe = book.fact(program, "recipe", "resolved")
    return recipe is None or recipe.get("tunnel") is not None


def _missing(
    bodies: Mapping[str, Any], forecasts: list[story.Sealed], runs: list[dict[str, Any]], tunnel: bool
) -> list[str]:
    """One sentence for each part of a whole report that the book does not hold yet, with a search and a forecast or without."""
    notes = []
    if bodies["question"] is None:
        notes.append("the corpora are not built")
    if tunnel and bodies["tunnel"] is None:
        notes.append("no search has finished in the tunnel")
    if tunnel and not forecasts:
        notes.append("no forecast has been sealed, so there is no law to show")
    if not runs:
        notes.append("the trunk has not begun")
    elif runs[0]["status"] != "done":
        notes.append(f"the trunk is {runs[0]['status']}")
    elif not any(run["status"] == "done" for run in runs[1:]):
        notes.append("no branch has finished")
    if forecasts and forecasts[0].outcome is None:
        notes.append("the forecast has no outcome yet")
    if bodies["samples"] is None:
        notes.append("no finished model has written samples")
    return notes


def _lede(forecasts: list[story.Sealed], runs: list[dict[str, Any]]) -> str:
    if not forecasts:
        return ""
    one = forecasts[0]
    ending = "then trained and scored" if one.outcome is not None else "not yet trained"
    if not one.sizes:
        return f"A language model of {si(one.parameters)} parameters, {ending}."
    near, far = (times(one.parameters / size) for size in (one.sizes[-1], one.sizes[0]))
    return (
        f"A language model of {si(one.parameters)} parameters: its loss forecast from models {near} to {far} times smaller,"
        f" {ending}."
    )


def _forecast(book: LabBook, program: str, forecasts: list[story.Sealed]) -> Markup | None:
    if not forecasts:
        return None
    one, *others = forecasts
    naive = {story.NAIVE.get(key, key): value for key, value in one.naive.items()}
    hero = Pair.of(lambda width: figures.hero_figure(one.expected, one.outcome, naive, width), 672)
    return macro("forecast", one, hero, story.by_corpus(book, program, one), others)


def _question(book: LabBook, program: str, runs: list[dict[str, Any]]) -> Markup | None:
    asked = story.read_question(book, program)
    return macro("question", asked, programme.shape_rows(runs[0]["config"]) if runs else []) if asked else None


def _tunnel(book: LabBook, program: str) -> Markup | None:
    found = story.read_tunnel(book, program)
    if found is None:
        return None
    clouds = dict(found.clouds)
    rate = clouds.pop("learning_rate", None)
    valley = None
    if rate:
        at = found.choices["learning_rate"]
        valley = Pair.of(lambda width: figures.valley_figure(rate, at, "learning rate", width))
    small = [(name, Pair.of(_small(found, name), 226)) for name in clouds]
    return macro("tunnel", found, valley, small, [human(name) for name in found.choices])


def _small(found: story.Tunnel, name: str) -> Callable[[int], str]:
    place = found.places[name]
    title, chosen = f"{human(name)}, distance to 1" if name == "beta2" else human(name), place(found.choices[name])
    return lambda width: figures.valley_figure(
        found.clouds[name], chosen, title, width, height=190, title=False, labels=place.labels
    )


def _coordinates(book: LabBook, program: str) -> Markup | None:
    checks = studies.read_coordinates(book, program)
    if not checks:
        return None
    figure = Pair.of(lambda width: studies.coordinate_figure(checks, width, alone=False))
    first = next(iter(checks.values()))
    return macro("coordinates", studies.coordinate_columns(checks), studies.coordinate_rows(checks), first, figure)


def _transfer(book: LabBook, program: str) -> Markup | None:
    found = studies.read_transfer(book, program)
    if not found:
        return None
    return macro("transfer", [(axis, [(part, Pair.of(_valleys(axis, part))) for part in axis.parts]) for axis in found])


def _valleys(axis: studies.TransferAxis, part: studies.TransferPart) -> Callable[[int], str]:
    return lambda width: studies.transfer_figure(
        part.curves, f"{axis.axis}, {part.parametrization}", width, varied=axis.varied
    )


def _batch(book: LabBook, program: str) -> Markup | None:
    view = batches.read_batch(book, program)
    if view is None:
        return None
    line = Pair.of(lambda width: batches.law_figure(view, width)) if batches.has_law(view) else None
    return macro("batch", view, view.fact["answer"], Pair.of(lambda w: batches.equal_loss_figure(view, w)), line)


def _law(forecasts: list[story.Sealed]) -> Markup | None:
    if not forecasts or not forecasts[0].body.get("points"):
        return None
    one = forecasts[0]
    view = story.read_law(one)
    figure = Pair.of(lambda w: figures.law_figure(view.curves, view.target, one.expected, one.tokens, one.outcome, w))
    return macro("law", one, view, figure, _FORMULAS)


def _scale(book: LabBook, program: str) -> Markup | None:
    found = by_corpus.read_scale(book, program)
    if found is None:
        return None
    maps = [(one.corpus, Pair.of(one.draw)) for one in found.rows if one.mapped]
    return macro("scale", found, maps)


def _curve(pictures: Sequence[CurvePicture]) -> Markup | None:
    return macro("curve", [(one, Pair.of(one.draw)) for one in pictures]) if pictures else None


def _schedule(book: LabBook, program: str, share: bool) -> Markup | None:
    found = [story.without_paths(fact) for fact in decay_design.read_designs(book, program, share=share)]
    if not found:
        return None
    return macro("schedule", decay_design.SHARE_COLUMNS, [
        (
            decay_design.design_title(fact), decay_design.advice_line(fact), decay_design.design_rows(fact),
            Pair.of(partial(decay_design.share_figure, fact)), decay_design.share_rows(fact),
            [decay_design.alike_line(fact), decay_design.form_line(fact), *decay_design.law_lines(fact)],
            decay_design.note_lines(fact),
        )
        for fact in found
    ])  # fmt: skip


def _now(said: Sequence[Now]) -> Markup | None:
    found = [(one.trunk, one.rows(), one.notes()) for one in said if one]
    return macro("now", NOW_COLUMNS, found) if found else None


def _decisions(book: LabBook, program: str, share: bool) -> Markup | None:
    found = decisions.read_decisions(book, program, share=share)
    if not found:
        return None
    return macro("decisions", decisions.ARM_COLUMNS, [
        (
            decisions.decision_title(fact), decisions.verdict_line(fact), decisions.arm_rows(fact),
            Pair.of(partial(decisions.decision_figure, fact)), decisions.look_lines(fact),
            [decisions.terms_line(fact), decisions.noise_line(fact), *decisions.power_lines(fact)],
        )
        for fact in found
    ])  # fmt: skip


def _training(book: LabBook, runs: list[dict[str, Any]]) -> Markup | None:
    if not runs:
        return None
    limbs = programme.read_limbs(book, runs)
    figure = Pair.of(lambda width: curves.tree_figure(limbs, width)) if any(limb.loss for limb in limbs) else None
    return macro("training", programme.read_tree(runs), figure)


def _experts(book: LabBook, runs: list[dict[str, Any]]) -> Markup | None:
    found = experts.read_loads(book, runs)
    shown = [(one, Pair.of(partial(experts.load_figure, one))) for one in found]
    return macro("experts", shown) if shown else None


def _upcycling(book: LabBook, program: str) -> Markup | None:
    found = upcycling.read_upcyclings(book, program)
    if not found:
        return None
    return macro("upcycling", [
        (
            upcycling.upcycling_title(fact), upcycling.verdicts(fact), upcycling.notes(fact),
            [(upcycling.upcycling_columns(), upcycling.upcycling_rows(fact)),
             (upcycling.length_columns(), upcycling.length_rows(fact))],
            [Pair.of(partial(draw, fact)) for draw in (upcycling.lead_figure, upcycling.loss_figure)],
            [Pair.of(partial(experts.load_figure, one)) for one in loads[:1]],
        )
        for fact, loads in found
    ])  # fmt: skip


def _decay(book: LabBook, runs: list[dict[str, Any]]) -> Markup | None:
    found = programme.read_decay(book, runs)
    if found is None:
        return None
    rows = []
    for corpus in found.corpora:
        shares = " → ".join(found.share(name, corpus) for name in (found.reference or "", *found.others))
        rows.append((corpus, f"share {shares}", [found.change(name, corpus) for name in found.others]))
    return macro("decay", found, Pair.of(lambda width: figures.change_figure(rows, found.others, width)))


def _worth(book: LabBook, program: str) -> Markup | None:
    found = decay_data.read_decay_data(book, program)
    if not found:
        return None
    return macro("worth", [
        (decay_data.value_title(fact), decay_data.value_columns(fact), decay_data.value_rows(fact),
         Pair.of(partial(decay_data.value_figure, fact)))
        for fact in found
    ])  # fmt: skip


def _dynamics(book: LabBook, program: str) -> Markup | None:
    found = dynamics.read_dynamics(book, program)
    if not found:
        return None
    return macro("dynamics", [(name, dynamics.phase_columns(fact), dynamics.phase_rows(fact)) for name, fact in found])


def _mixture(book: LabBook, program: str) -> Markup | None:
    found = mixtures.read_mixtures(book, program)
    if not found:
        return None
    return macro("mixture", [
        (mixtures.mixture_title(fact), mixtures.verdict_lines(fact), mixtures.mixture_columns(fact),
         mixtures.mixture_rows(fact), Pair.of(partial(mixtures.mixture_figure, fact)))
        for fact in found
    ])  # fmt: skip


def _answers(book: LabBook, program: str, runs: list[dict[str, Any]]) -> Markup | None:
    models = [
        (
            one,
            Pair.of(_preference_curves(one)) if one.curves else None,
            [row for row in one.preferences if not answers.easy(row)],
            [row for row in one.preferences if answers.easy(row)],
        )
        for one in answers.read_grown(book, program, runs)
    ]
    return macro("answers", models) if models else None


def _preference_curves(one: answers.Grown) -> Callable[[int], str]:
    return lambda width: answers.preference_figure(one, width)


def _context(book: LabBook, program: str) -> Markup | None:
    found = context.read_contexts(book, program)
    if not found:
        return None
    shown = [(one, Pair.of(partial(context.heat_map, one.cells, one.row)) if one.cells else None) for one in found]
    return macro("context", shown)


def _samples(book: LabBook, program: str, share: bool) -> Markup | None:
    facts = book.facts(program, "model")
    order = [run["id"].partition("/")[2] for run in book.runs(program=program) if run["id"].partition("/")[2] in facts]
    names = [*order, *(name for name in facts if name not in order)]
    models = [{"name": name.rpartition("-")[0] or name, **facts[name]} for name in names]
    if not models:
        return None
    tasks = [
        {"name": task, "branch": model["name"], **values}
        for model in models for task, values in (model.get("tasks") or {}).items()
    ]  # fmt: skip
    shown = [] if share else [{"answers": [], "sampling": None, **model} for model in models]
    return macro("samples", shown, tasks, share)


def _ledger(data: Mapping[str, Any] | None, program: str, share: bool) -> Markup | None:
    rows = ledgers.ledger_rows(data, program, share=share) if data else []
    if not data or not rows:
        return None
    return macro("ledger", ledgers.COLUMNS, rows, ledgers.coverage_lines(data), ledgers.left_out(data, rows))


def _cost(book: LabBook, program: str) -> Markup | None:
    found = read_cost(book, program)
    if found is None:
        return None
    rows = [(part.name, part.seconds, duration(part.seconds)) for part in found.parts]
    return macro("cost", found, Pair.of(lambda width: figures.share_figure(rows, width)))


def _provenance(book: LabBook, program: str, forecasts: list[story.Sealed], share: bool) -> Markup:
    runs = book.runs(program=program)
    hashes = [("forecast", f"for branch “{one.branch}”", one.hash) for one in forecasts]
    hashes += [("corpus", name, fact["hash"]) for name, fact in book.facts(program, "corpus").items()]
    exports = [
        {"branch": name.rpartition("-")[0] or name, "check": story.without_paths(str(fact.get("check", "")))}
        for name, fact in book.facts(program, "export").items()
    ]
    rows = [{
        "folder": run["id"].partition("/")[2] or run["id"], "part": run["study"] or run["kind"], "status": run["status"],
        "steps": run["steps"], "tokens": run["tokens"], "seed": run["config"].get("seed", "–"),
    } for run in runs]  # fmt: skip
    recipe = story.without_paths(book.fact(program, "recipe", "resolved"))
    text = json.dumps(recipe, indent=1, ensure_ascii=False) if recipe else ""
    return macro("provenance", {"hashes": hashes, "exports": exports, "runs": rows, "recipe": text})
