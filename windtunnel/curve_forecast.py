"""The verb ``law curve``: a run's whole loss curve under a schedule never trained, sealed before the run. Needs no torch.

The law (``laws.curve_sizes``) is fitted to the trunks and branches of the recipe's scaling study, and to runs that this verb
trained at the study's sizes: a cosine of the smallest proxy says most of what decays alone do not. The target is a run of the
recipe's size and length, or of another, under the recipe's own schedule, another decay, or a cosine. Its forecast is a file like
any other: in the ledger with its final held-out loss, and with the curve beside it, scored once the run has ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from windtunnel.base.artefact import content_hash, write_bytes
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import Length, minus, si
from windtunnel.corpus.mixture import check_epochs
from windtunnel.curve_runs import alike, curve_score, curve_sets, rates_of_run, stretch_of
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.laws.curve_sizes import SIZED, End, Proxy, SizedForecast, forecast_sizes
from windtunnel.laws.design import rates_of
from windtunnel.laws.points import Point
from windtunnel.laws.sealed import CURVE, Sealed, freeze, read_forecast
from windtunnel.ledger import target_run
from windtunnel.model.shape import Shape
from windtunnel.pipeline import run
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.trunk import scheduled_stage
from windtunnel.program import Program
from windtunnel.program_report import curve_picture
from windtunnel.recipe import Recipe
from windtunnel.schedule_design import parse_rule
from windtunnel.sealing import forecast_facts, keep
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.views import View, line, table

Row = Mapping[str, Any]
STUDY = "curve"
OWN, COSINE = "own", "cosine"
_LN2 = math.log(2)
_SHOWN = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Target:
    """The run that a forecast is about, and the keys of other stages that are the same run, such as a branch of the trunk."""

    stage: Stage
    schedule: str
    same: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether ``windtunnel run`` trains it."""
        return self.stage.kind != "trial"


@dataclass(frozen=True)
class Study:
    """The runs behind the law."""

    proxies: tuple[Proxy, ...]
    ends: tuple[End, ...]
    runs: tuple[str, ...]
    """Their keys."""
    stretch: int
    step_tokens: int
    left_out: tuple[str, ...]


def curve(
    recipe: Recipe, home: Path, *, schedule: str = OWN, size: str | None = None, tokens: str | None = None, train: bool = False,
    out: Path | None = None, devices: str | None = None, quiet: bool = False,
) -> View:  # fmt: skip
    """Trains the scaling study as far as it is not done, seals the forecast, and scores it if the run has ended.

    Args:
        schedule: ``own``, ``cosine`` (to a tenth), or a decay as FORM:SHARE:FLOOR.
        size: of the family; without it, the recipe's target.
        tokens: the whole length; without it, the recipe's.
        train: also train the run, once the forecast is sealed.
        out: SVG file for the figure; without it, in the program's folder.

    Raises:
        UserError: the recipe has no tunnel or changes its batch, the schedule is unknown, or the recipe itself trains the run.
        LawError: the study has fewer than three sizes, or its points cannot be used.
        Stopped: a stop was asked for; the same command continues.
    """
    if recipe.tunnel is None:
        raise UserError(recipe.where("tunnel"), "expected a [tunnel] with proxies and tokens, found none")
    if recipe.trunk.batch_schedule:
        raise UserError(
            recipe.where("trunk.batch_schedule"), "expected one batch along the run, got changes", "leave it out"
        )
    if schedule not in (OWN, COSINE):
        parse_rule(schedule, "--schedule")
    if size is not None:
        recipe.shape_of(size, where="--size")
    if tokens is not None:
        Length.parse(tokens, "--tokens")
    run(recipe, home, until="scaling", devices=devices, quiet=quiet)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        target = target_of(program, schedule, size, tokens)
        if train and target.own:
            raise UserError(
                "--train", "expected a schedule of its own, got the recipe's", f"windtunnel run {recipe.name} trains it"
            )
        found = study_of(desk.book, recipe.name, recipe.mixture)
        sealed = _seal(desk, program, target, found)
        if train:
            _train(desk, program, target.stage)
        row = target_run(desk.book, recipe.name, sealed.facts)
        score = curve_score(desk.book, row, sealed.facts["curve"]) if row else None
        figure = out or desk.home.program(recipe.name) / "laws" / f"{target.stage.name}.svg"
        content = {"hash": sealed.hash, "facts": sealed.facts, "forecast": sealed.forecast.to_dict()}
        write_bytes(figure, curve_picture(desk.book, recipe.name, content).draw(alone=True).encode())
        outcome = _outcome(desk.book, row, recipe.mixture) if row else None
    return _view(recipe.name, target, sealed, outcome, score, figure, found.left_out)


def target_of(program: Program, schedule: str, size: str | None, tokens: str | None) -> Target:
    """The stage of the run that is asked about.

    Raises:
        UserError: the schedule or the length is not what it should be, or the recipe has no decay of its own.
    """
    setting, recipe = program.setting(), program.recipe
    shape = program.shape if size is None else program.shape_of(size)
    usual = size is None and tokens is None
    if schedule == OWN and usual:
        if recipe.forecast_branch is None:
            raise UserError(
                "--schedule", "expected a decay on the trunk's own data in the recipe, found none", "name one"
            )
        return Target(program.branch(recipe.forecast_branch), schedule)
    length = Length.parse(tokens, "--tokens") if tokens else None
    steps = program.steps if length is None else setting.steps(length.tokens(parameters=shape.body))
    if schedule == COSINE:
        made = Schedule(setting.warmup, decay_steps=steps, kind="cosine")
    elif schedule == OWN:
        own = program.decay()
        stable, decay = own.split(steps)
        made = Schedule(setting.warmup, stable, decay, own.form, own.floor, own.half_life)
    else:
        made = parse_rule(schedule, "--schedule").schedule(steps, setting.warmup)
    word = schedule.replace("%", "pc").replace(":", "-").replace(".", "_")
    stage = scheduled_stage(f"curve-{word}-{si(shape.body)}-{si(steps)}".replace(".", "_"), shape, setting, steps, made)
    same: tuple[str, ...] = ()
    if usual and made.kind == "wsd" and made.stable_end is not None:
        branch = decay_stage(
            program.trunk(), "same", setting, at=made.stable_end, steps=made.decay_steps, form=made.form, floor=made.floor,
            half_life=made.half_life,
        )  # fmt: skip
        same = (branch.key,)
    return Target(stage, schedule, same)


def study_of(book: LabBook, program: str, mixture: Mapping[str, float]) -> Study:
    """Curves and ends of the scaling study in use, and of what this verb trained at its sizes.

    Diverged and failed runs are left out and named.

    Raises:
        UserError: none of its branches has been scored.
    """
    used = set(book.fact(program, "used", "scaling") or [])
    rows = [r for r in book.runs(program=program, study="scaling") if Path(r["folder"]).name in used]
    settings = {alike(r["config"]) for r in rows}
    rows += [r for r in book.runs(program=program, study=STUDY, status="done") if alike(r["config"]) in settings]
    by_name = {row["name"]: row for row in rows}
    sets = curve_sets(book, rows)
    proxies = tuple(
        Proxy(float(made.parameters or 0), row["parent"] or row["id"], one)
        for made in sets
        for one in made.curves
        for row in (by_name[one.name],)
    )
    ends = tuple(end for p in proxies if (end := _end(book, by_name[p.curve.name], mixture)) is not None)
    if not ends:
        raise UserError(
            "law curve", f"expected scored branches of '{program}', found none", "windtunnel tunnel scale RECIPE"
        )
    left = tuple(text for made in sets for text in made.left_out)
    runs = tuple(sorted(Stage.from_dict(by_name[p.curve.name]["config"]).key for p in proxies))
    return Study(proxies, ends, runs, stretch_of(rows), sets[0].step_tokens or 1, left)


def _end(book: LabBook, row: Row, mixture: Mapping[str, float]) -> End | None:
    outcome, config = _outcome(book, row, mixture), row["config"]
    if row["kind"] == "trunk" or row["status"] != "done" or outcome is None:
        return None
    tokens = config["steps"] * config["batch"] * config["plan"]["row"]
    size = float(Shape(**config["shape"]).body)
    cluster = row["parent"] or row["id"]
    return End(Point(size, float(tokens), outcome, cluster, config["seed"]), rates_of_run(row))


def _outcome(book: LabBook, row: Row, mixture: Mapping[str, float]) -> float | None:
    """Nats per byte over the trunk's corpora; None unless all were scored."""
    scores = {s["corpus"]: s["value"] for s in book.scores(row["id"]) if s["name"] == "nats_per_byte"}
    if not set(mixture) <= set(scores):
        return None
    return sum(weight * scores[name] for name, weight in mixture.items()) / sum(mixture.values())


def _seal(desk: Desk, program: Program, target: Target, found: Study) -> Sealed:
    """The forecast as a file; made once for the same run and the same proxies."""
    stage = target.stage
    identity = content_hash([stage.key, found.runs, list(SIZED)])
    path = desk.home.program(program.name) / "forecasts" / f"curve-{identity[:12]}.json"
    if not path.is_file():
        rates = rates_of(stage.schedule, stage.optimizer.learning_rate, stage.steps)
        said = forecast_sizes(found.proxies, found.ends, stage.shape.body, stage.tokens, rates)
        about = f"a whole run of {stage.steps:,} steps under the schedule '{target.schedule}'"
        facts = forecast_facts(desk, program, stage, found.runs, said.final, about)
        facts |= {"same": list(target.same), "schedule": stage.schedule.to_dict(), "curve": _facts(said, found)}
        freeze(said.final, path, facts)
    sealed = read_forecast(path)
    with desk.book as book:
        content = {"hash": sealed.hash, "facts": sealed.facts, "forecast": sealed.forecast.to_dict()}
        keep(book, program.name, CURVE, stage.folder_name, content)
    return sealed


def _facts(said: SizedForecast, found: Study) -> dict[str, Any]:
    return {**said.to_dict(), "stretch": found.stretch, "step_tokens": found.step_tokens}


def _train(desk: Desk, program: Program, stage: Stage) -> None:
    assert program.prepared is not None
    rows = program.prepared.rows_of(stage.plan)
    for warning in check_epochs(stage.plan, rows, stage.steps * stage.batch):
        desk.screen.say(f"{stage.name}: {warning}")
    results = desk.train(f"law curve: {stage.name}", STUDY, [stage], program.prepared, large=True)
    desk.need_all([stage], results)


# -- what is shown ---------------------------------------------------------------------------------------------------------


def _view(
    program: str, target: Target, sealed: Sealed, outcome: float | None, score: Mapping[str, float] | None, figure: Path,
    left: Sequence[str],
) -> View:  # fmt: skip
    data = {
        "program": program, "schedule": target.schedule, "run": target.stage.name, "hash": sealed.hash,
        "kind": sealed.facts["kind"], "forecast": sealed.forecast.to_dict(), "curve": sealed.facts["curve"],
        "outcome": outcome, "score": score, "figure": str(figure), "left_out": list(left),
    }  # fmt: skip
    return View(data, tuple(_parts(program, target, sealed, outcome, score, figure, left)))


def _parts(
    program: str, target: Target, sealed: Sealed, outcome: float | None, score: Mapping[str, float] | None, figure: Path,
    left: Sequence[str],
) -> Iterator[RenderableType]:  # fmt: skip
    stage, e, said = target.stage, sealed.forecast.expected, sealed.facts["curve"]
    yield line(
        f"curve of '{program}', schedule {target.schedule}: {si(stage.shape.body)} parameters, {si(stage.tokens)} tokens "
        f"({sealed.facts['kind']}, sealed {sealed.hash[:12]})", "bold",
    )  # fmt: skip
    yield line(
        f"  final held-out loss {e.value / _LN2:.4f} [{e.low90 / _LN2:.4f}, {e.high90 / _LN2:.4f}] bits per byte (90 %)"
    )
    rates = rates_of(stage.schedule, stage.optimizer.learning_rate, stage.steps)
    rows: list[tuple[str, ...]] = []
    for share in _SHOWN:
        step = max(1, round(share * stage.steps))
        value, low, high = (float(np.interp(step, said["steps"], said[key])) for key in ("value", "low90", "high90"))
        words = (f"{100 * share:g} %", si(step * said["step_tokens"]), f"{rates[step - 1]:.3g}")
        rows.append((*words, f"{value:.3f} [{low:.3f}, {high:.3f}]"))
    columns = ("of the run", "tokens", "learning rate", "training loss, nats per token, 90 %")
    yield table(columns, rows, right=(0, 1, 2))
    laws = ", ".join(
        f"{one['kernel']} {one['weight']:.0%} ({100 * one['left_out']['end']:.2f} %)" for one in said["laws"]
    )
    yield line(f"laws, with their error on the largest size left out: {laws}")
    yield from (line(f"note: {text}") for text in (*said["notes"], *(f"left out: {why}" for why in left)))
    if outcome is not None:
        inside = "inside" if e.low90 <= outcome <= e.high90 else "OUTSIDE"
        off = minus(f"{100 * (e.value / outcome - 1):+.2f} %")
        yield line(f"outcome {outcome / _LN2:.4f} bits per byte, {off}: {inside} the interval", "bold")
    if score is not None:
        yield line(
            f"curve: mean absolute error {100 * score['mean_error']:.2f} %, at the end {100 * score['end_error']:+.2f} %; "
            f"{100 * score['inside_90']:.0f} % of {score['points']:.0f} means inside the band"
        )
    elif not target.own:
        yield line("not trained: the same command with --train trains it now that the forecast is sealed")
    yield line(f"figure: {figure}")
