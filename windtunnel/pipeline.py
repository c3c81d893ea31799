"""From a recipe to everything it describes, in order, skipping what is done. Needs no torch: workers train, this decides."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import read_json, write_json
from windtunnel.base.devices import USUAL, Crew
from windtunnel.base.errors import LimitReached, Stopped, UserError, WindtunnelError
from windtunnel.base.units import duration, si
from windtunnel.batch_answer import with_known_batch
from windtunnel.chats import template_of, template_read
from windtunnel.desk import THREADED_FROM, Desk, Result
from windtunnel.growth import generations, regained
from windtunnel.home import Home
from windtunnel.laws.sealed import Forecast, score
from windtunnel.measures import answering_job, put_answers
from windtunnel.planning import known_pins, pin_key
from windtunnel.preference_study import study_beta
from windtunnel.preparation import check_supply, note_target, prepare
from windtunnel.program import Program
from windtunnel.program_report import write_program_report
from windtunnel.recipe import Recipe, differences, introduction, shipped, with_defaults
from windtunnel.report.context import in_short_rows, read_contexts
from windtunnel.report.cost import cost_line, cost_of_studies
from windtunnel.sealing import seal_forecasts
from windtunnel.search_view import search_view
from windtunnel.sizing import with_budget
from windtunnel.study import (
    choose,
    mean_loss,
    part_view,
    train_part,
    train_scaling_part,
    with_known_choices,
)
from windtunnel.summary import LN2, forecast_view, outcome_view, remaining_cost
from windtunnel.train.control import stop_wanted
from windtunnel.train.folder import RESULT, as_far_as_trained, checkpoint_path, steps_saved
from windtunnel.train.stage import AdamW, Stage, check_ranks, optimizer_of
from windtunnel.tunnel.search import part_of
from windtunnel.views import View, line

FINISH = "finish.json"
_LOOK = 0.2
"""Seconds between two looks for a stop while another process works."""
_PURPOSES = {"search": "search", "scaling": "measure", "forecast": "forecast"}
"""What the stages of a tunnel are for."""


@dataclass
class Job:
    """A run of the pipeline in progress; ``sealed`` holds its forecasts, that of the longest run first."""

    desk: Desk
    program: Program
    until: str | None
    sealed: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    trunk_end: int | None = None
    part: tuple[int, int] | None = None
    trials: int = 0
    alone: bool = False
    """Of the branches only ``until`` and what it grows from."""


def stage_names(recipe: Recipe) -> list[str]:
    """The names that ``--until`` takes, in order."""
    tunnel = ["search", "scaling", "forecast"] if recipe.tunnel else []
    return ["corpora", *tunnel, "trunk", *recipe.branch, "export", "report"]


def run(
    recipe: Recipe, home: Path, *, until: str | None = None, devices: str | None = None, stop_after_forecast: bool = False,
    quiet: bool = False, part: str | None = None, crew: Crew = USUAL, alone: bool = False,
) -> View:  # fmt: skip
    """Does what a recipe says: corpora, tunnel, forecast, trunk, branches, scores, export, report.

    What is done is skipped, what was stopped continues, what changed is redone with all that depends on it.

    Args:
        crew: how many workers small stages get.
        part: ``3/28`` trains only that share of the search's trials, or of the trunks with their branches where ``until`` is
            "scaling", and nothing after it.
        alone: where ``until`` is a branch, train no branch but it and those that it grows from.

    Raises:
        UserError: ``until`` names no stage, the recipe has no tunnel to forecast with or nothing to search, or there is nothing
            to share out.
        LimitReached: the forecast exceeds max_loss, max_hours or max_cost.
        Stopped: a stop was asked for.
    """
    share = part_of(part) if part is not None else None
    until = "forecast" if stop_after_forecast else until
    _check_asked(recipe, until, share)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet, track=recipe.track, crew=crew) as desk:
        begun = time.time()
        _check_ranks(desk, recipe)
        if recipe.name in shipped() and desk.book.fact(recipe.name, "recipe", "resolved") is None:
            desk.screen.say(introduction(recipe.name))
        _note_change(desk, recipe)
        job = Job(desk, Program(recipe), until, part=share, alone=alone)
        for name, step in _steps(job):
            step(job)
            if name == until or (until in recipe.branch and step is _branches):
                break
        with desk.book as book:
            book.put_fact(recipe.name, "session", f"{begun:.0f}", {"seconds": time.time() - begun})
        if until in (None, "export", "report") or until in recipe.branch:
            return outcome_view(desk, job.program, job.sealed)
        if job.sealed and until == "forecast":
            remaining = remaining_cost(desk, job.program)
            return forecast_view(job.program, job.sealed, remaining)
        if share is not None:
            return part_view(job.program, share, job.trials)
        if until == "search" and job.program.choices:
            return search_view(desk.home, desk.book, job.program)
        if until == "scaling":
            return _scaling_view(desk, job.program)
        return View({"program": recipe.name, "until": until}, (f"'{recipe.name}' is done up to '{until}'",))


def _check_asked(recipe: Recipe, until: str | None, part: tuple[int, int] | None) -> None:
    """Raises before any work if the recipe has no such stage, or nothing to do in it."""
    names, tunnel = stage_names(recipe), recipe.tunnel
    if tunnel is None and until not in names and until in _PURPOSES:
        problem = f"expected a [tunnel] to {_PURPOSES[until]} with, found none"
        raise UserError(recipe.where("tunnel"), problem, "windtunnel run trains anyway")
    if part is not None and until not in ("search", "scaling"):
        raise UserError(
            "--part", f"expected a search or a scaling study to share out, got {until or 'a whole program'!r}"
        )
    if until is not None and until not in names:
        raise UserError("--until", f"expected one of {', '.join(names)}, got {until!r}")
    if tunnel is None or until != "search" or part is not None:
        return
    fix = "windtunnel run takes the recipe's values, or the paper's, as they are"
    if not tunnel.trials:
        raise UserError(recipe.where("tunnel.trials"), "expected trials to search with, got 0", fix)
    if not Program(recipe).searched:
        problem = "expected a hyper-parameter that the recipe leaves open, got a value for each"
        raise UserError(recipe.where("tunnel.space"), problem, f"leave one out or name other axes; {fix}")


def _scaling_view(desk: Desk, program: Program) -> View:
    """What the scaling study has cost, and what comes next."""
    cost = cost_of_studies(desk.book, program.name, ("scaling",))
    text = f"the scaling study of '{program.name}': {cost_line(cost)}; windtunnel law scale fits the law"
    return View({"program": program.name, "until": "scaling", "cost": cost}, (line(text),))


def _check_ranks(desk: Desk, recipe: Recipe) -> None:
    """Raises before any work if the target would be trained by several ranks and its optimizer cannot be."""
    target = recipe.target_shape()
    if target is None or target.body >= THREADED_FROM:
        check_ranks(optimizer_of(recipe.optimizer.kind, AdamW()), desk.machine.ranks)


def _steps(job: Job) -> list[tuple[str, Callable[[Job], None]]]:
    recipe = job.program.recipe
    tunnel = [("search", _choose), ("scaling", _seal), ("forecast", _limits)] if recipe.tunnel else []
    branches = [(name, _branches) for name in recipe.branch]
    return [("corpora", _prepare), *tunnel, ("trunk", _trunk), *branches[-1:], ("export", _export), ("report", _report)]


def _prepare(job: Job) -> None:
    desk, recipe = job.desk, job.program.recipe
    prepared = prepare(desk, recipe)
    pinned = known_pins(desk.home, recipe, prepared.tokenizer_hash)
    job.program = program = with_known_batch(desk.home, with_budget(Program(recipe, prepared, pinned=pinned)))
    if program.answered:
        batch = si(program.answered.batch * recipe.model.row)
        desk.screen.say(f"a step has {batch} tokens: {program.answered.source}")
    check_supply(program, desk.screen.say)
    note_target(desk, program)
    answered = pinned.get("answered", 0) if pinned else int(program.answered is not None)
    pins = {"batch": program.batch, "warmup": program.warmup, "answered": answered,
            "model": pin_key(recipe, prepared.tokenizer_hash)}  # fmt: skip
    write_json(desk.home.program(recipe.name) / "pinned.json", pins)


def _choose(job: Job) -> None:
    if job.part is not None and job.until == "scaling":
        job.program = with_known_choices(job.desk.home, job.program)
        return
    if job.part is not None:
        job.trials = train_part(job.desk, job.program, job.part)
        return
    job.program = choose(job.desk, job.program)


def _seal(job: Job) -> None:
    if job.part is not None:
        job.trials = train_scaling_part(job.desk, job.program, job.part)
        return
    job.sealed = seal_forecasts(job.desk, job.program)


def _limits(job: Job) -> None:
    """Stops before the big run if the forecast exceeds a limit that the recipe sets."""
    recipe, sealed = job.program.recipe, job.sealed
    remaining = remaining_cost(job.desk, job.program)
    job.desk.screen.console.print(forecast_view(job.program, sealed, remaining))
    problems = []
    bits = sealed[0]["forecast"]["expected"]["value"] / LN2
    if recipe.max_loss is not None and bits > recipe.max_loss:
        problems.append(f"expected loss {bits:.4f} bits per byte > max_loss {recipe.max_loss:g}")
    if recipe.max_hours is not None and remaining.seconds / 3600 > recipe.max_hours:
        problems.append(f"expected time {duration(remaining.seconds)} > max_hours {recipe.max_hours:g}")
    if recipe.max_cost is not None and remaining.money is not None and remaining.money > recipe.max_cost:
        problems.append(f"expected cost {remaining.money:.2f} > max_cost {recipe.max_cost:g}")
    if problems and remaining.seconds != 0:  # not even an unknown time lets it through
        raise LimitReached(
            f"stopped before the trunk: {'; '.join(problems)}; raise the limit to go on, nothing is lost"
        )


def _trunk(job: Job) -> None:
    """The stable run. A finish request ends it at its next step; shorter tokens branch from the nearest checkpoint."""
    desk, program = job.desk, job.program
    assert program.prepared is not None
    request = desk.home.program(program.name) / FINISH
    stage = program.trunk()
    folder = desk.run_folder(stage)
    job.trunk_end = finished_at(request, folder, program.trunk_steps)
    if job.trunk_end is not None:
        stage = program.trunk(job.trunk_end)
    elif request.is_file():  # it was about another trunk, or about fewer tokens than are asked for now
        request.unlink()
    stage = as_far_as_trained(folder, stage)
    results = desk.train("trunk: the stable run", "", [stage], program.prepared, large=True, finish=request)
    desk.need_all([stage], results)
    if request.is_file():
        job.trunk_end = results[stage.key]["step"]
        write_json(request, {"step": job.trunk_end, "trunk": stage.folder_name, "asked": program.trunk_steps})


def finished_at(request: Path, trunk: Path, asked: int) -> int | None:
    """The step at which a finish request ends this trunk: recorded, or its newest checkpoint; None without a request.

    A request that was carried out counts as long as the recipe asks for no more than it did then.
    """
    if not request.is_file():
        return None
    recorded = read_json(request)
    if recorded.get("trunk") not in (None, trunk.name) or recorded.get("asked", asked) < asked:
        return None
    saved = steps_saved(trunk)
    return recorded.get("step") or (saved[-1] if saved else None)


def branch_stages(job: Job) -> list[Stage]:
    """The branches, each from the checkpoint at its branch point, or from the nearest earlier one that exists."""
    program = job.program
    out: dict[str, Stage] = {}
    trunk_stage = program.trunk(job.trunk_end)
    trunk = job.desk.run_folder(trunk_stage)
    saved = steps_saved(trunk)
    names = list(program.recipe.branch)
    if job.until in names:
        names = names[: names.index(job.until) + 1]
        needed = program.recipe.line_of(job.until)
        names = [name for name in names if name in needed] if job.alone else names
    for name in names:
        if program.recipe.branch[name].kind == "soup":
            out[name] = program.soup(name, out, trunk_stage, saved)
            continue
        if name not in program.recipe.from_trunk:
            out[name] = program.branch(name, parent=out[program.recipe.branch[name].parent])
            continue
        at = job.trunk_end or program.branch_point(name)
        if at not in saved:
            earlier = [step for step in saved if step <= at]
            if not earlier:
                raise WindtunnelError(
                    f"{name}: the trunk has no checkpoint at or before step {at}; delete {trunk.name} to train it anew"
                )
            job.desk.screen.say(f"{name}: branches at step {earlier[-1]}, the nearest checkpoint before {at}")
            at = earlier[-1]
        out[name] = program.branch(name, at)
    return list(out.values())


def _branches(job: Job) -> None:
    """All branches of a generation side by side, then their scores beside the forecast and their first samples."""
    desk, program = job.desk, job.program
    assert program.prepared is not None
    for stages in generations(branch_stages(job)):
        results = desk.train("branches: " + ", ".join(stage.name for stage in stages), "", stages, program.prepared)
        desk.need_all(stages, results)
        for stage in stages:
            _score_forecast(job, stage, results[stage.key])
            _finish_model(job, stage)
            study_beta(desk, program, stage, finishing)


def _score_forecast(job: Job, stage: Stage, result: Result) -> None:
    program, desk = job.program, job.desk
    sealed = next((one for one in job.sealed if one["facts"]["target"] == stage.key), None)
    if sealed is None:
        return
    scored = score(Forecast.from_dict(sealed["forecast"]), mean_loss(result["scores"], program.recipe.mixture))
    with desk.book as book:
        book.put_fact(program.name, "outcome", stage.folder_name, {**scored, "forecast": sealed["hash"]})


def _finish_model(job: Job, stage: Stage) -> None:
    """Samples and task scores of a finished model, once."""
    desk, program, recipe = job.desk, job.program, job.program.recipe
    assert program.prepared is not None
    tasks = {name: str(recipe.base / path) for name, path in recipe.evaluate.tasks.items()}
    known = desk.book.fact(program.name, "model", stage.folder_name)
    answering = answering_job(desk, program, stage)
    if known is not None and set(tasks) <= set(known.get("tasks", {})) and (not answering or "answering" in known):
        return
    template = template_of(recipe.resolved()["corpus"], stage.plan.segments[-1].mixture)
    with desk.screen.console.status(f"{stage.name}: samples and tasks"):
        found = finishing(
            "finish", checkpoint=str(checkpoint_path(desk.run_folder(stage), stage.steps)),
            tokenizer=str(desk.home.root / program.prepared.tokenizer), template=template, tasks=tasks,
            **answering, **({"context": _context_job(job, stage)} if stage.kind == "long" else {}),
        )  # fmt: skip
    if stage.surgery is not None and stage.surgery.drop:
        found["regained"] = facts = _regained(job, stage)
        said = f"loss {facts['own']:.4f} at step {facts['step']:,}, the dense model's was {facts['dense']:.4f}"
        desk.screen.say(f"{stage.name}: after 1 % of its steps {said}")
    with desk.book as book:
        book.put_fact(program.name, "model", stage.folder_name, found)
        for name, task in found["tasks"].items():
            book.put_score(
                desk.run_id(stage),
                name,
                "accuracy",
                task["accuracy"],
                "share",
                task["count"],
                task["low"],
                task["high"],
            )
        if "answering" in found:
            put_answers(book, desk.run_id(stage), found["answering"])
        if "context" in found:
            longer = next(one for one in read_contexts(book, program.name) if one.name == stage.name)
            desk.screen.say(in_short_rows(longer))
    desk.note(stage)


def _regained(job: Job, stage: Stage) -> dict[str, float]:
    desk, parent = job.desk, job.program.trunk(job.trunk_end)
    with desk.book as book:
        return regained(stage, *(book.metrics(desk.run_id(one), "loss") for one in (stage, parent)))


def _context_job(job: Job, stage: Stage) -> dict[str, Any]:
    """What is measured of a longer context, beside the trunk's checkpoint from which it or its first parent grew."""
    desk, program = job.desk, job.program
    assert program.prepared is not None
    context, name = program.recipe.branch[stage.name].context, stage.name
    assert context is not None
    while program.recipe.branch[name].parent != "trunk":
        name = program.recipe.branch[name].parent
    first = next(one for one in branch_stages(job) if one.name == name)
    folders = {name: str(desk.home.root / program.prepared.corpora[name]["folder"]) for name in stage.score}
    return {
        "row": stage.plan.row, "short": program.recipe.model.row, "before": str(desk.parent_checkpoint(first)),
        "corpora": folders, "items": context.items, "tokens": stage.score_tokens,
    }  # fmt: skip


def finishing(verb: str, **job: Any) -> Any:
    """Runs one task that needs torch in a process of its own and returns its JSON answer.

    Raises:
        Stopped: a stop was asked for; the task has left nothing behind and is done anew.
        WindtunnelError: the process failed; its one-line reason and its exit code are kept.
    """
    command = [sys.executable, "-m", "windtunnel.finishing", verb, json.dumps(job)]
    code, out, err = _answered(command)
    if code == 0:
        return json.loads(out.splitlines()[-1])
    lines = err.strip().splitlines() or [f"{verb} failed"]
    error = WindtunnelError(lines[-1])
    error.exit_code = code if code in (1, 2) else 1
    raise error


def _answered(command: list[str]) -> tuple[int, str, str]:
    """Exit code and what a process wrote. It has a session of its own, so that Ctrl-C reaches it through this process alone."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while True:
            try:
                out, err = process.communicate(timeout=_LOOK)
                return process.returncode, out, err
            except subprocess.TimeoutExpired:
                if stop_wanted():
                    raise Stopped("stopped; the same command continues") from None
    except BaseException:
        process.kill()
        process.communicate()
        raise


def _export(job: Job) -> None:
    desk, program = job.desk, job.program
    name = program.recipe.exported
    if name is None or program.prepared is None:
        return
    stage = next(stage for stage in branch_stages(job) if stage.name == name)
    out = desk.home.program(program.name) / "exports" / stage.folder_name
    job_of_it = export_job(desk.book, desk.home, program.name, desk.run_folder(stage), out)
    known = desk.book.fact(program.name, "export", stage.folder_name)
    served = (job_of_it["dynamic_ntk"], job_of_it["template"])
    same = known and (known.get("dynamic_ntk"), known.get("template", "chatml")) == served
    if same and (out / "config.json").is_file():
        return
    with desk.screen.console.status(f"{name}: exporting and checking the export"):
        done = finishing("export", **job_of_it)
    with desk.book as book:
        book.put_fact(
            program.name, "export", stage.folder_name, {**done, "folder": str(out.relative_to(desk.home.root))}
        )


def dynamic_ntk_of(book: Any, program: str, branch: str) -> str | None:
    """How a branch, or the long one that it grew from, wants its positions to reach further in use."""
    branches = (book.fact(program, "recipe", "resolved") or {}).get("branch", {})
    while branch in branches:
        if found := (branches[branch].get("context") or {}).get("dynamic_ntk"):
            return found
        branch = branches[branch].get("parent", "")
    return None


def export_job(book: Any, home: Home, program: str, run: Path, out: Path) -> dict[str, Any]:
    """What the export of a run needs to know."""
    result, stage = read_json(run / RESULT), read_json(run / "stage.json")
    prepared = read_json(home.program(program) / "prepared.json")
    corpora = book.facts(program, "corpus")
    template = template_read(book, f"{program}/{run.name}")
    return {
        "checkpoint": str(checkpoint_path(run, result["step"])), "tokenizer": str(home.root / prepared["tokenizer"]),
        "out": str(out), "name": f"{program}-{stage['name']}",
        "scores": {name: value["bits_per_byte"] for name, value in result["scores"].items()}, "tokens": result["tokens"],
        "chats": template is not None, "template": template or "chatml",
        "dynamic_ntk": dynamic_ntk_of(book, program, stage["name"]),
        "corpora": {name: {"licence": value.get("licence"), "tokens": value["tokens"]} for name, value in corpora.items()},
    }  # fmt: skip


def _report(job: Job) -> None:
    desk, name = job.desk, job.program.name
    write_program_report(desk.book, desk.home.root, name, desk.home.program(name) / "report.html", fit=False)


def _note_change(desk: Desk, recipe: Recipe) -> None:
    """Keeps the resolved recipe; a recipe that changed under a finished run says what differs."""
    from_before = desk.book.fact(recipe.name, "recipe", "resolved")
    now = recipe.resolved()
    if from_before is not None and from_before != now:
        for difference in differences(with_defaults(from_before), now)[:5]:
            desk.screen.say(f"the recipe has changed since the last run: {difference}")
    with desk.book as book:
        book.put_fact(recipe.name, "recipe", "resolved", now)
        book.put_fact(recipe.name, "recipe", "base", str(recipe.base))
