"""What a run has to say at its two ends: the forecast before the big run, and the outcome after it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import ArtefactError
from windtunnel.base.units import bytes_size, duration, si
from windtunnel.desk import Desk
from windtunnel.planning import cost_lines
from windtunnel.program import Program
from windtunnel.train.folder import RESULT, read_result
from windtunnel.train.stage import FINISHED
from windtunnel.views import View, line, table

LN2 = math.log(2)


@dataclass(frozen=True)
class Remaining:
    """What the big run still costs: seconds, where that comes from, money if there is a price, bytes of checkpoints."""

    seconds: float
    source: str
    money: float | None
    disk: float


def remaining_cost(desk: Desk, program: Program) -> Remaining:
    """Time and money for the target's trunk and branches, from the measured speed of the largest proxy."""
    stages = [program.trunk(), *(program.branch(name) for name in program.recipe.branch)]
    left = [stage for stage in stages if read_result(desk.run_folder(stage), stage) is None]
    speed, source = _proxy_speed(desk, program)
    machine = program.recipe.machine
    if machine is not None and machine.tflops is not None:
        speed, source = machine.count * machine.tflops * 1e12, "[machine]"
        seconds = sum(stage.flops for stage in left) / speed
    else:
        trunk = sum(stage.flops for stage in left if stage.kind == "trunk")
        branches = [stage.flops for stage in left if stage.kind != "trunk"]
        together = max([sum(branches) / desk.machine.workers, *branches]) if branches else 0.0
        seconds = (trunk / desk.machine.gain(program.shape.body) + together) / speed if speed else math.nan
    money = machine.count * seconds / 3600 * machine.price if machine and machine.price is not None else None
    return Remaining(seconds, source, money, 12.0 * program.shape.total * (len(stages) + program.recipe.trunk.keep))


def _proxy_speed(desk: Desk, program: Program) -> tuple[float, str]:
    """FLOP/s of one worker on the largest proxy's trunk."""
    runs = program.scaling()
    if not runs:
        return 0.0, "unknown"
    for trunk in sorted((run.trunk for run in runs), key=lambda trunk: -trunk.shape.body):
        try:
            result = read_json(desk.run_folder(trunk) / RESULT)
        except ArtefactError:
            continue
        seconds, tokens = sum(result["seconds"].values()), result["timed_tokens"]
        if tokens:  # a stage that was only scored again has trained nothing and tells no speed
            per_token = trunk.shape.flops_per_token(trunk.plan.row).total
            return tokens * per_token / max(seconds, 1e-9), f"the speed of {trunk.name} on this machine"
    return 0.0, "unknown"


def in_bits(interval: dict[str, float]) -> dict[str, float]:
    """An interval in nats per byte, in bits per byte."""
    return {name: value / LN2 for name, value in interval.items()}


def forecast_view(program: Program, forecasts: Sequence[dict[str, Any]], remaining: Remaining) -> View:
    """The one screen of ``windtunnel forecast``: that of the longest run whole, the others in a line each."""
    sealed, *others = forecasts
    facts, expected = sealed["facts"], in_bits(sealed["forecast"]["expected"])
    naive = {name: value["value"] / LN2 for name, value in sealed["forecast"]["naive"].items()}
    forms = [(f["law"]["form"], f"{f['weight']:.0%}", f"{f['value'] / LN2:.4f}") for f in sealed["forecast"]["forms"]]
    cost = (
        f"{duration(remaining.seconds)}, {bytes_size(remaining.disk)} of checkpoints"
        if remaining.seconds
        else "nothing, it is done"
    )
    parts: list[RenderableType] = [
        line(
            f"forecast for '{program.name}', branch '{facts['branch']}' ({facts['kind']}, sealed {sealed['hash'][:12]})",
            "bold",
        ),
        line(
            f"  {si(sealed['forecast']['parameters'])} parameters after {si(sealed['forecast']['tokens'])} tokens, batch"
            f" {facts['batch']:,} tokens, base learning rate {facts['base_lr']:g}"
        ),
        line(f"  expected loss  {expected['value']:.4f} bits per byte", "bold"),
        line(f"  50 % interval  {expected['low50']:.4f} – {expected['high50']:.4f}"),
        line(
            f"  90 % interval  {expected['low90']:.4f} – {expected['high90']:.4f}"
            f"  (± {50 * (expected['high90'] - expected['low90']) / expected['value']:.1f} %)"
        ),
        line(f"  naive: largest proxy {naive['largest']:.4f}, line through the last two sizes {naive['line']:.4f}"),
        table(("law", "weight", "says"), forms, right=(1, 2)),
        *(line(text) for text in map(_in_one_line, others)),
        line(f"the big run costs {cost}  (from {remaining.source})"),
        *(line(text) for text in cost_lines(program.recipe, remaining.seconds)),
        *(line(f"note: {text}") for text in sealed["forecast"]["warnings"]),
        line(
            f"to go on: windtunnel run {program.name if not program.recipe.origin.shown.endswith('.toml') else _command(program)}"
        ),
    ]
    data = {
        "program": program.name, "hash": sealed["hash"], "kind": facts["kind"], "unit": "bits per UTF-8 byte",
        "expected": expected, "naive": naive, "seconds": remaining.seconds, "disk": remaining.disk, "money": remaining.money,
        "others": {
            one["facts"]["branch"]: {
                "hash": one["hash"], "kind": one["facts"]["kind"], "tokens": one["forecast"]["tokens"],
                "expected": in_bits(one["forecast"]["expected"]),
            } for one in others
        },
    }  # fmt: skip
    return View(data, tuple(parts))


def _in_one_line(sealed: dict[str, Any]) -> str:
    facts, expected = sealed["facts"], in_bits(sealed["forecast"]["expected"])
    return (
        f"  branch '{facts['branch']}' after {si(sealed['forecast']['tokens'])} tokens: {expected['value']:.4f} "
        f"[{expected['low90']:.4f}, {expected['high90']:.4f}] ({facts['kind']}, sealed {sealed['hash'][:12]})"
    )


def _command(program: Program) -> str:
    shown = program.recipe.origin.shown
    return shown.removesuffix(".toml") if "/" not in shown and not (program.recipe.base / shown).exists() else shown


def outcome_view(desk: Desk, program: Program, forecasts: Sequence[dict[str, Any]]) -> View:
    """What ``windtunnel run`` prints at its end: forecast beside outcome, losses of the branches, where things lie."""
    book, folder = desk.book, desk.home.program(program.name)
    outcomes = list(book.facts(program.name, "outcome").values())
    branches = [
        run for run in book.runs(program=program.name, study="") if run["kind"] in FINISHED and run["status"] == "done"
    ]
    scores = {
        run["name"]: {s["corpus"]: s["value"] for s in book.scores(run["id"]) if s["name"] == "bits_per_byte"}
        for run in branches
    }
    parts: list[RenderableType] = [line(f"'{program.name}' is done", "bold")]
    found = [next((o for o in outcomes if o["forecast"] == sealed["hash"]), None) for sealed in forecasts]
    for sealed, outcome in zip(forecasts, found, strict=True):
        if outcome is None:
            continue
        expected = in_bits(sealed["forecast"]["expected"])
        inside = "inside" if outcome["inside_90"] else "OUTSIDE"
        name = f" of '{sealed['facts']['branch']}'" if len(forecasts) > 1 else ""
        parts.append(
            line(
                f"forecast{name} {expected['value']:.4f} [{expected['low90']:.4f}, {expected['high90']:.4f}], sealed before "
                f"training · outcome {outcome['outcome'] / LN2:.4f} bits per byte · error "
                f"{100 * outcome['relative_error']:+.2f} %, {inside} the 90 % interval",
                "bold green" if outcome["inside_90"] else "bold red",
            )
        )
    corpora = sorted({corpus for values in scores.values() for corpus in values})
    rows = [(name, *(f"{values[c]:.4f}" if c in values else "" for c in corpora)) for name, values in scores.items()]
    parts.append(
        table(("branch", *corpora), rows, title="held-out bits per byte", right=tuple(range(1, len(corpora) + 1)))
    )
    if (folder / "report.html").is_file():
        parts.append(line(f"report: {folder / 'report.html'}"))
    for name, fact in book.facts(program.name, "export").items():
        parts.append(line(f"model:  {desk.home.root / fact['folder']} (Hugging Face folder; {fact['check']})"))
        parts.append(line(f"talk:   windtunnel chat {program.name}/{name.rpartition('-')[0]}"))
    data = {
        "program": program.name, "scores": scores, "outcome": found[0] if found else None,
        "report": str(folder / "report.html"),
    }  # fmt: skip
    return View(data, tuple(parts))
