"""What happens in a decay, step by step (arXiv 2404.06395, section 4.4): a second pass over a run's own batches, watched.

The numbers of two consecutive updates are those of ``train/pairs.py``; besides, at some steps,

    sharpness  ĝ(t)·H·ĝ(t), ĝ = g/‖g‖, the second derivative along the gradient, on the step's own batch.

The pass is the loop itself with an optimizer that looks before it steps, so it makes the same updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from windtunnel.base.errors import WindtunnelError
from windtunnel.base.runtime import Runtime
from windtunnel.corpus.store import Corpus
from windtunnel.model.transformer import Transformer
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.pairs import Sums, added, inner_products, nothing, pair_numbers, watched
from windtunnel.train.stage import Stage
from windtunnel.train.step import Trainer

_STEP = 1e-3
"""Length of the finite difference for the sharpness, as a share of the parameters' norm."""


@dataclass(frozen=True)
class Sampling:
    """Which steps are looked at: every so many, the sharpness at every so many of those, and the distance of snapshots."""

    every: int = 1
    sharpness_every: int = 5
    window: int = 20


@dataclass
class Probe:
    """Looks at weights and gradients around each step of one pass."""

    model: Transformer
    compute: Any
    sampling: Sampling
    first: int
    pairs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    moves: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seconds: float = 0.0
    _calls: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    _before: dict[str, tuple[Tensor, Tensor]] | None = None
    _open: dict[str, Any] = field(default_factory=dict[str, Any])
    _snapshot: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        self.step = self.first

    def watched(self, model: Transformer, *arguments: Any) -> Any:
        """The objective, remembering the batch where the sharpness will be asked for."""
        if self._sharp:
            self._calls.append(arguments)
        return self.compute(model, *arguments)

    def before(self) -> None:
        """Gradients are there, the update is not made yet."""
        begun = time.perf_counter()
        if not self._snapshot:
            self._snapshot = self._matrices()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if self._before is not None:  # the pair of the step before closes with this step's gradient
            self._close(gradients)
        if self._due:
            self._before = {n: (gradients[n].clone(), p.detach().clone()) for n, p in self.model.named_parameters()}
            self._open = {"step": self.step + 1}
            if self._sharp:
                self._open["sharpness"] = self._sharpness(gradients)
        self._calls = []
        self.seconds += time.perf_counter() - begun

    def after(self) -> None:
        """The update is made."""
        begun = time.perf_counter()
        self.step += 1
        if self._before is not None:  # from here on a pair holds the move in place of the weights
            now = dict(self.model.named_parameters())
            self._before = {name: (g, now[name].detach() - x) for name, (g, x) in self._before.items()}
        if (self.step - self.first) % self.sampling.window == 0:
            now = self._matrices()
            largest = {name: float((now[name] - was).abs().max()) for name, was in self._snapshot.items()}
            self.moves.append({"step": self.step, "largest": largest})
            self._snapshot = now
        self.seconds += time.perf_counter() - begun

    @property
    def _due(self) -> bool:
        return (self.step - self.first) % self.sampling.every == 0

    @property
    def _sharp(self) -> bool:
        return (self.step - self.first) % (self.sampling.every * self.sampling.sharpness_every) == 0

    def _matrices(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.ndim >= 2}

    def _close(self, gradients: Mapping[str, Tensor]) -> None:
        assert self._before is not None
        roles: dict[str, Sums] = {}
        for name, (g, v) in self._before.items():
            role = self.model.roles[name].value
            roles[role] = added(roles.get(role, nothing()), inner_products(g, gradients[name], v))
        self.pairs.append({**self._open, "roles": roles})
        self._before, self._open = None, {}

    def _sharpness(self, gradients: Mapping[str, Tensor]) -> float:
        """By central difference of the gradient along itself. Weights and gradients are put back as they were."""
        parameters = dict(self.model.named_parameters())
        length = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        size = _STEP * math.sqrt(sum(float((p.detach().double() ** 2).sum()) for p in parameters.values()))
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        grads = {name: p.grad for name, p in parameters.items()}
        slopes = []
        for sign in (1.0, -1.0):
            for name, p in parameters.items():
                p.grad = None
                p.data.copy_(kept[name] + sign * size / length * gradients[name])
            for arguments in self._calls:
                loss, _ = self.compute(self.model, *arguments)
                loss.backward()
            along = (
                float((p.grad.double() * gradients[n].double()).sum())
                for n, p in parameters.items()
                if p.grad is not None
            )
            slopes.append(sum(along) / length)
        for name, p in parameters.items():
            p.data.copy_(kept[name])
            p.grad = grads[name]
        return (slopes[0] - slopes[1]) / (2 * size)


class WatchedWorkshop(Workshop):
    """A workshop whose trainers carry a probe, kept as ``probe``."""

    probe: Probe

    def __init__(self, runtime: Runtime, sampling: Sampling, first: int) -> None:
        super().__init__(runtime)
        self._sampling, self._first = sampling, first

    def trainer(self, stage: Stage) -> Trainer:
        made = super().trainer(stage)
        self.probe = Probe(made.model, made.compute, self._sampling, self._first)
        return replace(made, optimizer=watched(made.optimizer, self.probe), compute=self.probe.watched)


def second_pass(
    stage: Stage, corpora: Mapping[str, Corpus], parent: Path | None, sampling: Sampling, scratch: Path, runtime: Runtime
) -> dict[str, Any]:  # fmt: skip
    """Makes a stage's updates once more from its start and says what was seen.

    Args:
        stage: without scores and checkpoints; its start and ``parent`` say where the pass begins.
        scratch: an empty folder for the pass's own records.

    Raises:
        WindtunnelError: an update was skipped.

    Returns:
        ``steps``: a dictionary for each pair of steps, with ``roles`` for each role's share of the parameters; ``moves``: the
        largest change of a matrix's entries since the snapshot before; ``losses`` and ``rates`` by step; ``overhead``.
    """
    workshop = WatchedWorkshop(runtime, sampling, stage.first_step)
    begun = time.perf_counter()
    skipped = run_stage(stage, scratch, corpora, workshop, parent=parent)["skipped"]
    whole = time.perf_counter() - begun
    metrics = dict(read_metrics(scratch))
    if skipped:
        raise WindtunnelError(
            f"{stage.name}: {skipped} updates were not finite and were skipped: their steps cannot be paired"
        )
    norms = {step: values["gradient_norm"] for step, values in metrics.items()}
    steps = [_pair(pair, norms) for pair in workshop.probe.pairs]
    return {
        "first": stage.first_step, "last": stage.steps, "sampling": vars(sampling).copy(), "steps": steps,
        "moves": workshop.probe.moves,
        "losses": [[step, values["loss"]] for step, values in metrics.items()],
        "rates": [[step, values["learning_rate"]] for step, values in metrics.items()],
        "overhead": workshop.probe.seconds / max(1e-9, whole - workshop.probe.seconds),
        "roles": {name: role.value for name, role in workshop.probe.model.roles.items()},
    }  # fmt: skip


def _pair(pair: Mapping[str, Any], norms: Mapping[int, float | None]) -> dict[str, Any]:
    found = pair_numbers(pair["roles"], norms.get(pair["step"]), norms.get(pair["step"] + 1))
    return {"step": pair["step"], "sharpness": pair.get("sharpness"), **found}
