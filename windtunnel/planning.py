"""The dry run: everything derived from a recipe, shown before anything is done. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import ArtefactError
from windtunnel.base.units import bytes_size, duration, si
from windtunnel.batch_answer import with_known_batch
from windtunnel.desk import THREADED_FROM, Machine
from windtunnel.growth import generations
from windtunnel.home import Home
from windtunnel.laws.budget import Choice
from windtunnel.model.config import ModelConfig
from windtunnel.model.shape import Shape
from windtunnel.preparation import known_preparation
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.sizing import size_for_budget, with_budget
from windtunnel.study import search_stages, with_known_choices
from windtunnel.train.folder import as_far_as_trained, read_failure, read_result, steps_saved
from windtunnel.train.memory import StepMemory, step_memory
from windtunnel.train.stage import NOT_IDENTITY, Muon, Stage
from windtunnel.views import View, blocks, line, table

_BYTES_OF_A_NUMBER = 4


@dataclass(frozen=True)
class Speed:
    """FLOP/s expected for a stage's shape, and where that number comes from. ``workers`` run small stages side by side."""

    flops: float
    source: str
    workers: float = 1


@dataclass(frozen=True)
class Line:
    """One stage of the plan."""

    name: str
    stages: tuple[Stage, ...]
    state: str
    seconds: float | None


def load_program(recipe: Recipe, home: Home) -> Program:
    """The program as far as earlier runs in this home have determined it; without any, as far as the recipe tells."""
    prepared = known_preparation(home, recipe)
    program = Program(recipe, prepared, pinned=known_pins(home, recipe, prepared.tokenizer_hash if prepared else ""))
    return with_known_choices(home, with_known_batch(home, with_budget(program)))


def known_pins(home: Home, recipe: Recipe, tokenizer: str) -> dict[str, int] | None:
    """Batch and warmup that an earlier run derived for the same model and tokenizer, and whether a study answered the batch."""
    try:
        raw = read_json(home.program(recipe.name) / "pinned.json")
    except ArtefactError:
        return None
    # A key that the recipe's table gained since then had its default.
    model = {name: field.default for name, field in ModelConfig.model_fields.items()} | raw["model"]["model"]
    same = {**raw["model"], "model": model} == pin_key(recipe, tokenizer)
    return {name: raw[name] for name in ("batch", "warmup", "answered") if name in raw} if same else None


def pin_key(recipe: Recipe, tokenizer: str) -> dict[str, Any]:
    """What the pinned values belong to."""
    return {
        "model": recipe.model.model_dump(mode="json"), "tokenizer": tokenizer, "warmup": str(recipe.trunk.warmup),
        "batch": recipe.trunk.batch,
        "budget": recipe.budget.model_dump(mode="json") if recipe.budget else None,
    }  # fmt: skip


def plan(recipe: Recipe, home: Path, *, measure: bool = True) -> View:
    """What a run of this recipe would do here, stage by stage, with the source of each derived number."""
    place = Home(home)
    program = load_program(recipe, place)
    speed = _speed(program, measure)
    lines = plan_lines(program, place, speed)
    parts: list[RenderableType] = [line(f"plan of '{recipe.name}': nothing is done", "bold"), *_shape_parts(program)]
    if recipe.budget is not None:
        parts.append(_budget_part(size_for_budget(recipe, program.vocab)))
    parts.append(_stage_table(lines))
    parts.extend(_data_parts(program))
    parts.extend(_memory_parts(lines))
    if recipe.machine is not None:
        parts.append(
            line(
                "  counted in fp32 for this machine's CPU; on devices weights, gradients and moments are divided among them"
            )
        )
    parts.extend(_schedule_parts(program))
    parts.append(table(("derived", "value", "source"), [(d.name, d.value, d.source) for d in program.derived()]))
    parts.extend(_cost_parts(program, lines, speed))
    return View(_data(program, lines, speed), tuple(parts))


def plan_lines(program: Program, home: Home, speed: Speed | None) -> list[Line]:
    """All stages in order, each with its state and its expected seconds."""
    recipe, out = program.recipe, []
    prepared = program.prepared is not None
    out.append(Line("corpora", (), "done" if prepared else "new", None))
    if recipe.tunnel is not None:
        if recipe.tunnel.trials and program.searched:
            trials = tuple(search_stages(program, [(i, {}) for i in range(recipe.tunnel.trials)]))
            out.append(Line("search", trials, "done" if program.choices else "new", _seconds(trials, speed)))
        runs = program.scaling()
        stages = tuple(stage for run in runs for stage in (run.trunk, *(branch for _, branch in run.branches)))
        out.append(Line("scaling", stages, _group_state(program, home, stages), _seconds(stages, speed)))
    for name in ("trunk", *recipe.branch):
        stage = program.trunk() if name == "trunk" else program.branch(name)
        on_cores = speed is not None and speed.workers > 1
        gain = Machine.of(None).gain(stage.shape.body) if name == "trunk" and on_cores else 1.0
        alone = replace(speed, workers=gain) if speed else None
        out.append(Line(name, (stage,), state(program, home, stage), _seconds((stage,), alone)))
    return out


def state(program: Program, home: Home, stage: Stage) -> str:
    """``done``, ``extends``, ``continues``, ``again``, ``new`` or ``redoes (because …)``."""
    if program.prepared is None:
        return "new"
    runs = home.runs(program.name)
    folder = runs / stage.folder_name
    if read_result(folder, as_far_as_trained(folder, stage)) is not None:
        return "done"
    if saved := steps_saved(folder):
        lost = sorted({step for step in stage.keep if step > stage.first_step} - set(saved))
        if lost and read_result(folder, replace(stage, keep=())) is not None:
            return f"again (for its checkpoint at step {lost[0]})"
        return (
            f"extends (from step {saved[-1]})"
            if (folder / "result.json").is_file()
            else f"continues (from step {saved[-1]})"
        )
    older = sorted(runs.glob(f"{stage.name}-??????????"), key=lambda path: path.stat().st_mtime)
    if older:
        try:
            before = read_json(older[-1] / "stage.json")
        except ArtefactError:
            return "new"
        if changed := _changes(before, stage.to_dict()):
            return f"redoes (because {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''})"
    return "new"


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the values that differ between two stages, as far as they decide the numbers."""
    out: list[str] = []
    for name in sorted({*before, *now} - ({"key", *NOT_IDENTITY} if not prefix else set())):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            out += _changes(old, new, f"{prefix}{name}.")
        elif json.dumps(old) != json.dumps(new):
            brief = not isinstance(old, list | dict) and not isinstance(new, list | dict) and len(str(new)) < 20
            out.append(f"{prefix}{name} {old} → {new}" if brief else f"{prefix}{name} changed")
    return out


def _group_state(program: Program, home: Home, stages: tuple[Stage, ...]) -> str:
    if program.prepared is None or not stages:
        return "new"
    folders = [(home.runs(program.name) / stage.folder_name, stage) for stage in stages]
    done = sum((read_result(*one) or read_failure(*one)) is not None for one in folders)
    return "done" if done == len(stages) else "new" if not done else f"continues ({done} of {len(stages)} done)"


def _seconds(stages: tuple[Stage, ...], speed: Speed | None) -> float | None:
    if speed is None or not speed.flops:
        return None
    longest = max((stage.flops for stage in stages), default=0.0)
    return max(sum(stage.flops for stage in stages) / speed.workers, longest) / speed.flops


def _speed(program: Program, measure: bool) -> Speed | None:
    machine = program.recipe.machine
    if machine is not None and machine.tflops is not None:
        return Speed(machine.count * machine.tflops * 1e12, f"[machine]: {machine.count} × {machine.tflops:g} TFLOP/s")
    if not measure:
        return None
    facts = measured(program.shape, program.recipe.model.row)
    if facts is None:
        return None
    speed = facts["tokens_per_second"] * program.shape.flops_per_token(program.recipe.model.row).total
    return Speed(speed, "matrix products of this shape measured on one thread here, times 1.5", facts["cores"])


def measured(shape: Shape, row: int) -> dict[str, Any] | None:
    """A short measurement in a process of its own, so that this one stays without torch; None if it fails."""
    command = [sys.executable, "-m", "windtunnel.train.measure", json.dumps(shape.to_dict()), str(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return None


def _shape_parts(program: Program) -> list[RenderableType]:
    shape, row = program.shape, program.recipe.model.row
    flops = shape.flops_per_token(row)
    return [
        line(
            f"model    width {shape.width} · layers {shape.layers} · heads {shape.heads} (kv {shape.kv_heads}) × {shape.head_dim}"
            f" · d_ff {shape.ff} · vocabulary {shape.vocab:,} · base width {shape.base_width}"
        ),
        line(f"size     N = {shape.body:,} body + {shape.embedding:,} embedding = {shape.total:,}"),
        line(
            f"tokens   {si(program.total_tokens)} in steps of {program.batch * row:,}"
            f" ({program.batch} rows of {row}): {program.steps:,} steps"
        ),
        *(
            line(
                f"batch    {batch * row:,} tokens after step {step:,} ({si(program.batches.sequences(step) * row)} tokens)"
            )
            for step, batch in program.batches.changes
        ),
        line(
            f"FLOPs    {flops.total:.4g} a token: body {flops.body:.3g}, head {flops.head:.3g}, attention {flops.attention:.3g}"
            f"; 6ND would say {6 * shape.body:.3g}"
        ),
    ]


def _stage_table(lines: list[Line]) -> RenderableType:
    rows = []
    for item in lines:
        if not item.stages:
            rows.append((item.name, *("",) * 7, item.state))
            continue
        first, count = item.stages[0], len(item.stages)
        own = sum(stage.own_tokens for stage in item.stages)
        steps = f"{first.steps - first.own_steps:,} → {first.steps:,}" if count == 1 else f"{count} stages"
        sizes = sorted({stage.shape.body for stage in item.stages})
        shown = si(sizes[0]) if len(sizes) == 1 else f"{si(sizes[0])} – {si(sizes[-1])}"
        if first.shape.experts > 1:
            shown += f" ({si(first.shape.active)} active)"
        batches = sorted({stage.step_tokens for stage in item.stages})
        batch = si(batches[0]) if len(batches) == 1 else f"{si(batches[0])} – {si(batches[-1])}"
        seconds = duration(item.seconds) if item.seconds is not None else "?"
        flops, memory = f"{sum(s.flops for s in item.stages):.3g}", _memory_shown(item)
        rows.append((item.name, shown, si(own), batch, steps, flops, seconds, memory, item.state))
    columns = ("stage", "N", "tokens", "batch", "steps", "FLOPs", "time", "memory", "state")
    return table(columns, rows, right=(1, 2, 3, 4, 5, 6, 7))


def line_memory(item: Line) -> StepMemory:
    """Expected memory of the largest stage of a line, on the CPU of this machine: in all lanes of a large run, or in one of the
    workers that train small stages side by side."""
    large = item.name not in ("search", "scaling") and item.stages[0].shape.body >= THREADED_FROM
    lanes = Machine.of("cpu").lanes if large else 1
    return max((step_memory(stage, "cpu", lanes) for stage in item.stages), key=lambda memory: memory.resident)


def data_by_length(program: Program, stage: Stage) -> list[dict[str, Any]]:
    """What a stage reads of long and of short documents: exact rows and tokens, and whole documents that there are.

    ``tokens`` are those that the rows hold on average, without padding.
    """
    prepared, plan = program.prepared, stage.plan
    known = prepared.by_length(plan.row, plan.long_from) if prepared and plan.long_from else {}
    out: list[dict[str, Any]] = []
    for name, rows in plan.counts(stage.own_tokens // plan.row).items() if known else ():
        corpus, _, part = name.partition(":")
        facts = known[corpus][part]
        tokens = round(rows * plan.row * facts["fill"])
        out.append({"corpus": corpus, "part": part, "rows": rows, "tokens": tokens, "documents": facts["whole"],
                    "fill": facts["fill"], "epochs": rows / facts["rows"]})  # fmt: skip
    return out


def _data_parts(program: Program) -> list[RenderableType]:
    out: list[RenderableType] = []
    for name, branch in program.recipe.branch.items():
        if branch.context is None or branch.context.long_share is None:
            continue
        stage = program.branch(name)
        least, found = stage.plan.long_from, data_by_length(program, stage)
        total = sum(part["tokens"] for part in found)
        shares = f"asked {100 * branch.context.long_share:g} % of documents from {least:,} tokens on"
        out.append(line(f"data of {name}: {shares}" + ("" if found else "; counted once the corpora are read")))
        out.extend(
            line(
                f"  {100 * part['tokens'] / total:5.1f} %  {part['corpus']}, {part['part']}: {part['tokens']:,} tokens in"
                f" {part['rows']:,} rows ({100 * part['fill']:.0f} % full) of {part['documents']:,} documents,"
                f" {part['epochs']:.2g} times each"
            )
            for part in found
        )
    return out


def _memory_shown(item: Line) -> str:
    return bytes_size(line_memory(item).resident) if any(stage.own_steps for stage in item.stages) else ""


def _memory_parts(lines: list[Line]) -> list[RenderableType]:
    """What the tensors of a step of each stage take in fp32 on a CPU, by what they are for; stages that take the same, once."""
    alike: dict[str, list[str]] = {}
    for item in (item for item in lines if any(stage.own_steps for stage in item.stages)):
        m = line_memory(item)
        ways = [way for way, used in (("layers computed again", m.recompute), ("loss in chunks", m.chunked)) if used]
        lanes = f" in each of {m.lanes} processes" if m.lanes > 1 else ""
        beside = f", the reference's {bytes_size(m.reference)}" if m.reference else ""
        text = (
            f"{bytes_size(m.tensors)}{lanes}: weights {bytes_size(m.weights)}{beside}, gradients {bytes_size(m.gradients)},"
            f" moments {bytes_size(m.moments)}, activations {bytes_size(m.activations)}, head or layer at work"
            f" {bytes_size(m.work)}{''.join(f'; {way}' for way in ways)}"
        )
        alike.setdefault(text, []).append(item.name)
    return [line(f"a step of {', '.join(names)}: {text}") for text, names in alike.items()]


def _schedule_parts(program: Program) -> list[RenderableType]:
    out: list[RenderableType] = []
    for name in program.recipe.branch:
        stage = program.branch(name)
        points = [stage.schedule.factor(max(1, round(stage.steps * i / 59))) for i in range(60)]
        rate, end = stage.optimizer.learning_rate, stage.schedule.factor(stage.steps)
        out.append(line(f"LR {name:10s} {blocks(points)}  {rate:.4g} → {rate * end:.3g} at step {stage.steps:,}"))
        own = [change for change in stage.batch_changes if change[0] > stage.first_step]
        out.extend(line(f"batch {name}: {batch * stage.plan.row:,} tokens after step {step:,}") for step, batch in own)
    return out


def _cost_parts(program: Program, lines: list[Line], speed: Speed | None) -> list[RenderableType]:
    shape, kept = program.shape, _checkpoints(program)
    largest = max([shape, *(program.branch(name).shape for name in program.recipe.branch)], key=lambda s: s.total)
    muon = isinstance(program.setting().optimizer, Muon)
    out: list[RenderableType] = [
        line(
            f"memory   {bytes_size(2 * _BYTES_OF_A_NUMBER * largest.total + _moments(largest, muon))} for weights, gradients and"
            f" moments · disk {bytes_size(kept * (_BYTES_OF_A_NUMBER * shape.total + _moments(shape, muon)))}:"
            f" {kept} checkpoints of the target stay"
            f" (branch points, ends, the newest {program.recipe.trunk.keep})"
        )
    ]
    total = expected_seconds(program, lines, speed)
    if speed is None:
        out.append(line("time     not measured"))
    else:
        known = f"time     {duration(total)} for what is not done, branches side by side (speed: {speed.source})"
        out.append(line(f"{known}; compiling comes on top"))
    return [*out, *(line(text) for text in cost_lines(program.recipe, total))]


def expected_seconds(program: Program, lines: list[Line], speed: Speed | None) -> float:
    """Seconds of all that is not done: one line after the other, but branches that can grow side by side do, on all workers."""
    left = {item.name: item for item in lines if item.state != "done" and item.seconds is not None}
    branches = {name: left[name] for name in program.recipe.branch if name in left}
    alone = sum(item.seconds or 0.0 for name, item in left.items() if name not in branches)
    every = [program.branch(name) for name in program.recipe.branch]
    workers = max(1.0, speed.workers) if speed else 1.0
    for group in generations(every):
        own = [branches[stage.name].seconds or 0.0 for stage in group if stage.name in branches]
        alone += max(sum(own) / workers, max(own, default=0.0))
    return alone


def _moments(shape: Shape, muon: bool) -> int:
    """Bytes of two moments of every parameter; under Muon one for the matrices that it trains, which experts are not."""
    trained = shape.matrices - (shape.layers * shape.experts * 3 * shape.width * shape.ff if shape.experts > 1 else 0)
    return _BYTES_OF_A_NUMBER * (2 * shape.total - (trained if muon else 0))


def cost_lines(recipe: Recipe, seconds: float) -> list[str]:
    """Device-hours, money and energy of a time on the recipe's [machine]; nothing without one."""
    machine = recipe.machine
    if machine is None:
        return []
    hours = machine.count * seconds / 3600
    parts = [f"cost     {hours:,.1f} device-hours"]
    if machine.price is not None:
        parts.append(f"{hours * machine.price:,.2f} {machine.currency}")
    if machine.watts is not None:
        parts.append(f"{hours * machine.watts / 1000:,.1f} kWh")
    return [" · ".join(parts)]


def _checkpoints(program: Program) -> int:
    points = {program.branch_point(name) for name in program.recipe.from_trunk} | {program.trunk_steps}
    return len(points) + len(program.recipe.branch) + program.recipe.trunk.keep


def _budget_part(choice: Choice) -> RenderableType:
    rows = [
        (mark, o.name, si(o.parameters), si(o.tokens), f"{o.tokens_per_parameter:.3g}", f"{o.loss:.4f}")
        for mark, o in (("smaller", choice.smaller), ("chosen", choice.best), ("larger", choice.larger))
        if o is not None
    ]
    return table(
        ("budget", "size", "N", "tokens", "tokens/N", "nats per byte"),
        rows,
        title=f"sizes for the budget by the law '{choice.law}'",
    )


def _data(program: Program, lines: list[Line], speed: Speed | None) -> dict[str, Any]:
    shape = program.shape
    return {
        "program": program.name, "shape": shape.to_dict(), "body": shape.body, "embedding": shape.embedding,
        "total": shape.total, "tokens": program.total_tokens, "batch_tokens": program.batch * program.recipe.model.row,
        **({"batch_changes": [list(c) for c in program.batches.changes]} if program.batches.changes else {}),
        "steps": program.steps, "flops_per_token": shape.flops_per_token(program.recipe.model.row).total,
        "stages": [
            {"name": item.name, "state": item.state, "seconds": item.seconds, "count": len(item.stages),
             "flops": sum(s.flops for s in item.stages),
             "memory": line_memory(item).resident if item.stages else None,
             "from_step": item.stages[0].steps - item.stages[0].own_steps if len(item.stages) == 1 else None,
             "to_step": item.stages[0].steps if len(item.stages) == 1 else None, **_alone(item)}
            for item in lines
        ],
        "derived": [d.__dict__ for d in program.derived()],
        "speed": speed.__dict__ if speed else None,
    }  # fmt: skip


def _alone(item: Line) -> dict[str, Any]:
    """What only a line of one stage can say: parameters, tokens, batch and row in tokens, first and last base rate."""
    if len(item.stages) != 1:
        return {}
    (stage,) = item.stages
    rate, factor = stage.optimizer.learning_rate, stage.schedule.factor
    top = max(factor(max(1, stage.first_step + 1)), factor(max(1, stage.schedule.warmup)))
    return {
        "parameters": stage.shape.body, "active": stage.shape.active, "tokens": stage.own_tokens, "row": stage.plan.row,
        "batch_tokens": stage.step_tokens, "batch_changes": [list(change) for change in stage.batch_changes],
        "rate": [rate * top, rate * factor(max(1, stage.steps))],
    }  # fmt: skip
