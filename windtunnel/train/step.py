"""One optimizer step: micro-batches, gradients normalised by counts, clip, update. It fits one screen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.model.transformer import Transformer
from windtunnel.train.balance import Balanced, begin_step, end_step
from windtunnel.train.noise import Noise, split
from windtunnel.train.objectives import Objective
from windtunnel.train.optimizer import Optimizer, set_learning_rate
from windtunnel.train.pairs import LiveProbe
from windtunnel.train.parallel import average_gradients, global_norm_clip, local, sum_over_ranks


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
    noise_every: int = 0
    """Steps from one measurement of the gradient's noise to the next; 0 for none."""
    halved_every: int = 0
    """The same where a step is one micro-batch, which takes a second pass."""
    probe: LiveProbe | None = None
    """Looks at pairs of updates, where the stage asks for it."""
    reference: Callable[[Rows], Rows] | None = None
    """Adds to rows what a reference says of them, where one stands beside the model."""


@dataclass(frozen=True)
class StepReport:
    """What one step did. ``terms`` are means in the objective's units; ``applied`` is False for a skipped update."""

    terms: dict[str, float]
    gradient_norm: float
    applied: bool
    noise: Noise | None = None


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


def train_step(
    trainer: Trainer, rows: Rows, learning_rate: float, *, measure: bool = False, halve: bool = False
) -> StepReport:
    """Updates the weights once with this rank's rows, or leaves them as they were if anything is not finite.

    The sums of all micro-batches and ranks are divided by counts over all of them. A non-finite loss or gradient norm,
    which all ranks see alike, skips the update: neither weights nor moments change. With ``measure`` the report has the
    gradient's noise, where the step has several parts, or with ``halve`` two made of one; the update is the same, bit for bit.
    """
    device, objective, world = trainer.runtime.torch_device, trainer.objective, trainer.runtime.world
    *counts, batch = sum_over_ranks(np.append(objective.counts(rows), len(rows)), trainer.runtime).tolist()
    weights = np.asarray(objective.weights) / np.maximum(counts, 1)
    scale = torch.tensor(weights * world, dtype=torch.float32, device=device)  # gradients are averaged over ranks
    sums = torch.zeros(len(objective.names), dtype=torch.float64, device=device)
    begins = range(0, math.ceil(batch / world), trainer.micro)  # as many on every rank: sharded weights need all
    if isinstance(objective, Balanced):
        begin_step(trainer, [to_device(rows, begin, trainer) for begin in begins])
    one = len(begins) == 1 and world == 1
    halve = (
        halve and one and len(rows) > 1 and not isinstance(objective, Balanced)
    )  # whose terms are no sums over tokens
    parts = NormsOfParts(trainer.model, len(begins), trainer.runtime) if measure and (halve or not one) else None
    for begin in begins:
        loss, part = trainer.compute(trainer.model, *to_device(rows, begin, trainer), scale)
        loss.backward()
        sums += part
        if parts is not None and not halve:
            parts.add(objective.counts(rows.part(begin, trainer.micro))[0])
    if parts is not None and halve:
        parts.add_halves(trainer, rows, scale)
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
    return StepReport(terms, norm, applied, parts.noise(norm) if parts is not None else None)


class NormsOfParts:
    """Norms of the gradients of a step's micro-batches, each the difference that one backward pass made to the sum.

    Keeps a copy of the gradients from one to the next. The micro-batches that ranks with slices go through together are one
    part, each of those of ranks with copies is a part of its own.
    """

    def __init__(self, model: Transformer, parts: int, runtime: Runtime) -> None:
        self._parameters, self._left, self._runtime = list(model.parameters()), parts, runtime
        self._before: list[Tensor] = []
        self._counts: list[float] = []
        self._squares: list[Tensor] = []

    def add(self, count: float) -> None:
        """After the backward pass of a micro-batch in which this rank had ``count`` scored tokens."""
        now = [local(p.grad) for p in self._parameters if p.grad is not None]
        before, self._left = self._before, self._left - 1
        norms = [torch.linalg.vector_norm(g - b if before else g) for g, b in zip(now, before or now, strict=True)]
        self._before = [gradient.clone() for gradient in now] if self._left else []
        self._counts.append(count)
        self._squares.append(torch.stack(norms).double().square().sum())

    def add_halves(self, trainer: Trainer, rows: Rows, scale: Tensor) -> None:
        """After the backward pass of the only micro-batch: a second one of the same compiled shape, in which nothing is asked of
        the later half of the rows, gives the first half's gradient; what the whole has more is the other's.

        The whole gradient is put back as it was.
        """
        whole = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        targets, half = rows.targets.copy(), len(rows) // 2
        targets[half:] = IGNORED
        first = replace(rows, targets=targets)
        trainer.compute(trainer.model, *to_device(first, 0, trainer), scale)[0].backward()
        pairs = [
            (p.grad, g) for p, g in zip(self._parameters, whole, strict=True) if p.grad is not None and g is not None
        ]
        norms = [[torch.linalg.vector_norm(of(g, h)) for h, g in pairs] for of in (lambda _, h: h, torch.sub)]
        self._squares += [torch.stack(of_half).double().square().sum() for of_half in norms]
        every, own = (trainer.objective.counts(part)[0] for part in (rows, first))
        self._counts += [own, every - own]
        for parameter, gradient in zip(self._parameters, whole, strict=True):
            parameter.grad = gradient

    def noise(self, whole: float) -> Noise | None:
        """What they say together with the norm of the whole, before clipping; nothing where the step is one part."""
        runtime, mine = self._runtime, np.array([self._counts, [float(square) for square in self._squares]])
        if (
            runtime.world > 1 and not runtime.sharded
        ):  # the loss is scaled by the world, and no gradient was averaged yet
            every = np.zeros((runtime.world, *mine.shape))
            every[runtime.rank] = mine / [[1.0], [runtime.world**2]]
            counts, squares = sum_over_ranks(every, runtime).swapaxes(0, 1).reshape(2, -1)
        else:
            counts, squares = sum_over_ranks(mine, runtime)  # ranks hold disjoint slices of the gradients
        total = counts.sum()
        parts = [(m, square * (total / m) ** 2 if m else 0.0) for m, square in zip(counts, squares, strict=True)]
        return split(parts, whole**2)


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
