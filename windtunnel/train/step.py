"""One optimizer step: micro-batches, gradients normalised by counts, clip, update. It fits one screen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.model.transformer import Transformer
from windtunnel.train.balance import Balanced, begin_step, end_step
from windtunnel.train.objectives import Objective
from windtunnel.train.optimizer import Optimizer, set_learning_rate
from windtunnel.train.parallel import average_gradients, global_norm_clip, sum_over_ranks


@dataclass
class Trainer:
    """The moving parts of one run: weights, moments and the compiled objective. ``micro`` counts rows of a micro-batch."""

    model: Transformer
    optimizer: Optimizer
    objective: Objective
    compute: Any
    runtime: Runtime
    micro: int
    clip: float
    masked: bool = True


@dataclass(frozen=True)
class StepReport:
    """What one step did. ``terms`` are means in the objective's units; ``applied`` is False for a skipped update."""

    terms: dict[str, float]
    gradient_norm: float
    applied: bool


def make_compute(objective: Objective, *, compiled: bool) -> Any:
    """The objective as a function (model, *batch, scale[terms]) -> (scaled sum, sums[terms]); a batch is tokens, targets,
    documents, and values where rows have some.

    Compiled once for each shape: hyper-parameters reach it as tensors, so trials of one shape share the code.
    """

    def compute(model: Transformer, *batch_and_scale: Tensor):
        *batch, scale = batch_and_scale
        sums = objective.sums(model, *batch)
        return (sums * scale).sum(), sums.detach()

    return torch.compile(compute, dynamic=False, fullgraph=True) if compiled else compute


def train_step(trainer: Trainer, rows: Rows, learning_rate: float) -> StepReport:
    """Updates the weights once with this rank's rows, or leaves them as they were if anything is not finite.

    The sums of all micro-batches and ranks are divided by counts over all of them. A non-finite loss or gradient norm,
    which all ranks see alike, skips the update: neither weights nor moments change.
    """
    device, objective, world = trainer.runtime.torch_device, trainer.objective, trainer.runtime.world
    *counts, batch = sum_over_ranks(np.append(objective.counts(rows), len(rows)), trainer.runtime).tolist()
    weights = np.asarray(objective.weights) / np.maximum(counts, 1)
    scale = torch.tensor(weights * world, dtype=torch.float32, device=device)  # gradients are averaged over ranks
    sums = torch.zeros(len(objective.names), dtype=torch.float64, device=device)
    begins = range(0, math.ceil(batch / world), trainer.micro)  # as many on every rank: sharded weights need all
    if isinstance(objective, Balanced):
        begin_step(trainer, [to_device(rows, begin, trainer) for begin in begins])
    for begin in begins:
        loss, part = trainer.compute(trainer.model, *to_device(rows, begin, trainer), scale)
        loss.backward()
        sums += part
    average_gradients(trainer.model, trainer.runtime)
    norm = global_norm_clip(trainer.model, trainer.clip)
    means = sum_over_ranks(sums.cpu().numpy(), trainer.runtime) / np.maximum(counts, 1)
    applied = bool(np.isfinite(means).all()) and math.isfinite(norm)
    if applied:
        set_learning_rate(trainer.optimizer, learning_rate)
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    terms = dict(zip(objective.names, means.tolist(), strict=True))
    if isinstance(objective, Balanced):
        terms |= end_step(trainer, applied)
    return StepReport(terms, norm, applied)


def to_device(rows: Rows, begin: int, trainer: Trainer) -> tuple[Tensor | None, ...]:
    """One micro-batch as tensors, filled up with unscored rows to the one compiled shape."""
    device, end = trainer.runtime.torch_device, begin + trainer.micro
    tokens, targets = torch.from_numpy(rows.inputs[begin:end]), torch.from_numpy(rows.targets[begin:end])
    documents = torch.from_numpy(rows.documents[begin:end])
    values = [] if rows.values is None else [torch.from_numpy(rows.values[begin:end])]
    if missing := trainer.micro - len(tokens):
        tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
        targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORED)])
        documents = torch.cat([documents, documents.new_zeros(missing, documents.shape[1])])
        values = [torch.cat([v, v.new_zeros(missing, v.shape[1])]) for v in values]
    move = {"device": device, "non_blocking": True}
    seen = documents.to(**move) if trainer.masked else None
    return tokens.to(**move), targets.to(**move), seen, *(v.to(**move) for v in values)
