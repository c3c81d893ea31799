"""The coordinate check: does what the network computes change as much in wide models as in narrow ones?

For each width and seed a model takes a few steps; what it computes on one fixed batch is compared with initialisation (root
mean square of the change). Under a parametrization that carries over, log change against log width is flat (arXiv
2203.03466, appendix D.1); a missing multiplier tilts it.

Five kinds of quantity are measured. ``stream``: the residual stream after each layer. ``logits``: the logits of the tokens
that are scored. ``block``: outputs of attention and MLP blocks. ``all logits``: all of them. In the last two a random part,
which vanishes as width^-1/2, is still large at small widths: random signs of the first Adam step in the blocks, and logits
of tokens that no gradient pulls at. They lean towards negative slopes, and of these four only the first three are judged.

``update``: how large a matrix's change is as a map between vectors of root mean square 1, which is flat in width where a
parametrization meets the spectral condition (arXiv 2310.17813), for each role with the vectors that it stands between. Hidden
matrices, those of experts (the one that changed most) and the router: the largest singular value over √(rows/columns). The
head: the same, times the forward multiplier of the logits, without which it ought to grow as the width. The embedding, whose
input is one token out of many: the largest root mean square of a row (arXiv 2410.21265). A tied matrix counts as
embedding and as head.

Step 0 is the state before training, sizes instead of changes. Stream, blocks, embedding and hidden matrices are then as large in
every width, and judged. Logits and the head begin at width^-1/2 or fall less steeply, and the router, drawn like a hidden matrix
so that its first logits are equally large, at width^1/2: shown, not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.corpus.loader import Rows
from windtunnel.model.parametrization import NORMS, Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.balance import balanced
from windtunnel.train.growth import Balance
from windtunnel.train.objectives import IGNORED, OBJECTIVES, Objective
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.stage import AdamW
from windtunnel.train.step import Trainer, make_compute, train_step

BARS = {"stream": 0.05, "block": 0.10, "logits": 0.10, "update": 0.30}
"""The steepest slope that passes, by kind. Set after the record in docs/lab-log.md: µP stays below 0.02, 0.07 and 0.02.
Of updates µP shows −.20 (query and key at step 1, whose small gradients leave random signs), the standard one +1.26."""
EXPERTS_BARS = {**BARS, "stream": 0.10, "block": 0.15}
"""Where there are experts: a token that goes to another one changes a block's output at once, whatever the width."""
UPDATE = " update"
_FREE_AT_INIT = ("logits", "head" + UPDATE, "router" + UPDATE)


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

    @property
    def judged(self) -> bool:
        """Whether it ought to be zero, within a bar."""
        return self.kind in BARS and (self.step > 0 or not self.quantity.endswith(_FREE_AT_INIT))


@dataclass(frozen=True)
class CoordinateCheck:
    """Root-mean-square changes [seed, width, step, quantity] relative to initialisation."""

    widths: tuple[int, ...]
    steps: tuple[int, ...]
    quantities: tuple[str, ...]
    changes: np.ndarray
    own_bars: Mapping[str, float] = field(default_factory=dict[str, float])

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

    @property
    def bars(self) -> Mapping[str, float]:
        """The steepest slope that passes, by kind: ``own_bars`` before those of the record."""
        usual = EXPERTS_BARS if any(q.endswith("router" + UPDATE) for q in self.quantities) else BARS
        return {**usual, **self.own_bars}

    def failures(self) -> list[Slope]:
        """The slopes that are steeper than the bar of their kind; none means that the check passes."""
        return [slope for slope in self.slopes() if slope.judged and abs(slope.value) > self.bars[slope.kind]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON: slopes with their kinds, and the changes as geometric means over seeds [width, step, quantity]."""
        return {
            "widths": list(self.widths), "steps": list(self.steps), "quantities": list(self.quantities),
            "slopes": [{**asdict(s), "kind": s.kind, "judged": s.judged, "low": _finite(s.low), "high": _finite(s.high)}
                       for s in self.slopes()],
            "failures": [f"{s.quantity} at step {s.step}: {s.value:+.3f}" for s in self.failures()],
            "changes": np.exp(np.log(self.changes).mean(0)).tolist(), "seeds": len(self.changes), "bars": dict(self.bars),
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
    balance: Balance | None = None,
    bars: Mapping[str, float] | None = None,
) -> CoordinateCheck:
    """Trains each shape from each seed for a few steps at the full learning rate and measures the changes.

    Args:
        parametrization: what is checked.
        shapes: models that differ in one dimension, usually width.
        batches: read in turn, each seed from another one on; the first is also what the changes are measured on.
        seeds: of initialisation and data order.
        steps: after which to measure; 0 for the state before training.
        optimizer: AdamW's constants; the defaults are the paper's.
        balance: what keeps experts equally busy, where there are some.
        bars: the steepest slopes that pass, of the kinds for which they are not those of the record.

    Raises:
        ValueError: a change is zero or not finite.
    """
    constants, objective = optimizer or AdamW(), balanced(OBJECTIVES["lm"], balance)
    changes = [
        [_changes(Transformer(shape, parametrization), seed, batches, steps, constants, objective) for shape in shapes]
        for seed in seeds
    ]
    values = np.array([[[list(step.values()) for step in run] for run in runs] for runs in changes])
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("a change is zero or not finite: the models did not train")
    return CoordinateCheck(tuple(s.width for s in shapes), tuple(steps), tuple(changes[0][0][0]), values, bars or {})


def _changes(
    model: Transformer, seed: int, batches: Sequence[Rows], steps: Sequence[int], constants: AdamW, objective: Objective
) -> list[dict[str, float]]:
    model.init_weights(seed)
    compute, runtime = make_compute(objective, compiled=False), Runtime(compiled=False)
    optimizer = build_optimizer(model, constants)
    trainer = Trainer(model, optimizer, objective, compute, runtime, len(batches[0]), constants.clip)
    at_start, weights = _outputs(model, batches[0]), _matrices(model)
    measured: list[dict[str, float]] = []
    if 0 in steps:
        zeros = {name: torch.zeros_like(value) for name, value in at_start.items()}
        measured.append(
            _distances(model, at_start, zeros, weights, {n: torch.zeros_like(w) for n, w in weights.items()})
        )
    for step in range(1, max(steps) + 1):
        train_step(trainer, batches[(seed + step) % len(batches)], constants.learning_rate)
        if step in steps:
            measured.append(_distances(model, _outputs(model, batches[0]), at_start, _matrices(model), weights))
    return measured


def _distances(
    model: Transformer,
    now: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    earlier: Mapping[str, Tensor],
) -> dict[str, float]:
    """Root mean squares of outputs' changes, and sizes of weights' changes as maps between vectors of root mean square 1."""
    out = {name: (now[name] - before[name]).square().mean().sqrt().item() for name in now}
    for name, weight in weights.items():
        role, change = model.roles[name], (weight - earlier[name]).double()
        what = name.removesuffix(".weight") + UPDATE
        if role in (Role.EMBEDDING, Role.TIED_EMBEDDING):
            out[what] = float(change.square().mean(1).max().sqrt())
        if role is Role.TIED_EMBEDDING:
            what = "head" + UPDATE
        if role is not Role.EMBEDDING:
            multiplier = float(model.logit_multiplier) if what == "head" + UPDATE else 1.0
            out[what] = multiplier * _spectral_norm(change) / math.sqrt(change.shape[-2] / change.shape[-1])
    return out


def _spectral_norm(matrix: Tensor) -> float:
    """The largest singular value; of a stack of matrices that of the largest."""
    square = matrix @ matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix.mT @ matrix
    return float(torch.linalg.eigvalsh(square)[..., -1].max().clamp(min=0).sqrt())


def _matrices(model: Transformer) -> dict[str, Tensor]:
    """Copies of everything but the gains of norms."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if model.roles[name] not in NORMS
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
