"""``windtunnel tunnel coordinates``: the coordinate check of a recipe's parametrizations, with a figure. Needs no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel import __version__
from windtunnel.base.artefact import content_hash, read_json, write_bytes, write_json
from windtunnel.base.devices import USUAL, Crew
from windtunnel.base.errors import ArtefactError
from windtunnel.desk import Desk
from windtunnel.growth import balance_of
from windtunnel.home import Home
from windtunnel.model.shape import Shape
from windtunnel.pipeline import finishing
from windtunnel.pretrain.config import ExpertsConfig
from windtunnel.recipe import Recipe
from windtunnel.report.cost import COORDINATES, COST, cost_line, target_flops, together
from windtunnel.report.studies import coordinate_columns, coordinate_figure, coordinate_rows
from windtunnel.train.growth import Balance
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import Study, open_program, study_config
from windtunnel.tunnel.transfer import make_trial
from windtunnel.views import View, line, table

STEPS = (0, 1, 2, 3, 5, 10)
SEEDS = (0, 1, 2)
BARS = {"stream": 0.15, "block": 0.35, "logits": 0.10, "update": 0.45}
"""Wider than the record's, whose setting has 64 words and one kind of text: on two texts, with a vocabulary of 2,048,
correct µP shows up to .13, .28, .08 and .33, while the standard parametrization and each missing multiplier show more than twice
these bars in some kind (docs/lab-log.md)."""
EXPERTS = ExpertsConfig(count=4, top_k=2)
"""What is checked where no branch of the recipe grows experts."""
_BATCHES = 3


@dataclass(frozen=True)
class _Check:
    """Models of rising width that are checked together; ``stage`` has the parametrization, the optimizer and the data."""

    name: str
    stage: Stage
    shapes: list[dict[str, Any]]
    balance: Balance | None

    @property
    def job(self) -> dict[str, Any]:
        """What it measures: all that its outcome depends on but the text, which the stage names."""
        return {
            "stage": self.stage.to_dict(), "seeds": list(SEEDS), "steps": list(STEPS), "shapes": self.shapes,
            "batches": _BATCHES, "balance": asdict(self.balance) if self.balance else None, "bars": BARS,
        }  # fmt: skip


def coordinates(
    recipe: Recipe, home: Path, *, out: Path | None = None, quiet: bool = False, crew: Crew = USUAL
) -> View:
    """Trains models of rising width for ten steps, dense and with experts, tied and untied, and says whether what they compute
    changes alike. The experts are those that branches of the recipe grow, else two of four.

    Widths, depth and parametrizations are those of [tunnel.transfer]; the batches are the first of the recipe's own data.
    Each check is kept as soon as it has ended: after an interruption the same call does the others.

    Args:
        out: the SVG file; without it, studies/coordinates.svg in the program's folder.
        crew: how many checks run at once, one thread each.
    """
    with Desk(Home(home), recipe.name, quiet=quiet, devices="cpu", crew=crew) as desk:
        study = Study(desk, open_program(desk, recipe), study_config(recipe, ["width"]))
        found, cost = _found(study, list(_checks(study)))
        folder = desk.home.program(recipe.name) / "studies"
        target = out or folder / "coordinates.svg"
        write_bytes(target, coordinate_figure(found).encode())
        write_json(folder / "coordinates.json", found)
        with desk.book as book:
            book.put_fact(recipe.name, COORDINATES, "width", found)
    data = {"program": recipe.name, "figure": str(target), "checks": found, "cost": cost}
    return View(data, (*_parts(found), line(f"{cost_line(cost)}; the figure is {target}")))


def _checks(study: Study) -> Iterator[_Check]:
    """Every parametrization, dense and with experts, tied and untied."""
    for (_, name), ladder in study.ladders().items():
        stage = make_trial(ladder[0].cell, study.centre(name), study.seeds[0], study.program.setting())
        for kind, (changed, balance) in _kinds(study.program.recipe).items():
            for word, tied in (("tied", True), ("untied", False)):
                shapes = [replace(rung.cell.shape, tied=tied, **changed).to_dict() for rung in ladder]
                yield _Check(f"{name}, {kind}{word}", stage, shapes, balance)


def _kinds(recipe: Recipe) -> dict[str, tuple[dict[str, int], Balance | None]]:
    """What is checked under each parametrization: what a shape changes, and how its experts are kept busy."""
    grown = [branch.experts or ExpertsConfig() for branch in recipe.branch.values() if branch.kind == "moe"]
    out: dict[str, tuple[dict[str, int], Balance | None]] = {"": ({}, None)}
    for experts in grown or [EXPERTS]:
        shape = {"experts": experts.count, "top_k": experts.top_k}
        out[f"{experts.top_k} of {experts.count} experts, "] = shape, balance_of(experts)
    return out


def _found(study: Study, checks: Sequence[_Check]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each check found, by name, and what all cost together; from their files where they have been made before."""
    desk, prepared = study.desk, study.program.prepared
    assert prepared is not None
    mixture = study.program.recipe.mixture
    folders = {n: str(desk.home.root / c["folder"]) for n, c in prepared.corpora.items() if n in mixture}
    target = target_flops(desk.book, study.program.name)

    over = threading.Event()

    def measured(check: _Check) -> tuple[_Check, dict[str, Any]] | None:
        if over.is_set():
            return None
        began = time.monotonic()
        try:
            found = finishing("coordinates", corpora=folders, **check.job)
        except BaseException:
            over.set()
            raise
        return check, {"found": found, "cost": {**_cost(check, time.monotonic() - began), "target": target}}

    files = {check.name: _file(study, check) for check in checks}
    known = {name: kept for name, path in files.items() if (kept := _kept(path))}
    if known:
        desk.screen.say(f"coordinates: {len(known)} of {len(checks)} checks were made before")
    missing = [check for check in checks if check.name not in known]
    failed: BaseException | None = None
    flops = {check.name: _cost(check, 0.0)["flops"] for check in missing}
    with (
        desk.screen.counting("coordinates", sum(flops.values())) as ended, ThreadPoolExecutor(desk.machine.workers) as pool
    ):  # fmt: skip
        try:
            for future in as_completed([pool.submit(measured, check) for check in missing]):
                if (error := future.exception()) is not None:
                    failed = failed or error  # those that run are waited for and kept
                elif (answer := future.result()) is not None:
                    check, made = answer
                    _book(desk, study.program.name, made["cost"])
                    write_json(files[check.name], made)
                    known[check.name] = made
                    ended(flops[check.name])
        except BaseException:
            over.set()
            raise
    if failed is not None:
        raise failed
    cost = {**together([known[check.name]["cost"] for check in checks]), "target": target}
    return {check.name: known[check.name]["found"] for check in checks}, cost


def _file(study: Study, check: _Check) -> Path:
    """Where what a check found is kept: by all that it depends on, the version of this package too."""
    of = content_hash([__version__, {**check.job, "stage": check.stage.identity()}])
    return study.desk.home.program(study.program.name) / "studies" / f"coordinates-{of[:16]}.json"


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ArtefactError:
        return None


def _book(desk: Desk, program: str, cost: dict[str, Any]) -> None:
    """These models are no runs: the ledger has what they cost from here."""
    with desk.book as book:
        spent = book.fact(program, COST, COORDINATES)
        book.put_fact(program, COST, COORDINATES, together([spent, cost] if spent else [cost]))


def _cost(check: _Check, seconds: float) -> dict[str, Any]:
    """What the models of one check cost, every width and seed."""
    stage, shapes = check.stage, [Shape(**shape) for shape in check.shapes]
    tokens, runs = max(STEPS) * stage.step_tokens, len(SEEDS) * len(shapes)
    flops = len(SEEDS) * tokens * sum(shape.flops_per_token(stage.plan.row).total for shape in shapes)
    return {"runs": runs, "failed": 0, "tokens": runs * tokens, "flops": flops, "seconds": seconds}


def _parts(found: Mapping[str, dict[str, Any]]) -> Iterator[RenderableType]:
    widths = ", ".join(map(str, next(iter(found.values()))["widths"]))
    title = f"steepest slope of log change over log width, widths {widths}"
    yield table(coordinate_columns(found), coordinate_rows(found), right=(2, 3, 4, 5), title=title)
