"""``windtunnel tunnel coordinates``: the coordinate check of a recipe's parametrizations, with a figure. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import write_bytes, write_json
from windtunnel.desk import Desk
from windtunnel.growth import balance_of
from windtunnel.home import Home
from windtunnel.model.shape import Shape
from windtunnel.pipeline import finishing
from windtunnel.pretrain.config import ExpertsConfig
from windtunnel.recipe import Recipe
from windtunnel.report.cost import COORDINATES, COST, cost_line, target_flops, together
from windtunnel.report.studies import coordinate_figure
from windtunnel.train.growth import Balance
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import Study, open_program, study_config
from windtunnel.tunnel.transfer import make_trial
from windtunnel.views import View, line, table

STEPS = (0, 1, 2, 3, 5, 10)
SEEDS = (0, 1, 2)
_BATCHES = 3


def coordinates(recipe: Recipe, home: Path, *, out: Path | None = None, quiet: bool = False) -> View:
    """Trains models of rising width for ten steps, tied, untied, and with the experts that a branch of the recipe grows, and
    says whether what they compute changes alike.

    Widths, depth and parametrizations are those of [tunnel.transfer]; the batches are the first of the recipe's own data.

    Args:
        out: the SVG file; without it, studies/coordinates.svg in the program's folder.
    """
    with Desk(Home(home), recipe.name, quiet=quiet) as desk:
        study = Study(desk, open_program(desk, recipe), study_config(recipe, ["width"]))
        prepared = study.program.prepared
        assert prepared is not None
        folders = {
            name: str(desk.home.root / c["folder"]) for name, c in prepared.corpora.items() if name in recipe.mixture
        }
        found: dict[str, Any] = {}
        costs: list[dict[str, Any]] = []
        for (_, name), ladder in study.ladders().items():
            stage = make_trial(ladder[0].cell, study.centre(name), study.seeds[0], study.program.setting())
            for kind, (changed, balance) in _kinds(recipe, ladder[0].cell.shape.tied).items():
                word = f"{name}, {kind}"
                with desk.screen.console.status(f"coordinates: {word}"):
                    began = time.monotonic()
                    shapes = [replace(rung.cell.shape, **changed).to_dict() for rung in ladder]
                    found[word] = finishing(
                        "coordinates", stage=stage.to_dict(), corpora=folders, seeds=list(SEEDS), steps=list(STEPS),
                        shapes=shapes, batches=_BATCHES,
                        balance=asdict(balance) if balance else None,
                    )  # fmt: skip
                    costs.append(_cost(stage, shapes, time.monotonic() - began))
        folder = desk.home.program(recipe.name) / "studies"
        target = out or folder / "coordinates.svg"
        write_bytes(target, coordinate_figure(found).encode())
        write_json(folder / "coordinates.json", found)
        cost = {**together(costs), "target": target_flops(desk.book, recipe.name)}
        spent = desk.book.fact(
            recipe.name, COST, COORDINATES
        )  # these models are no runs: the ledger has them from here
        with desk.book as book:
            book.put_fact(recipe.name, COORDINATES, "width", found)
            book.put_fact(recipe.name, COST, COORDINATES, together([spent, cost] if spent else [cost]))
    data = {"program": recipe.name, "figure": str(target), "checks": found, "cost": cost}
    return View(data, (*_parts(found), line(f"{cost_line(cost)}; the figure is {target}")))


def _kinds(recipe: Recipe, tied: bool) -> dict[str, tuple[dict[str, Any], Balance | None]]:
    """What is checked under each parametrization: what a shape changes, and how its experts are kept busy."""
    out: dict[str, tuple[dict[str, Any], Balance | None]] = {
        "tied": ({"tied": True}, None),
        "untied": ({"tied": False}, None),
    }
    for branch in recipe.branch.values():
        if branch.kind == "moe":
            experts = branch.experts or ExpertsConfig()
            shape = {"tied": tied, "experts": experts.count, "top_k": experts.top_k}
            out[f"{experts.top_k} of {experts.count} experts"] = shape, balance_of(experts)
    return out


def _cost(stage: Stage, shapes: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What one parametrization's models cost, every width and seed."""
    tokens, runs = max(STEPS) * stage.step_tokens, len(SEEDS) * len(shapes)
    each = (Shape(**shape).flops_per_token(stage.plan.row).total for shape in shapes)
    flops = len(SEEDS) * tokens * sum(each)
    return {"runs": runs, "failed": 0, "tokens": runs * tokens, "flops": flops, "seconds": seconds}


def _parts(found: Mapping[str, dict[str, Any]]) -> Iterator[RenderableType]:
    first = next(iter(found.values()))
    kinds, rows = list(first["bars"]), []
    for word, check in found.items():
        judged = [slope for slope in check["slopes"] if slope["judged"]]
        at_init = [f"{kind} {_steepest(judged, kind, init=True)}" for kind in kinds if kind != "logits"]
        cells = [f"{_steepest(judged, kind)} (± {check['bars'][kind]:g})" for kind in kinds]
        failed = len(check["failures"])
        rows.append((word, ", ".join(at_init), *cells, f"{failed} too steep" if failed else "flat"))
    yield table(
        ("parametrization", "sizes at init", *kinds, "verdict"), rows, right=(2, 3, 4, 5),
        title=f"steepest slope of log change over log width, widths {', '.join(map(str, first['widths']))}",
    )  # fmt: skip


def _steepest(slopes: Iterable[Mapping[str, Any]], kind: str, *, init: bool = False) -> str:
    return f"{max((s['value'] for s in slopes if s['kind'] == kind and init == (not s['step'])), key=abs):+.3f}"
