"""The loop: the only place where anything is trained. Trunk, branch and trial differ by the stage that is passed in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from windtunnel.base.artefact import write_json
from windtunnel.base.errors import ArtefactError, Diverged, Stopped, WindtunnelError
from windtunnel.base.runtime import Runtime, peak_memory, return_large_blocks
from windtunnel.corpus.loader import Loader
from windtunnel.corpus.store import Corpus
from windtunnel.model.adapters import attach
from windtunnel.model.transformer import Transformer
from windtunnel.train.average import load_average
from windtunnel.train.balance import balanced
from windtunnel.train.bits_per_byte import score_heldout
from windtunnel.train.checkpoint import Position, check_parent, newest_whole, restore, rotate, save, sweep_checkpoints
from windtunnel.train.control import Control, Progress
from windtunnel.train.folder import RESULT, STAGE, steps_saved
from windtunnel.train.memory import MICRO_TOKENS, micro_rows, recomputes
from windtunnel.train.metrics import Metrics, last_loss
from windtunnel.train.noise import EVERY, EVERY_HALVED
from windtunnel.train.objectives import OBJECTIVES, objective_of
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.pairs import LiveProbe, watched
from windtunnel.train.parallel import any_rank, barrier, shard, share, sum_over_ranks
from windtunnel.train.reference import live_reference, reference_values
from windtunnel.train.stage import AdamW, Stage, check_ranks
from windtunnel.train.step import Trainer, make_compute, train_step
from windtunnel.train.surgery import operate

_SAVE_SECONDS = 60.0
_SKIPS_IN_A_ROW = 10


@dataclass
class Workshop:
    """What stays warm between stages of one shape in one process: the model and the compiled objective."""

    runtime: Runtime
    _models: dict[str, tuple[Transformer, Any]]

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self._models = runtime, {}

    def trainer(self, stage: Stage) -> Trainer:
        """A trainer with freshly drawn weights (from the stage's seed) and empty moments."""
        kind = self.runtime.torch_device.type
        again = recomputes(stage, kind, self.runtime.world)
        signature = str(
            (
                stage.shape,
                stage.objective,
                stage.preference,
                stage.balance,
                stage.masking,
                stage.plan.row,
                stage.lora,
                again,
            )
        )
        objective = balanced(objective_of(stage), stage.balance)
        if signature not in self._models or (self.runtime.world > 1 and self.runtime.sharded):
            model = Transformer(stage.shape, stage.parametrization, device=self.runtime.torch_device)
            if stage.lora is not None:
                attach(model, stage.lora.rank, stage.lora.scale)
            if self.runtime.dtype == "bfloat16":
                model.compute_dtype = torch.bfloat16
            self._models[signature] = (model, make_compute(objective, compiled=self.runtime.compiled))
        model, compute = self._models[signature]
        model.recompute = again
        model.set_parametrization(stage.parametrization)
        model.zero_grad(set_to_none=True)  # a step that failed half-way may have left some
        model.init_weights(stage.seed)
        shard(model, self.runtime)
        optimizer = build_optimizer(model, stage.optimizer, by_role=stage.lr_by_role)
        micro = micro_rows(stage, kind, self.runtime.world)
        return_large_blocks(model.recompute)
        masked = stage.masking == "document"
        every = EVERY if stage.objective == "lm" else 0
        halved = EVERY_HALVED if stage.kind == "trunk" else 0
        probe = LiveProbe(model, stage.dynamics_every, self.runtime) if stage.dynamics_every else None
        if probe is not None:
            optimizer = watched(optimizer, probe)
        return Trainer(
            model,
            optimizer,
            objective,
            compute,
            self.runtime,
            micro,
            stage.optimizer.clip,
            masked,
            every,
            halved,
            probe,
        )


def scorer(model: Transformer, runtime: Runtime, row: int = 256) -> Trainer:
    """A trainer that only scores: an eager objective around a loaded model."""
    objective = OBJECTIVES["lm"]
    micro = max(1, MICRO_TOKENS[runtime.torch_device.type] // row)
    return Trainer(
        model, build_optimizer(model, AdamW()), objective, make_compute(objective, compiled=False), runtime, micro, 1.0
    )


def begin(
    stage: Stage, run: Path, parent: Path | None, trainer: Trainer, control: Control, tokenizer: str = ""
) -> Position:
    """Where a stage begins. The order, stated here and nowhere else:

    1. the newest whole checkpoint of its own that lies before every step it has still to keep (of a stage with adapters: these,
       beside the parent's weights);
    2. the average of the checkpoints that the stage names, if it names some;
    3. the parent's checkpoint that the stage names: weights, moments, step count and all, or its weights alone;
    4. fresh weights from its seed.
    """
    missing = {step for step in stage.keep if stage.first_step < step <= stage.steps} - set(steps_saved(run))
    own = newest_whole(run, control.say, min(missing, default=stage.steps))
    if own is not None:
        position = restore(own[1], trainer.model, trainer.optimizer)
        if stage.lora is not None and parent is not None:  # its own weights are merged ones
            restore(parent, trainer.model, None)
        return position
    if stage.average:
        load_average(stage, run, trainer.model, tokenizer)
        return Position()
    if stage.start is not None:
        if parent is None:
            raise ArtefactError(
                str(run), f"expected the checkpoint of {stage.start.stage} at step {stage.start.step}", "run it first"
            )
        check_parent(stage, parent, tokenizer)
        if stage.surgery is not None:
            return operate(stage, parent, trainer, control)
        position = restore(parent, trainer.model, None if stage.start.fresh else trainer.optimizer)
        return Position() if stage.start.fresh else position
    return Position()


def run_stage(
    stage: Stage, run: Path, corpora: Mapping[str, Corpus], workshop: Workshop,
    *, parent: Path | None = None, control: Control | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains a stage to its last step and scores it; continues where an earlier call was cut off; returns its result.

    The run folder receives ``stage.json``, ``metrics.jsonl``, ``checkpoints/`` and at last ``result.json``.

    Raises:
        UserError: its optimizer cannot train on several ranks.
        Stopped: a stop was asked for; a checkpoint of the last finished step is on disk.
        Diverged: ten updates in a row were not finite; the last checkpoint is from before them.
    """
    control, runtime = control or Control(), workshop.runtime
    check_ranks(stage.optimizer, runtime.world if runtime.sharded else 1, stage.lora)
    if runtime.rank == 0:
        write_json(run / STAGE, {"key": stage.key, **stage.to_dict()})
        sweep_checkpoints(run)
    trainer = workshop.trainer(stage)
    tokenizer = next((corpora[name].tokenizer_hash for name, _ in stage.corpora if name in corpora), "")
    values = reference_values(stage, run, corpora, parent, trainer)
    trainer.reference = live_reference(stage, run, parent, trainer)
    at = begin(stage, run, parent, trainer, control, tokenizer)
    barrier(runtime)
    metrics = Metrics(run, at.step, stage.steps) if runtime.rank == 0 else None
    try:
        loader = Loader(stage.plan, corpora, values)
        at, clock = _train(stage, run, loader, trainer, at, metrics, control)
        if stage.average and not steps_saved(run):  # nothing was trained, so nothing was saved on the way
            save(
                run,
                stage,
                trainer.model,
                trainer.optimizer,
                at,
                runtime,
                {"pinned": True, "tokenizer": loader.tokenizer},
            )
    finally:
        if metrics:
            metrics.close()
    scores = {}
    reader = trainer if stage.preference is None else scorer(trainer.model, runtime, stage.plan.row)
    for name in stage.score:
        scored = score_heldout(reader, corpora[name].heldout, stage.plan.row, stage.score_tokens)
        scores[name] = {**asdict(scored), "bits_per_byte": scored.bits_per_byte, "corpus": corpora[name].hash}
    memory = int(sum_over_ranks(np.array([peak_memory()]), runtime)[0])
    result = {
        "key": stage.key, "step": at.step, "tokens": at.sequences * stage.plan.row, "skipped": at.skipped, "scores": scores,
        "score_tokens": stage.score_tokens,
        "loss": last_loss(run, at.step), "numeric_class": runtime.numeric_class(), "peak_memory": memory,
        **_time_spent(run, clock, stage), **({"probe_seconds": trainer.probe.seconds} if trainer.probe else {}),
    }  # fmt: skip
    if runtime.rank == 0:
        write_json(run / RESULT, result)
    barrier(runtime)
    return result


def _train(
    stage: Stage,
    run: Path,
    loader: Loader,
    trainer: Trainer,
    at: Position,
    metrics: Metrics | None,
    control: Control,
) -> tuple[Position, Clock]:
    """From a position to the last step: load, step, record, and save where one is due."""
    runtime, clock, bad = trainer.runtime, Clock(), 0
    keep, saved, batches = frozenset(stage.keep), at.step, stage.batches
    while at.step < stage.steps:
        clock.start()
        step = at.step + 1
        batch = batches.at(step)
        rows = loader.rows(*share(at.sequences, batch, runtime))
        rate = stage.optimizer.learning_rate * stage.schedule.factor(step)
        clock.loaded()
        if trainer.probe:
            trainer.probe.at(step)
        report = step_or_halve(trainer, rows, rate, control, step=step)
        clock.stepped(batch * stage.plan.row, report.terms["loss"])
        bad = 0 if report.applied else bad + 1
        if bad >= _SKIPS_IN_A_ROW:
            raise Diverged(
                f"{stage.name}: {bad} updates in a row were not finite at step {step}; lower the learning rate"
            )
        at = Position(step, at.optimizer_step + report.applied, at.sequences + batch, at.skipped + (not report.applied))
        more = report.noise.metrics() if report.noise else {}
        if trainer.probe:
            more |= trainer.probe.closed(report.gradient_norm, report.applied)
        if metrics:
            metrics.add(step, {**report.terms, "gradient_norm": report.gradient_norm, "learning_rate": rate, **more})
        stopping = any_rank(control.stop, runtime) if runtime.world > 1 else control.stop
        finishing = stage.open_ended and any_rank(control.finish(), runtime)
        last = step == stage.steps or finishing
        due = any_rank(clock.save_due(), runtime) or bool(stage.save_every and step % stage.save_every == 0)
        if step in keep or (last and stage.save_final) or (stage.save_final and (due or stopping)):
            if metrics:
                metrics.flush()
            facts = {"pinned": step in keep or last, "tokenizer": loader.tokenizer}
            save(run, stage, trainer.model, trainer.optimizer, at, runtime, facts)
            clock.saved()
            saved = step
            if runtime.rank == 0:
                rotate(run, stage.keep_last, keep)
        if clock.knows_speed and control.due():
            control.tell(clock.progress(stage, at))
        if stopping and not last:
            kept = f"a checkpoint of step {saved} is saved" if saved else "nothing was saved yet"
            raise Stopped(
                f"{stage.name}: stopped after step {step} of {stage.steps}; {kept}; the same command continues"
            )
        if finishing:
            break
        clock.done()
    return at, clock


def step_or_halve(trainer: Trainer, rows: Any, rate: float, control: Control, *, step: int = 1) -> Any:
    """One step, the gradient's noise measured if it is due.

    Out of memory halves the micro-batch, says so and tries the same step again.

    Raises:
        WindtunnelError: memory does not suffice for one row, or not on one of several ranks.
    """
    while True:
        try:
            measure, halve = (
                bool(every) and step % every == 0 for every in (trainer.noise_every, trainer.halved_every)
            )
            known = trainer.reference(rows) if trainer.reference else rows
            return train_step(trainer, known, rate, measure=measure, halve=halve)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            # Ranks must make the same number of micro-batches, so one of several cannot halve its own.
            if trainer.micro == 1 or trainer.runtime.world > 1:
                raise WindtunnelError(_no_room(trainer)) from error
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.micro //= 2
            control.say(
                f"out of memory: the micro-batch is now {trainer.micro} rows; the batch and the numbers' meaning stay"
            )


def _no_room(trainer: Trainer) -> str:
    ranks = f" on each of {trainer.runtime.world} ranks" if trainer.runtime.world > 1 else ""
    return (
        f"out of memory with a micro-batch of {trainer.micro} {'row' if trainer.micro == 1 else 'rows'}{ranks}; "
        "use more or larger devices, or a smaller model.row or model.size"
    )


class Clock:
    """Where the time of a run goes, in seconds, and its recent speed and loss."""

    def __init__(self) -> None:
        self.seconds = {"step": 0.0, "load": 0.0, "other": 0.0, "save": 0.0}
        self.tokens = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._losses: deque[float] = deque(maxlen=100)
        self._save = self._mark = time.monotonic()

    def start(self) -> None:
        self._mark = time.perf_counter()

    def _lap(self, name: str) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self.seconds[name] += lap
        return lap

    def loaded(self) -> None:
        self._lap("load")

    def stepped(self, tokens: int, loss: float) -> None:
        lap = self._lap("step")
        if self.tokens:  # the first step compiles
            self._recent.append((lap, tokens))
        self._losses.append(loss)
        self.tokens += tokens

    def saved(self) -> None:
        self._lap("save")
        self._save = time.monotonic()

    def save_due(self) -> bool:
        return time.monotonic() - self._save > _SAVE_SECONDS

    def done(self) -> None:
        self._lap("other")

    @property
    def knows_speed(self) -> bool:
        return bool(self._recent)

    def mean_loss(self) -> float:
        """Mean training loss of the last steps (at most 100), in the objective's unit."""
        return sum(self._losses) / max(1, len(self._losses))

    def progress(self, stage: Stage, at: Position) -> Progress:
        seconds, tokens = sum(s for s, _ in self._recent), sum(t for _, t in self._recent)
        speed = tokens / seconds if seconds else 0.0
        left = (stage.batches.sequences(stage.steps) - stage.batches.sequences(at.step)) * stage.plan.row
        return Progress(stage.name, at.step, stage.steps, self.mean_loss(), speed, left / speed if speed else 0.0)


def _time_spent(run: Path, clock: Clock, stage: Stage) -> dict[str, Any]:
    """Seconds by kind, those of an interrupted earlier call not known and so not claimed; exact FLOPs."""
    return {"seconds": clock.seconds, "timed_tokens": clock.tokens, "flops": stage.flops}
