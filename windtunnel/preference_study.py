"""Studies of preference learning: another strength of the pull to the reference, and what programs of other seeds agree on.
Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import UserError
from windtunnel.comparison import find_run, open_book
from windtunnel.desk import Desk
from windtunnel.measures import answering_job
from windtunnel.program import Program
from windtunnel.train.folder import RESULT, checkpoint_path
from windtunnel.train.stage import Stage
from windtunnel.views import View, line, table

EASY = 0.85
"""Above this accuracy before DPO a source leaves too little to gain: it is shown and not counted."""
_ALL = "all that count, each alike"
ENOUGH_POINTS, ENOUGH_SHARE = 0.05, 0.25


def beta_stages(program: Program, stage: Stage) -> list[Stage]:
    """One stage for each β of a branch, its own included."""
    betas = program.recipe.branch[stage.name].betas or ()
    if stage.preference is None or not betas:
        return []
    preference, out = stage.preference, []
    for beta in sorted({*betas, preference.beta}):
        other = replace(stage, name=f"{stage.name}-beta-{beta:g}", preference=replace(preference, beta=beta))
        out.append(stage if beta == preference.beta else other)
    return out


def study_beta(desk: Desk, program: Program, stage: Stage, finishing: Any) -> None:
    """Trains and measures what a branch's ``betas`` ask for, and records it as the study ``beta-BRANCH``; once.

    Raises:
        Stopped: a stop was asked for.
        WindtunnelError: a stage failed.
    """
    stages = beta_stages(program, stage)
    if not stages:
        return
    assert program.prepared is not None
    study = f"beta-{stage.name}"
    others = [one for one in stages if one.key != stage.key]
    desk.need_all(others, desk.train(f"β of '{stage.name}'", study, others, program.prepared))
    known = {row["run"]: row for row in (desk.book.fact(program.name, "study", study) or {"rows": []})["rows"]}
    rows = []
    for one in stages:
        name = one.folder_name
        rows.append(known[name] if name in known else _measured(desk, program, one, finishing))
    with desk.book as book:
        book.put_fact(program.name, "study", study, {"branch": stage.name, "rows": rows})


def _measured(desk: Desk, program: Program, stage: Stage, finishing: Any) -> dict[str, Any]:
    assert stage.preference is not None
    assert program.prepared is not None
    run = desk.run_folder(stage)
    known = desk.book.fact(program.name, "model", stage.folder_name) or {}
    job = answering_job(desk, program, stage)["answering"]
    with desk.screen.console.status(f"{stage.name}: preferences"):
        answering = known.get("answering") or finishing(
            "answering", checkpoint=str(checkpoint_path(run, stage.steps)),
            tokenizer=str(desk.home.root / program.prepared.tokenizer), **job,
        )  # fmt: skip
    scores = {name: score["bits_per_byte"] for name, score in read_json(run / RESULT)["scores"].items()}
    return {
        "beta": stage.preference.beta, "run": stage.folder_name, "bits_per_byte": scores,
        "preferences": answering["preferences"], "divergence": answering["divergence"],
    }  # fmt: skip


def over_seeds(home: Path, runs: Sequence[str]) -> View:
    """What runs of one DPO branch with other seeds gained on held-out pairs, by source, with 95 % intervals over the runs.

    The interval is Student's over runs, so it needs three of them to say much; with one there is none.

    Args:
        runs: PROGRAM/BRANCH, or PROGRAM for the only branch of it that learnt from pairs.

    Raises:
        UserError: a run that was not measured on pairs, or runs on other sources.
    """
    found = [_preferences_of(home, name) for name in runs]
    sources = list(found[0])
    if any(list(one) != sources for one in found):
        problem = "expected runs on the same sources of pairs, got others"
        raise UserError("model preferences", problem, "name one branch of each program")
    data = [_over_runs(source, [one[source] for one in found]) for source in sources]
    counted = [row["source"] for row in data if row["counts"]]
    whole = _over_runs(_ALL, [_mean_of([one[source] for source in counted]) for one in found]) if counted else None
    rows = [
        (
            row["source"], f"{100 * row['before']:.1f} %", f"{100 * row['after']:.1f} %",
            f"{100 * row['gain']:+.1f}" + (f" ± {100 * row['half']:.1f}" if row["half"] is not None else ""),
            f"{100 * row['of_error']:+.0f} %", f"{row['pairs']:,}", row["verdict"],
        )
        for row in (*data, *([whole] if whole else []))
    ]  # fmt: skip
    columns = ("held-out pairs", "before", "after", "gain, points", "of the error", "pairs", "")
    note = (
        f"{len(found)} run{'s' if len(found) > 1 else ''}; ± is half of Student's 95 % interval over runs. Learnt: "
        f"{100 * ENOUGH_POINTS:.0f} points or {100 * ENOUGH_SHARE:.0f} % of the remaining error, the interval above zero."
    )
    return View(
        {"runs": list(runs), "sources": data, "all": whole}, (table(columns, rows, right=(1, 2, 3, 4, 5)), line(note))
    )


def _mean_of(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run's sources together, each counting alike."""
    count = sum(both["after"]["count"] for both in sources)
    return {
        when: {"accuracy": fmean(both[when]["accuracy"] for both in sources), "count": count}
        for when in ("before", "after")
    }


def _over_runs(source: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One source over all runs: accuracy before and after, gain, and what that says."""
    before, after = ([one[when]["accuracy"] for one in found] for when in ("before", "after"))
    gain, half = _interval([b - a for a, b in zip(before, after, strict=True)])
    row = {
        "source": source, "before": fmean(before), "after": fmean(after), "gain": gain, "half": half,
        "of_error": gain / max(1e-9, 1 - fmean(before)), "counts": fmean(before) <= EASY, "pairs": found[0]["after"]["count"],
    }  # fmt: skip
    return {**row, "verdict": _verdict(row)}


def _preferences_of(home: Path, name: str) -> dict[str, Any]:
    book = open_book(home)
    measured = {
        run: fact["answering"]["preferences"]
        for run, fact in (book.facts(name, "model") if name in book.programs() else {}).items()
        if fact.get("answering", {}).get("preferences") and (book.run(f"{name}/{run}") or {}).get("kind") == "dpo"
    }
    if len(measured) == 1:
        return next(iter(measured.values()))
    if measured:
        choices = " or ".join(f"{name}/{run.rpartition('-')[0]}" for run in measured)
        problem = f"'{name}' has {len(measured)} branches that learnt from pairs"
        raise UserError("model preferences", problem, f"write {choices}")
    row = find_run(book, name)
    fact = book.fact(row["program"], "model", Path(row["folder"]).name) or {}
    if not fact.get("answering", {}).get("preferences"):
        problem = f"expected a run that learnt from pairs, got {row['name']!r}"
        raise UserError("model preferences", problem, "see: windtunnel model tree")
    return fact["answering"]["preferences"]


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of Student's 95 % interval; None for a single value."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _verdict(row: dict[str, Any]) -> str:
    if not row["counts"]:
        return "too easy before"
    enough = row["gain"] >= ENOUGH_POINTS or row["of_error"] >= ENOUGH_SHARE
    sure = row["half"] is not None and row["gain"] > row["half"]
    return "learnt" if enough and sure else "not learnt" if row["half"] is not None else "cannot tell"
