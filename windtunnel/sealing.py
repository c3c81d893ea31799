"""The scaling study of a program, its law, and the forecasts that are sealed before the trunk trains. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import content_hash
from windtunnel.base.labbook import LabBook
from windtunnel.blindness import kind_of, read_all
from windtunnel.desk import Desk
from windtunnel.laws.forecast import forecast, unlike_setting
from windtunnel.laws.points import Point
from windtunnel.laws.sealed import LAW, SEALED, Forecast, freeze, read_forecast
from windtunnel.program import Program
from windtunnel.study import mean_loss
from windtunnel.train.stage import Stage
from windtunnel.tunnel.scaling import ScalingRun

AVERAGE = "average"
"""Name of the loss that the forecast is about: nats per byte on the trunk's held-out parts, weighted by its mixture."""


def measure_law(desk: Desk, program: Program) -> dict[str, list[Point]]:
    """Trains the scaling study and returns its points: for the average and for each corpus of the trunk's mixture."""
    assert program.prepared is not None
    runs = program.scaling()
    branches = [branch for run in runs for _, branch in run.branches]
    stages = [run.trunk for run in runs] + branches
    results = desk.train("scaling: trunks and branches of the proxies", "scaling", stages, program.prepared)
    desk.need_all([run.trunk for run in runs], results)
    mixture = program.recipe.mixture
    points: dict[str, list[Point]] = {AVERAGE: [], **{name: [] for name in mixture}}
    for run in runs:
        for tokens, branch in run.branches:
            result = results[branch.key]
            if "failed" in result:
                desk.screen.say(f"{branch.name}: {result['failed']}; the law is fitted without it")
                continue
            base = {
                "parameters": branch.shape.body,
                "tokens": tokens,
                "cluster": run.trunk.folder_name,
                "seed": branch.seed,
            }
            points[AVERAGE].append(Point(**base, loss=mean_loss(result["scores"], mixture)))
            for name in mixture:
                score = result["scores"][name]
                points[name].append(Point(**base, loss=score["nats"] / score["bytes"]))
    return points


def seal_forecasts(desk: Desk, program: Program) -> list[dict[str, Any]]:
    """Fits the law, forecasts the target and freezes a forecast of each of its plain decays as a file, before its trunk trains.

    Returns the files' contents with their hashes, the longest run first. A forecast of the same run from the same proxies is
    made once.
    """
    points = measure_law(desk, program)
    with desk.book as book:
        book.put_fact(
            program.name, "points", AVERAGE, {name: [p.to_dict() for p in part] for name, part in points.items()}
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [_sealed(desk, program, points, program.branch(name), now) for name in forecast_branches(program)]


def forecast_branches(program: Program) -> list[str]:
    """The branches that a forecast is made for, the longest run first: decays on the trunk's own data by the proxies' rule.

    A law of decayed proxies speaks for runs that end as they did: same form, floor and share of all tokens as written, to a
    step or 1 %, since rounded to steps the branches of a short and of a long run may differ by more.
    """
    found: list[tuple[int, str]] = []
    recipe, rule = program.recipe, program.decay()
    for name in recipe.decays:
        if recipe.branch[name].mixture in (None, recipe.trunk.mixture):
            stage = program.branch(name)
            own = (stage.schedule.form, stage.schedule.floor, stage.schedule.half_life)
            off = abs(program.decay_share(name) - rule.share) * stage.tokens
            if own == (rule.form, rule.floor, rule.half_life) and off <= max(
                stage.step_tokens, 0.01 * stage.own_tokens
            ):
                found.append((stage.tokens, name))
    return [name for _, name in sorted(found, key=lambda pair: -pair[0])]


def _sealed(
    desk: Desk, program: Program, points: Mapping[str, Sequence[Point]], branch: Stage, now: str
) -> dict[str, Any]:
    """The forecast of one branch, sealed now unless there is a file of it; its content with its hash."""
    shape, recipe = program.shape, program.recipe
    runs = sorted(run.trunk.key for run in program.scaling())
    # Branches of the proxies are told by their rule where it is not that of the whole run: earlier seals have no such entry.
    first = recipe.forecast_branch
    rule = [program.decay().share] if recipe.trunk.batch_schedule or (first and recipe.branch[first].at) else []
    identity = content_hash([branch.key, runs, list(recipe.tunnel.forms) if recipe.tunnel else [], *rule])
    path = desk.home.program(program.name) / "forecasts" / f"{branch.name}-{identity[:12]}.json"
    if not path.is_file():
        forms = tuple(recipe.tunnel.forms) if recipe.tunnel else ()
        made = {name: forecast(part, shape.body, branch.tokens, forms=forms) for name, part in points.items()}
        proxies = [(run.trunk.step_tokens, run.trunk.optimizer.learning_rate) for run in program.scaling()]
        unlike = unlike_setting(branch.step_tokens, branch.optimizer.learning_rate, proxies)
        made[AVERAGE] = replace(made[AVERAGE], warnings=(*made[AVERAGE].warnings, *unlike))
        about = f"the decay of '{branch.name}' on the trunk's own data, its last {branch.own_steps} steps"
        by_corpus = {name: part.to_dict() for name, part in made.items() if name != AVERAGE}
        facts = forecast_facts(desk, program, branch, _read(program.scaling(), points[AVERAGE]), made[AVERAGE], about)
        freeze(made[AVERAGE], path, {**facts, "time": now, "per_corpus": by_corpus})
    sealed = read_forecast(path)
    content = {"hash": sealed.hash, "facts": sealed.facts, "forecast": sealed.forecast.to_dict()}
    with desk.book as book:
        keep(book, program.name, LAW, branch.folder_name, content)
    return content


def keep(book: LabBook, program: str, kind: str, run: str, content: Mapping[str, Any]) -> None:
    """Copies a sealed forecast of a run (by its folder's name) into the lab book. A blind one that comes up after its
    run began is left out: it was not there when it had to be."""
    begun = any(Path(row["folder"]).name == run for row in book.runs(program=program))
    blind = content["facts"]["kind"] == "blind"
    if blind and begun and content["hash"] not in book.facts(program, SEALED):
        return
    book.put_fact(program, kind, run, content)
    book.put_fact(program, SEALED, content["hash"], {"time": content["facts"].get("time", ""), "run": run})


def _read(runs: Sequence[ScalingRun], points: Sequence[Point]) -> list[str]:
    """Keys of the trunks and of the branches whose losses became points."""
    ends = {(point.cluster, point.tokens) for point in points}
    branches = [
        branch.key for run in runs for tokens, branch in run.branches if (run.trunk.folder_name, tokens) in ends
    ]
    return sorted([*(run.trunk.key for run in runs), *branches])


def forecast_facts(
    desk: Desk, program: Program, stage: Stage, runs: Sequence[str], said: Forecast, about: str
) -> dict[str, Any]:
    """What a forecast's file says beside the numbers.

    Args:
        stage: the run that the forecast is about.
        runs: keys of the runs that it read.
        about: one sentence that says what the run is.
    """
    assert program.prepared is not None
    earlier = read_all(desk.home.program(program.name) / "forecasts")
    return {
        "program": program.name, "branch": stage.name, "target": stage.key,
        "trunk": stage.start.stage if stage.start else "",
        "kind": kind_of(desk.book, stage, said, earlier), "branch_is": about,
        "corpus": dict(stage.corpora), "mixture": program.recipe.mixture, "heldout": {
            name: {"tokens": program.prepared.corpora[name]["heldout_tokens"], "limit": stage.score_tokens}
            for name in program.recipe.mixture},
        "unit": "nats per UTF-8 byte", "loss": "held-out loss of the trunk's corpora, weighted by its mixture",
        "tokens_with_decay": stage.tokens, "batch": stage.step_tokens,
        "base_lr": stage.optimizer.learning_rate, "seed": stage.seed, "runs": list(runs),
        **({"batch_changes": [list(change) for change in stage.batch_changes]} if stage.batch_changes else {}),
    }  # fmt: skip
