"""The coordinate check: does what the network computes change as much in wide models as in narrow ones?

For each width and seed a model takes a few steps; what it computes on one fixed batch is compared with initialisation (root
mean square of the change). Under a parametrization that carries over, log change against log width is flat (arXiv
2203.03466, appendix D.1); a missing multiplier tilts it.

Four kinds of quantity are measured. ``stream``: the residual stream after each layer. ``logits``: the logits of the tokens
that are scored. ``block``: outputs of attention and MLP blocks. ``all logits``: all of them. In the last two a random part,
which vanishes as width^-1/2, is still large at small widths: random signs of the first Adam step in the blocks, and logits
of tokens that no gradient pulls at. They lean towards negative slopes, and only the first three are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from windtunnel.train.objectives import IGNORED, OBJECTIVES
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.stage import AdamW
from windtunnel.train.step import Trainer, make_compute, train_step

BARS = {"stream": 0.05, "block": 0.10, "logits": 0.10}
"""The steepest slope that passes, by kind. Set after the record in docs/lab-log.md: µP stays below 0.02, 0.07 and 0.02."""


@dataclass(frozen=True)
class Slope:
    """How one quantity's change at one step grows with width: the exponent, with a 90 % interval over seeds."""

    quantity: str
    step: int
    value: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """``stream``, ``block``, ``logits`` or ``all logits``."""
        if self.quantity.startswith("layers."):
            return "block" if self.quantity.endswith((".attention", ".mlp")) else "stream"
        return self.quantity


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

    def steepest(self, kind: str) -> Slope:
        """The slope of that kind that is farthest from zero."""
        return max((slope for slope in self.slopes() if slope.kind == kind), key=lambda slope: abs(slope.value))

    def failures(self, bars: Mapping[str, float] = BARS) -> list[Slope]:
        """The slopes that are steeper than the bar of their kind; none means that the check passes."""
        return [slope for slope in self.slopes() if abs(slope.value) > bars.get(slope.kind, np.inf)]


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
        batches: read in turn, each seed from another one on; the first is also what the changes are measured on.
        seeds: of initialisation and data order.
        steps: after which to measure.
        optimizer: AdamW's constants; the defaults are the paper's.

    Raises:
        ValueError: a change is zero or not finite.
    """
    constants = optimizer or AdamW()
    changes = [
        [_changes(Transformer(shape, parametrization), seed, batches, steps, constants) for shape in shapes]
        for seed in seeds
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
    """What the model computes on a batch, by name of the quantity."""
    with _recorded(model) as outputs:
        logits = model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents))[..., : model.shape.vocab]
    targets = torch.from_numpy(rows.targets)
    scored = targets != IGNORED
    return {**outputs, "logits": logits[scored].gather(-1, targets[scored][:, None]), "all logits": logits}


@contextmanager
def _recorded(model: Transformer) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of layers and of their blocks while the model runs."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if name.startswith("layers.") and (name.count(".") == 1 or name.endswith((".attention", ".mlp")))
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
