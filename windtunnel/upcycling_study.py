"""``windtunnel model upcycling``: does an upcycled mixture of experts pay, beside the same dense model that just goes on?

Both continue from the same stable checkpoint of each seed. The experts' branch is compared with dense branches that have read as
many tokens, computed as many exact FLOPs, and taken as many seconds, and the lead over several lengths is carried on to where it
turns. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from windtunnel.base.artefact import content_hash, read_json, write_bytes, write_json
from windtunnel.base.errors import ArtefactError
from windtunnel.desk import Desk, Result
from windtunnel.home import Home
from windtunnel.laws.break_even import break_even
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.report.cost import cost_line, cost_of, target_flops
from windtunnel.report.experts import read_loads
from windtunnel.report.upcycling import (
    lead_figure,
    length_columns,
    length_rows,
    notes,
    upcycling_columns,
    upcycling_rows,
    upcycling_title,
    verdicts,
)
from windtunnel.study import mean_loss
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.audit import Estimate
from windtunnel.tunnel.packing import measure_in_turns
from windtunnel.upcycling_design import AXES, WORD, Axis, Continuation, Design, Seed, both, dense_twin, moe_branch
from windtunnel.views import View, line, table

Losses = dict[int, list[float | None]]
"""Length in updates → nats per byte, one a seed; None where a run failed."""
_SIDES = ("dense", "experts")


def upcycling(
    recipe: Recipe, home: Path, *, branch: str | None = None, seeds: int = 3, out: Path | None = None,
    devices: str | None = None, quiet: bool = False,
) -> View:  # fmt: skip
    """Trains both continuations of each seed's trunk and says which ends lower at equal tokens, FLOPs and seconds.

    Args:
        branch: of kind moe; needed where the recipe has several.
        seeds: each with weights and data order of its own.
        out: the SVG file; without it, studies/upcycling.svg in the program's folder.

    Raises:
        UserError: the recipe has no such branch, or it is too short.
        Stopped: a stop was asked for; the same command continues.
    """
    name = moe_branch(recipe, branch)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        assert program.prepared is not None
        speeds = _speeds(desk, program, name)
        design = Design.of(program, name, (speeds["dense"], speeds["experts"]))
        mixture = dict(design.whole.plan.segments[-1].mixture)
        made = [design.seed(program, name, i + 1, (*recipe.evaluated, *mixture)) for i in range(seeds)]
        stages = [one.trunk for one in made]
        stages += [side.stable for one in made for side in (one.experts, one.dense)]
        stages += [stage for one in made for side in (one.experts, one.dense) for stage in side.decays.values()]
        results = desk.train(f"{WORD}: {len(stages)} runs", WORD, stages, program.prepared)
        desk.need_all([one.trunk for one in made], results)
        fact = {
            **_setting(program, name, design, made, speeds), **_judged(design, made, results, mixture),
            **_taken(desk, design, made, results), "cost": cost_of(stages, results, target_flops(desk.book, program.name)),
        }  # fmt: skip
        studies = desk.home.program(recipe.name) / "studies"
        target = out or studies / f"{WORD}.svg"
        write_bytes(target, lead_figure(fact, alone=True).encode())
        write_json(studies / f"{WORD}-{fact['key'][:12]}.json", fact)
        with desk.book as book:
            book.put_fact(recipe.name, WORD, fact["key"][:12], fact)
    columns, lengths = upcycling_columns(), length_columns()
    parts = (
        table(columns, upcycling_rows(fact), title=upcycling_title(fact), right=(1, 2, 3, 4)),
        table(lengths, length_rows(fact), title="the experts' lead at each of their lengths", right=(0, 1, 2, 3)),
        *(line(text) for text in (*verdicts(fact), *notes(fact))),
        line(f"{cost_line(fact['cost'])}; the figure is {target}", "dim"),
    )
    return View({"program": recipe.name, "figure": str(target), **fact}, parts)


def _speeds(desk: Desk, program: Program, branch: str) -> dict[str, Any]:
    """Tokens a second of both sides on this machine, measured in turns before anything is trained, once: a study that is resumed
    keeps its lengths."""
    trunk, whole = both(program, branch)
    stages = [dense_twin(whole, trunk), whole]
    identity = [[s.shape.to_dict(), s.step_tokens, s.plan.row, s.masking] for s in stages]
    device = desk.machine.device
    file = desk.home.program(program.name) / "studies" / f"{WORD}-speeds-{content_hash([identity, device])[:12]}.json"
    try:
        return read_json(file)
    except ArtefactError:
        pass
    with desk.screen.console.status(f"{WORD}: measuring how fast both sides train"):
        rounds = measure_in_turns(stages, device)
    dense, experts = (median(one[i] for one in rounds) for i in range(2))
    ratios = [one[0] / one[1] for one in rounds]
    found = {
        "dense": dense, "experts": experts, "ratio": [min(ratios), max(ratios)], "rounds": len(rounds), "device": device or "cpu",
    }  # fmt: skip
    write_json(file, found)
    return found


def _setting(
    program: Program, branch: str, design: Design, made: Sequence[Seed], speeds: Mapping[str, Any]
) -> dict[str, Any]:
    """What was trained, as JSON."""
    whole, trunk = design.whole, design.trunk
    stages = [stage for one in made for side in (one.experts, one.dense) for stage in side.decays.values()]
    rows = program.prepared.rows(program.recipe.model.row) if program.prepared else {}
    longest = made[0].dense.decays[design.dense_lengths[-1]]
    read = longest.plan.epochs(rows, longest.batches.sequences(longest.steps))
    return {
        "key": content_hash([stage.key for stage in stages]), "branch": branch, "experts": whole.shape.experts,
        "top_k": whole.shape.top_k, "drop": whole.surgery.drop if whole.surgery else 0.0,
        "parameters": {"dense": trunk.shape.body, "experts": whole.shape.body, "active": whole.shape.active},
        "from_tokens": trunk.tokens, "tokens": whole.own_tokens, "step_tokens": whole.step_tokens,
        "decay": whole.schedule.decay_steps / whole.own_steps, "seeds": [one.trunk.seed for one in made],
        "flops_per_token": {
            side: stage.shape.flops_per_token(stage.plan.row).total for side, stage in zip(_SIDES, (trunk, whole), strict=True)
        },
        "speeds": dict(speeds), "most_read": max(read.values(), default=0.0),
    }  # fmt: skip


def _judged(
    design: Design, made: Sequence[Seed], results: Mapping[str, Result], mixture: Mapping[str, float]
) -> dict[str, Any]:
    """Losses of both sides, the lead of the experts on each axis at their longest, its course and break-even, as JSON."""
    experts, dense = (_losses([getattr(one, side) for one in made], results, mixture) for side in ("experts", "dense"))
    step, last = design.whole.step_tokens, design.lengths[-1]
    axes = []
    for axis in AXES:
        steps = design.dense_steps(axis, last)
        rows = _leads(design, axis, experts, dense)
        lead = Estimate.of([row[-1] for row in rows]) if rows else None
        tokens = [n * step for n in design.lengths]
        turn = break_even(tokens, rows) if rows else None
        recent = break_even(tokens[-2:], [row[-2:] for row in rows]) if rows else None
        axes.append({
            "axis": axis, "dense_tokens": steps * step, "ratio": design.ratios[axis],
            "dense": _mean(dense[steps]), "experts": _mean(experts[last]), "lead": lead.to_dict() if lead else None,
            "verdict": _verdict(lead), "seeds": [row[-1] for row in rows],
            "course": [Estimate.of(column).to_dict() for column in zip(*rows, strict=True)],
            "break_even": turn.to_dict() if turn else None, "by_last_two": recent.to_dict() if recent else None,
        })  # fmt: skip
    return {
        "axes": axes, "lengths": [n * step for n in design.lengths],
        "losses": {"experts": _curve(experts, step), "dense": _curve(dense, step)}, "on": dict(mixture),
    }  # fmt: skip


def _losses(sides: Sequence[Continuation], results: Mapping[str, Result], mixture: Mapping[str, float]) -> Losses:
    return {
        n: [
            None if "failed" in (r := results[side.decays[n].key]) else mean_loss(r["scores"], mixture)
            for side in sides
        ]
        for n in sorted(sides[0].decays)
    }


def _leads(design: Design, axis: Axis, experts: Losses, dense: Losses) -> list[list[float]]:
    """[seed][length]: how much lower the experts end than a dense branch of equal cost, in percent; nothing if a run failed.

    Between two dense lengths the loss is a straight line over the logarithm of the length; at the experts' longest a branch of
    just that length was trained.
    """
    if any(loss is None for row in (*experts.values(), *dense.values()) for loss in row):
        return []
    at, lengths = np.log([design.dense_steps(axis, n) for n in design.lengths]), np.log(list(dense))
    out = []
    for seed in range(len(next(iter(dense.values())))):
        rival = np.interp(at, lengths, np.array([row[seed] for row in dense.values()], float))
        own = np.array([experts[n][seed] for n in design.lengths], float)
        out.append([float(lead) for lead in 100 * (1 - own / rival)])
    return out


def _verdict(lead: Estimate | None) -> str:
    if lead is None:
        return "cannot tell: a run failed"
    if lead.low is None or lead.high is None:
        return "cannot tell from one seed"
    return "the experts end lower" if lead.low > 0 else "dense ends lower" if lead.high < 0 else "cannot tell"


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if len(known) == len(losses) else None


def _curve(losses: Losses, step: int) -> list[dict[str, Any]]:
    return [{"tokens": n * step, "losses": row, "mean": _mean(row)} for n, row in losses.items()]


def _taken(desk: Desk, design: Design, made: Sequence[Seed], results: Mapping[str, Result]) -> dict[str, Any]:
    """Where the tokens went, by seed, and what the training steps really took, as JSON."""
    last = design.lengths[-1]
    chains = [[desk.run_id(one.experts.stable), desk.run_id(one.experts.decays[last])] for one in made]
    rows = [row for chain in chains if (row := desk.book.run(chain[-1])) is not None]
    loads = [
        {"uneven": uneven, "busiest": busiest}
        for one in read_loads(desk.book, rows)
        for uneven, busiest in [one.at_end]
    ]
    speeds = {side: _speed([s for one in made for s in getattr(one, side).stages], results) for side in _SIDES}
    return {"loads": loads, "chains": chains, "trained_speeds": speeds}


def _speed(stages: Sequence[Stage], results: Mapping[str, Result]) -> float | None:
    """Tokens a second over the training steps of finished runs."""
    done = [(stage, results[stage.key]) for stage in stages if "failed" not in results[stage.key]]
    seconds = sum(result.get("seconds", {}).get("step", 0.0) for _, result in done)
    return sum(stage.own_tokens for stage, _ in done) / seconds if seconds else None
