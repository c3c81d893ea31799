"""The verb ``law decide``: which of two arms of a home is better, with thresholds kept since its first look. Needs no torch.

An arm is a run and all runs of the home that differ from it in nothing but the seed. Thresholds, looks and what they said are
a fact of the first arm's program: later calls keep to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.comparison import find_run, open_book
from windtunnel.home import Home, keep_fact
from windtunnel.laws.decision import Decision, SeedNoise, Thresholds, decide, noise_at, registry
from windtunnel.model.shape import Shape
from windtunnel.report.decisions import (
    ARM_COLUMNS,
    DECISION,
    arm_rows,
    look_lines,
    noise_line,
    power_lines,
    terms_line,
    turned,
    turned_outcome,
    verdict_line,
)
from windtunnel.views import View, line, table

Row = Mapping[str, Any]
_NEW = {"looks": [], "decided": False}


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only: program and name of the run that was asked for, identity, N, seed to loss."""

    program: str
    name: str
    key: str
    size: int
    losses: dict[int, float]


def seedless(config: Row) -> str:
    """The identity of a run without its seeds, its name and what is only kept of it."""
    start, plan = config["start"], config["plan"]
    kept = ("kind", "shape", "parametrization", "optimizer", "schedule", "batch", "steps", "objective", "masking", "corpora",
            "preference", "lr_by_role")  # fmt: skip
    return content_hash([
        {key: config.get(key) for key in kept}, {key: value for key, value in plan.items() if key != "seed"},
        None if start is None else {key: value for key, value in start.items() if key != "stage"},
    ])  # fmt: skip


def decide_between(
    home: Path, a: str, b: str, *, least: float | None = None, alpha: float | None = None, corpus: str | None = None,
) -> View:  # fmt: skip
    """One look at two arms of a home.

    Args:
        least: the least relative difference of loss that matters; fixed by the first look (default .5 %).
        alpha: the share of false picks over all looks; fixed by the first look (default 5 %).
        corpus: the held-out corpus that counts; by default the mean of those on which all runs are scored.

    Raises:
        UserError: an arm is unknown, both are the same, no corpus is common, or other thresholds were fixed before.
    """
    open_book(home).close()  # says so where there is no home, and makes none
    book = LabBook(Home(home).labbook)
    rows = [find_run(book, name) for name in (a, b)]
    done = [row for row in book.runs(status="done") if book.scores(row["id"])]
    shared = _corpora(book, rows, done, corpus)
    arms = [_arm(book, row, done, shared) for row in rows]
    if arms[0].key == arms[1].key:
        raise UserError(
            "decide", f"expected two recipes, got one: {a[:60]!r} and {b[:60]!r} differ in their seeds only"
        )
    for arm in arms:
        if not arm.losses:
            problem = f"expected finished runs with scores on {', '.join(shared)}, {arm.name} has none"
            raise UserError("decide", problem, f"windtunnel eval {arm.name}, or choose a branch that is scored")
    swapped = arms[0].key > arms[1].key
    name = "-".join(sorted(arm.key[:12] for arm in arms)) + "-" + "+".join(shared)
    known = registry(_groups(book, done, shared))
    noise = noise_at(known, max(arm.size for arm in arms))
    program = str(rows[0]["program"] if not swapped else rows[1]["program"])
    kept = book.fact(program, DECISION, name)
    fact = kept or {**_NEW, **_fixed(least, alpha)}
    book.close()
    _same_thresholds(fact, least, alpha)
    thresholds = Thresholds(fact["least"], fact["alpha"])
    pairs = sorted(set(arms[0].losses) & set(arms[1].losses))
    asked = {**_described(arms[::-1] if swapped else arms, noise), "corpora": shared, "swapped": swapped}
    if fact["looks"] and (fact["looks"][-1]["seeds"] == pairs or fact["decided"]):
        # Nothing new to look at, or it is decided: what was said stands, whatever the registry has learnt since.
        found = _recorded(fact["looks"][-1], len(fact["looks"]), thresholds, swapped)
        last = {"noise": asked.pop("noise"), **fact["looks"][-1]}
        fact = {**asked, **fact, "looks": [*fact["looks"][:-1], last]}
    else:
        found = decide(arms[0].losses, arms[1].losses, thresholds, noise=noise, look=len(fact["looks"]) + 1)
        look = {**_record(found, pairs, swapped), "noise": asked.pop("noise")}
        fact = {**fact, **asked, "looks": [*fact["looks"], look], "decided": found.outcome != "more"}
    if fact != kept:
        keep_fact(home, program, DECISION, name, fact)
    return _view(arms, found, known, turned(fact, swapped))


def _described(arms: Sequence[Arm], noise: SeedNoise | None) -> dict[str, Any]:
    """What a look saw, as it is kept."""
    return {
        "arms": [
            {
                "program": arm.program, "name": arm.name, "size": arm.size,
                "losses": {str(seed): loss for seed, loss in sorted(arm.losses.items())},
            }
            for arm in arms
        ],
        "noise": noise and {"sd": noise.sd, "freedom": noise.freedom, "source": noise.source},
    }  # fmt: skip


def _record(found: Decision, seeds: list[int], swapped: bool) -> dict[str, Any]:
    """A look as it is kept: with the arms in the order of their identities; what is not known yet is null."""
    kept = {key: getattr(found, key) for key in ("half_width", "sd", "freedom", "more")}
    kept = {key: value if math.isfinite(value) else None for key, value in kept.items()}
    return {
        "seeds": seeds,
        "outcome": turned_outcome(found.outcome) if swapped else found.outcome,
        "mean": -found.mean if swapped else found.mean,
        **kept,
    }


def _recorded(look: Row, number: int, thresholds: Thresholds, swapped: bool) -> Decision:
    return Decision(
        turned_outcome(look["outcome"]) if swapped else look["outcome"], number, len(look["seeds"]),
        -look["mean"] if swapped else look["mean"],
        math.inf if look["half_width"] is None else look["half_width"], math.nan if look["sd"] is None else look["sd"],
        look["freedom"], look["more"], thresholds,
    )  # fmt: skip


def _fixed(least: float | None, alpha: float | None) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    chosen = Thresholds(0.005 if least is None else least, 0.05 if alpha is None else alpha)
    return {"least": chosen.least, "alpha": chosen.alpha, "fixed": now}


def _same_thresholds(fact: Row, least: float | None, alpha: float | None) -> None:
    for what, asked in (("least", least), ("alpha", alpha)):
        if asked is not None and asked != fact[what]:
            raise UserError(
                f"--{what}", f"{100 * fact[what]:g} % was fixed for this decision on {fact['fixed']}, got {100 * asked:g} %",
                "leave it out; thresholds that follow the results make no decision",
            )  # fmt: skip


def _corpora(book: LabBook, rows: Sequence[Row], done: Sequence[Row], corpus: str | None) -> list[str]:
    """Held-out corpora that count: the one asked for, or those on which every run of both arms is scored."""
    keys = {seedless(row["config"]) for row in rows}
    several = [_losses(book, row) for row in done if seedless(row["config"]) in keys]
    common = set[str].intersection(*(set(one) for one in several)) if several else set[str]()
    if corpus is not None and corpus not in common:
        raise UserError("--corpus", f"expected one of {', '.join(sorted(common)) or 'none'}, got {corpus[:60]!r}")
    if not common:
        names = " and ".join(row["name"] for row in rows)
        raise UserError(
            "decide", f"expected held-out scores of {names} on one corpus, found none", "windtunnel eval RUN"
        )
    return [corpus] if corpus is not None else sorted(common)


def _losses(book: LabBook, row: Row) -> dict[str, float]:
    return {s["corpus"]: s["value"] for s in book.scores(row["id"]) if s["name"] == "nats_per_byte"}


def _loss(book: LabBook, row: Row, corpora: Sequence[str]) -> float | None:
    """Mean nats per byte on some corpora, or None where one is missing."""
    found = _losses(book, row)
    return sum(found[c] for c in corpora) / len(corpora) if set(corpora) <= set(found) else None


def _arm(book: LabBook, row: Row, done: Sequence[Row], corpora: Sequence[str]) -> Arm:
    key = seedless(row["config"])
    losses: dict[int, float] = {}
    for one in done:
        loss = _loss(book, one, corpora)
        if seedless(one["config"]) == key and loss is not None:
            losses[int(one["config"]["seed"])] = loss
    return Arm(
        str(row["program"]), f"{row['program']}/{row['name']}", key, Shape(**row["config"]["shape"]).body, losses
    )


def _groups(book: LabBook, done: Sequence[Row], corpora: Sequence[str]) -> dict[float, list[list[float]]]:
    """All runs of the home, by size, those that differ in their seeds only together."""
    groups: dict[tuple[int, str], dict[int, float]] = {}
    for row in done:
        loss = _loss(book, row, corpora)
        if loss is not None and math.isfinite(loss):
            key = (Shape(**row["config"]["shape"]).body, seedless(row["config"]))
            groups.setdefault(key, {})[int(row["config"]["seed"])] = loss
    found: dict[float, list[list[float]]] = {}
    for (size, _), losses in groups.items():
        if len(losses) > 1:
            found.setdefault(float(size), []).append(list(losses.values()))
    return found


def _view(arms: Sequence[Arm], found: Decision, known: Mapping[float, SeedNoise], fact: Row) -> View:
    """A decision as it is kept, its arms under the names by which they were asked for."""
    said = [{**old, "name": arm.name} for old, arm in zip(fact["arms"], arms, strict=True)]
    shown = {**fact, "arms": said}
    since = [len(arm.losses) - len(one["losses"]) for arm, one in zip(arms, said, strict=True)]
    parts = [
        table(ARM_COLUMNS, arm_rows(shown), right=(2, 3)),
        line(terms_line(shown)),
        line(noise_line(shown)),
        *map(line, look_lines(shown)),
        line(verdict_line(shown), "bold"),
        *map(line, power_lines(shown)),
    ]
    if any(since):
        parts.append(line(f"trained since and no part of this look: {since[0]} of A, {since[1]} of B"))
    data = {
        **found.to_dict(), "arms": [{"name": one["name"], "losses": one["losses"]} for one in said],
        "corpora": fact["corpora"], "fixed": fact["fixed"],
        "registry": {si(size): {"sd": n.sd, "freedom": n.freedom} for size, n in known.items()},
    }  # fmt: skip
    if not math.isfinite(found.half_width):
        data |= {"interval": None, "sd": None}
    return View(data, tuple(parts))
