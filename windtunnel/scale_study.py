"""The verb ``law scale``: trunks at several sizes, branches at several lengths, a law for each held-out corpus. No torch.

The runs are those of the recipe's scaling study; what is trained already is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import write_bytes, write_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import parse_count, si
from windtunnel.home import Home, write_facts
from windtunnel.laws.corpora import (
    BestUse,
    CorpusLaw,
    Cost,
    Saved,
    averaged,
    check_flops,
    cost_between,
    law_of,
    six,
)
from windtunnel.laws.heldout import assumed_noise
from windtunnel.laws.loss import LossLaw
from windtunnel.laws.optimum import check_counts, parameters_of
from windtunnel.laws.points import Point
from windtunnel.model.shape import Shape
from windtunnel.pipeline import run
from windtunnel.recipe import Recipe
from windtunnel.report.contour import contour_figure
from windtunnel.report.cost import cost_line, cost_of_rows, target_flops
from windtunnel.sealing import AVERAGE
from windtunnel.views import View, line, table

Row = Mapping[str, Any]
_ALONE = "this file holds the additive form alone: law scale, whose answers differ, averages several forms"
_SIX = "law scale counted exact FLOPs, this law counts 6ND"
_UNLIKE = "note: the runs differ in batch or base learning rate: the law is for none of them alone"


def scale(
    recipe: Recipe, home: Path, *, devices: str | None = None, counts: str = "body", flops: str = "6ND",
    budget: str | None = None, inference_tokens: str | None = None,
) -> View:  # fmt: skip
    """Trains the study as far as it is not done, and fits a law to every held-out corpus and to their average.

    Args:
        counts: what N counts: body or body+head.
        flops: what a token costs: 6ND or exact.
        budget: FLOPs whose best use is asked for; by default ten times the most that a point of the study cost.
        inference_tokens: expected in use; the best use of the budget is then also given for training and use together.

    Raises:
        UserError: the recipe has no tunnel, or nothing was scored.
        LawError: the points cannot be used, or a convention is unknown.
    """
    check_flops(flops)
    check_counts(counts)
    asked = float(parse_count(budget, "--budget")) if budget else None
    served = float(parse_count(inference_tokens, "--inference-tokens")) if inference_tokens else 0.0
    if recipe.tunnel is None:
        raise UserError(recipe.where("tunnel"), "expected a [tunnel] with proxies and tokens, found none")
    run(recipe, home, until="scaling", devices=devices)
    book = LabBook(Home(home).labbook)
    view = _laws(book, home, recipe, counts, flops, asked, served)
    book.close()
    return view


def study_points(
    book: LabBook, program: str, counts: str
) -> tuple[dict[str, list[Point]], list[dict[str, Any]], list[str]]:
    """Points of the scaling study in use, by held-out corpus; its rows; and what was left out.

    Raises:
        UserError: there is no finished branch with a score.
    """
    used = set(book.fact(program, "used", "scaling") or [])
    rows = [r for r in book.runs(program=program, study="scaling") if Path(r["folder"]).name in used]
    branches = [r for r in rows if r["kind"] == "decay" and r["status"] == "done"]
    left = [f"{r['name']}: {r['reason']}" for r in rows if r["status"] == "failed"]
    scores = {
        r["id"]: {s["corpus"]: s["value"] for s in book.scores(r["id"]) if s["name"] == "nats_per_byte"}
        for r in branches
    }
    corpora = sorted(set[str].intersection(*(set(s) for s in scores.values()))) if scores else []
    if not corpora:
        raise UserError(
            "law scale", f"expected scored branches of '{program}', found none", "windtunnel tunnel scale RECIPE"
        )
    points: dict[str, list[Point]] = {name: [] for name in corpora}
    for row in branches:
        config = row["config"]
        tokens = config["steps"] * config["batch"] * config["plan"]["row"]
        for name in corpora:
            size = parameters_of(Shape(**config["shape"]), counts)
            points[name].append(
                Point(float(size), float(tokens), scores[row["id"]][name], row["parent"], config["seed"])
            )
    return points, rows, left


def _laws(
    book: LabBook, home: Path, recipe: Recipe, counts: str, flops: str, budget: float | None, served: float
) -> View:
    points, rows, left = study_points(book, recipe.name, counts)
    shapes = [Shape(**r["config"]["shape"]) for r in rows if r["kind"] == "trunk"]
    length = rows[0]["config"]["plan"]["row"]
    exact = {float(parameters_of(s, counts)): s.flops_per_token(length).total for s in shapes}
    cost = cost_between(exact) if flops == "exact" else six
    several = dict(points)
    if set(recipe.mixture) <= set(points):
        several[AVERAGE] = averaged(points, recipe.mixture)
    if set(points) - set(recipe.mixture):
        several["all held-out"] = averaged(points, dict.fromkeys(points, 1.0))
    asked = budget or _ten_times(several, cost)
    found = [law_of(name, part, asked, cost=cost, counts=counts, served=served) for name, part in several.items()]
    settings = {(r["config"]["batch"] * length, r["config"]["optimizer"]["learning_rate"]) for r in rows}
    if len(settings) == 1:
        ((batch, rate),) = settings
        found = [replace(one, law=replace(one.law, batch=batch, base_lr=rate)) for one in found]
    saved = _saved(rows, length)
    folder, usual = Home(home).program(recipe.name) / "laws", (counts, flops) == ("body", "6ND")
    for one in found:
        name = "-".join(["scale", one.corpus.replace(" ", "-"), *([] if usual else [counts, flops])])
        write_bytes(folder / f"{name}.svg", _map(one, cost).encode())
        alone = (*one.law.warnings, _ALONE, *([_SIX] if flops == "exact" else []))
        write_json(folder / f"{name}.json", replace(one.law, warnings=alone).to_dict())
    data = {
        "program": recipe.name, "counts": counts, "flops": flops, "budget": asked, "laws": [one.to_dict() for one in found],
        "spent": saved.spent, "independent": saved.independent, "left_out": left,
    }  # fmt: skip
    with book:
        book.put_fact(recipe.name, "scale", f"{counts}, {flops}", data)
    write_facts(home, recipe.name, book)
    spent = cost_of_rows(rows, target_flops(book, recipe.name))
    view = _view(found, saved, asked, counts, flops, folder, left, {**data, "cost": spent})
    return View(view.data, (view.parts[0], *_in_use(found, asked, cost), *view.parts[1:]))


def _ten_times(points: Mapping[str, Sequence[Point]], cost: Cost) -> float:
    """Ten times the FLOPs of the study's largest point: as far as a law without a floor may be asked."""
    part = next(iter(points.values()))
    return 10 * max(cost(p.parameters) * p.tokens for p in part)


def _saved(rows: Sequence[Row], length: int) -> Saved:
    """What the study cost, and what the same points would have cost one by one; exact FLOPs."""

    def per_token(row: Row) -> float:
        return Shape(**row["config"]["shape"]).flops_per_token(length).total

    def step_tokens(row: Row) -> int:
        return int(row["config"]["batch"]) * int(length)

    done = [r for r in rows if r["status"] == "done"]
    branches = [r for r in done if r["kind"] == "decay"]
    trunks = [r for r in done if r["kind"] == "trunk"]
    spent = sum(float(r["flops"]) for r in done)
    independent = sum(r["config"]["steps"] * step_tokens(r) * per_token(r) for r in branches)
    return Saved(spent, independent, len(trunks), round(len(branches) / max(1, len(trunks))))


def _map(one: CorpusLaw, cost: Cost) -> str:
    n, d = one.best
    pairs = [(p.parameters, p.tokens) for p in one.points]
    target = {f"best at {si(cost(n) * d)} FLOPs": (n, d)}
    if one.with_use is not None:
        target[f"with {si(one.served)} tokens in use"] = one.with_use.best
    unit = f"{one.law.unit} on {one.corpus}"
    return contour_figure(one.loss, pairs, one.line, band=one.band, target=target, unit=unit)


def _in_use(found: Sequence[CorpusLaw], budget: float, cost: Cost) -> Iterator[RenderableType]:
    """A table of the best use when the budget pays for inference too."""
    rows = [
        (one.corpus, *_best_cells(use), f"{100 * one.served * cost(use.best[0]) / 3 / budget:.0f} %")
        for one in found
        if (use := one.with_use) is not None
    ]
    if rows:
        words = (
            f"the same FLOPs when they also pay for {si(found[0].served)} tokens in use, each a third of a trained one"
        )
        yield table(("corpus", "N", "D", "D/N", "FLOPs in use"), rows, title=words, right=(1, 2, 3, 4))


def _best_cells(use: BestUse) -> tuple[str, str, str]:
    ratio, low, high = use.ratio
    return _with(use.best[0], use.sizes90), _with(use.best[1], use.lengths90), f"{ratio:.3g} [{low:.3g}, {high:.3g}]"


def _view(
    found: Sequence[CorpusLaw], saved: Saved, budget: float, counts: str, flops: str, folder: Path, left: Sequence[str],
    data: dict[str, Any],
) -> View:  # fmt: skip
    rows = []
    for one in found:
        c = one.law.constants
        several = [form for form in dict.fromkeys(["additive", one.best_form]) if form in one.held_out]
        errors = ", ".join(f"{form} {100 * one.held_out[form]:+.2f} %" for form in several)
        rows.append((
            one.corpus, f"{c['alpha']:.3f}", f"{c['beta']:.3f}", f"{c['L0']:.3f}", f"{100 * one.law.residual:.2f} %",
            *_best_cells(one.use), errors,
        ))  # fmt: skip
    columns = ("corpus", "α", "β", "L0", "residual", "N", "D", "D/N", "largest size, left out")
    title = f"C_N N^-α + C_D D^-β + L0 in nats per byte; best use of {si(budget)} FLOPs (N: {counts}, FLOPs: {flops})"
    parts: list[RenderableType] = [
        table(columns, rows, title=title, right=(1, 2, 3, 4, 5, 6)),
        line(f"N, D and D/N: {found[0].interval}"),
        *(line(said) for one in found if (said := _constants(one.corpus, one.law))),
        line(f"the law is {setting}" if (setting := found[0].law.setting) else _UNLIKE),
    ]
    warnings = dict.fromkeys(text for one in found for text in (*one.law.warnings, *assumed_noise(one.points)))
    notes = (*warnings, *_reach(found), *(f"left out: {text}" for text in left))
    parts += [line(f"note: {text}") for text in notes]
    parts += [line(str(saved)), line(cost_line(data["cost"])), line(f"laws and maps: {folder}")]
    return View({**data, "warnings": list(warnings)}, tuple(parts))


def _constants(corpus: str, law: LossLaw) -> str:
    """The constants with their intervals; nothing where the trunks are too few to resample."""
    if not law.intervals:
        return ""
    shown = (f"{key} {value:.3g} [{low:.3g}, {high:.3g}]" for key, value in law.constants.items() if key in law.intervals
             for low, high in [law.intervals[key]])  # fmt: skip
    return f"{corpus}, 95 %: {', '.join(shown)}"


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{si(value)} [{si(interval[0])}, {si(interval[1])}]"


def _reach(found: Sequence[CorpusLaw]) -> list[str]:
    """How far the best sizes and lengths lie beyond the points, the farthest corpus of each."""
    notes: list[str] = []
    for what, index in (("N", 0), ("D", 1)):
        ratios = [one.best[index] / (one.law.sizes, one.law.lengths)[index][1] for one in found]
        if max(ratios) > 1.05:
            name = found[ratios.index(max(ratios))].corpus
            notes.append(f"the best {what} lies up to {max(ratios):.3g}× beyond the largest fitted ({name})")
    return notes
