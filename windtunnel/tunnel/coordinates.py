"""The coordinate check: does what the network computes change as much in wide models as in narrow ones?

For each width and seed a model takes a few steps; what it computes on one fixed batch is compared with initialisation (root
mean square of the change). Under a parametrization that carries over, log change against log width is flat (arXiv
2203.03466, appendix D.1); a missing multiplier tilts it.

Five kinds of quantity are measured. ``stream``: the residual stream after each layer. ``logits``: the logits of the tokens
that are scored. ``block``: outputs of attention and MLP blocks. ``all logits``: all of them. In the last two a random part,
which vanishes as width^-1/2, is still large at small widths: random signs of the first Adam step in the blocks, and logits
of tokens that no gradient pulls at. They lean towards negative slopes, and of these four only the first three are judged.
``update``: the largest singular value of a hidden matrix's change, over √(rows/columns): flat where a parametrization meets
the spectral condition (arXiv 2310.17813).

Step 0 is the state before training: sizes instead of changes, shown and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.corpus.loader import Rows
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.objectives import IGNORED, OBJECTIVES
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.stage import AdamW
from windtunnel.train.step import Trainer, make_compute, train_step

BARS = {"stream": 0.05, "block": 0.10, "logits": 0.10, "update": 0.30}
"""The steepest slope that passes, by kind. Set after the record in docs/lab-log.md: µP stays below 0.02, 0.07 and 0.02.
Of updates µP shows −.20 (query and key at step 1, whose small gradients leave random signs), the standard one +1.26."""
UPDATE = " update"


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
        """``stream``, ``block``, ``logits``, ``all logits`` or ``update``."""
        if self.quantity.endswith(UPDATE):
            return "update"
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
        return max(
            (slope for slope in self.slopes() if slope.kind == kind and slope.step), key=lambda slope: abs(slope.value)
        )

    def failures(self, bars: Mapping[str, float] = BARS) -> list[Slope]:
        """The slopes that are steeper than the bar of their kind; none means that the check passes."""
        return [slope for slope in self.slopes() if slope.step and abs(slope.value) > bars.get(slope.kind, np.inf)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON: slopes with their kinds, and the changes as geometric means over seeds [width, step, quantity]."""
        return {
            "widths": list(self.widths), "steps": list(self.steps), "quantities": list(self.quantities),
            "slopes": [{**asdict(s), "kind": s.kind, "low": _finite(s.low), "high": _finite(s.high)} for s in self.slopes()],
            "failures": [f"{s.quantity} at step {s.step}: {s.value:+.3f}" for s in self.failures()],
            "changes": np.exp(np.log(self.changes).mean(0)).tolist(), "seeds": len(self.changes), "bars": BARS,
        }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


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
        steps: after which to measure; 0 for the state before training.
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
    at_start, weights = _outputs(model, batches[0]), _hidden(model)
    measured: list[dict[str, float]] = []
    if 0 in steps:
        zeros = {name: torch.zeros_like(value) for name, value in at_start.items()}
        measured.append(_distances(at_start, zeros, weights, {n: torch.zeros_like(w) for n, w in weights.items()}))
    for step in range(1, max(steps) + 1):
        train_step(trainer, batches[(seed + step) % len(batches)], constants.learning_rate)
        if step in steps:
            measured.append(_distances(_outputs(model, batches[0]), at_start, _hidden(model), weights))
    return measured


def _distances(
    now: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    earlier: Mapping[str, Tensor],
) -> dict[str, float]:
    """Root mean squares of outputs' changes; spectral norms of weights' changes over √(rows/columns), of experts the largest."""
    out = {name: (now[name] - before[name]).square().mean().sqrt().item() for name in now}
    for name, weight in weights.items():
        rows, columns = weight.shape[-2:]
        change = (weight - earlier[name]).double()
        square = change @ change.mT if rows < columns else change.mT @ change
        largest = float(torch.linalg.eigvalsh(square)[..., -1].max().clamp(min=0).sqrt())
        out[name + UPDATE] = largest / (rows / columns) ** 0.5
    return out


def _hidden(model: Transformer) -> dict[str, Tensor]:
    """Copies of the hidden matrices."""
    return {
        name.removesuffix(".weight"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if model.roles[name] is Role.HIDDEN
    }


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
