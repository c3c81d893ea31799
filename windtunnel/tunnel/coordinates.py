"""The coordinate check: does what the network computes change as much in wide models as in narrow ones?

For each width and seed a model takes a few steps; the change of every block's output and of the logits against
initialisation is measured on one fixed batch (root mean square). Under a parametrization that carries over, log change
against log width is flat (arXiv 2203.03466, appendix D.1); a missing multiplier tilts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.corpus.loader import Rows
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.objectives import OBJECTIVES
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.stage import AdamW
from windtunnel.train.step import Trainer, make_compute, train_step

LOGITS = "logits"


@dataclass(frozen=True)
class Slope:
    """How one quantity's change at one step grows with width: the exponent, with a 90 % interval over seeds."""

    quantity: str
    step: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CoordinateCheck:
    """Root-mean-square changes [seed, width, step, quantity] relative to initialisation."""

    widths: tuple[int, ...]
    steps: tuple[int, ...]
    quantities: tuple[str, ...]
    changes: np.ndarray

    def slopes(self) -> list[Slope]:
        """The least-squares slope of log change over log width, for each quantity and step."""
        x = np.log(self.widths)
        x = x - x.mean()
        of_seed = np.einsum("w,zwsq->zsq", x / (x @ x), np.log(self.changes))
        middle = of_seed.mean(0)
        seeds = len(of_seed)
        half = np.full_like(middle, np.inf)
        if seeds > 1:
            half = stats.t.ppf(0.95, seeds - 1) * of_seed.std(0, ddof=1) / np.sqrt(seeds)
        return [
            Slope(quantity, step, *(float(v[s, q]) for v in (middle, middle - half, middle + half)))
            for s, step in enumerate(self.steps)
            for q, quantity in enumerate(self.quantities)
        ]

    def steepest(self, *, logits: bool) -> Slope:
        """The slope farthest from zero among the logits, or among the block outputs."""
        return max((s for s in self.slopes() if (s.quantity == LOGITS) == logits), key=lambda s: abs(s.value))

    def passes(self, hidden: float, logits: float) -> bool:
        """Whether no slope is steeper than these bars."""
        return abs(self.steepest(logits=False).value) <= hidden and abs(self.steepest(logits=True).value) <= logits


def check_coordinates(
    parametrization: Parametrization,
    shapes: Sequence[Shape],
    batches: Sequence[Rows],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = (1, 3, 10),
    optimizer: AdamW | None = None,
) -> CoordinateCheck:
    """Trains each shape from each seed for a few steps at the full learning rate and measures the changes.

    Args:
        parametrization: what is checked.
        shapes: models that differ in one dimension, usually width.
        batches: one for each step; each seed reads them from another position on, the probe is the first.
        seeds: of initialisation and data order.
        steps: after which to measure.
        optimizer: AdamW's constants; the defaults are the paper's.

    Raises:
        ValueError: fewer batches than steps, or a change that is zero or not finite.
    """
    if len(batches) < max(steps):
        raise ValueError(f"{max(steps)} steps need as many batches, got {len(batches)}")
    constants = optimizer or AdamW()
    changes = [
        [_changes(Transformer(shape, parametrization), seed, batches, steps, constants) for shape in shapes] for seed in seeds
    ]
    values = np.array([[[list(step.values()) for step in run] for run in runs] for runs in changes])
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("a change is zero or not finite: the models did not train")
    return CoordinateCheck(tuple(s.width for s in shapes), tuple(steps), tuple(changes[0][0][0]), values)


def _changes(
    model: Transformer, seed: int, batches: Sequence[Rows], steps: Sequence[int], constants: AdamW
) -> list[dict[str, float]]:
    model.init_weights(seed)
    objective = OBJECTIVES["lm"]
    compute, runtime = make_compute(objective, compiled=False), Runtime(compiled=False)
    optimizer = build_optimizer(model, constants)
    trainer = Trainer(model, optimizer, objective, compute, runtime, len(batches[0]), constants.clip)
    at_start, measured = _outputs(model, batches[0]), []
    for step in range(1, max(steps) + 1):
        train_step(trainer, batches[(seed + step) % len(batches)], constants.learning_rate)
        if step in steps:
            now = _outputs(model, batches[0])
            measured.append({name: (now[name] - at_start[name]).square().mean().sqrt().item() for name in now})
    return measured


@torch.no_grad()
def _outputs(model: Transformer, rows: Rows) -> dict[str, Tensor]:
    """Every block's output and the logits of the real vocabulary."""
    with _recorded(model) as outputs:
        logits = model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents))
    return {**outputs, LOGITS: logits[..., : model.shape.vocab]}


@contextmanager
def _recorded(model: Transformer) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}
    blocks = [(name, block) for name, block in model.named_modules() if name.endswith((".attention", ".mlp"))]
    hooks = [
        block.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, block in blocks
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
