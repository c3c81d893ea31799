"""Numbers of two consecutive updates (arXiv 2404.06395, section 4.4), and a probe that takes them while a stage trains.

With parameters x(t), gradient g(t) at x(t) and move v(t) = x(t+1) − x(t), g = g(t) and h = g(t+1):

    cosine     g·h / (‖g‖ ‖h‖)
    D1         h·v / ‖v‖                    slope of the loss along the path
    D2         (h − g)·v / ‖v‖²             its second derivative
    K          |D2| / (1 + D1²)^(3/2)       curvature of the loss on the path

The loop hands the optimizer clipped gradients; the norm that it records is the one before clipping, and all numbers are
brought back to it. Nothing here changes a weight, a gradient or a moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from windtunnel.base.runtime import Runtime
from windtunnel.model.transformer import Transformer
from windtunnel.train.metrics import LIVE, MOVE
from windtunnel.train.optimizer import Optimizer, Together
from windtunnel.train.parallel import local, sum_over_ranks

PRODUCTS = ("gg", "hh", "gh", "gv", "hv", "vv")
"""Inner products of g = g(t), h = g(t+1) and v = v(t)."""
Sums = dict[str, float]


def inner_products(g: Tensor, h: Tensor, v: Tensor) -> Sums:
    """The inner products of one tensor's gradients and move, in float64, and max |g|."""
    vectors = {"g": g.double(), "h": h.double(), "v": v.double()}
    out = {key: float((vectors[key[0]] * vectors[key[1]]).sum()) for key in PRODUCTS}
    return {**out, "max": float(g.abs().max()) if g.numel() else 0.0}


def added(sums: Sums, more: Sums) -> Sums:
    """Two disjoint sets of parameters together."""
    return {**{key: sums[key] + more[key] for key in PRODUCTS}, "max": max(sums["max"], more["max"])}


def nothing() -> Sums:
    """The sums of no parameters."""
    return dict.fromkeys((*PRODUCTS, "max"), 0.0)


def clip_scales(sums: Mapping[str, float], norm: float | None, next_norm: float | None) -> tuple[float, float]:
    """What undoes the clipping of g and h, given their norms before it."""
    pairs = ((norm, sums["gg"]), (next_norm, sums["hh"]))
    a, b = ((known or 0.0) / length if (length := math.sqrt(square)) else 0.0 for known, square in pairs)
    return a, b


def derivatives(sums: Mapping[str, float], scale: float = 1.0, next_scale: float = 1.0) -> dict[str, float | None]:
    """The numbers of one pair of steps from its inner products; the scales undo the clipping of g(t) and g(t+1).

    What divides by a norm of zero is None.
    """
    g, h, v = (math.sqrt(sums[key]) for key in ("gg", "hh", "vv"))
    first = next_scale * sums["hv"] / v if v else None
    second = (next_scale * sums["hv"] - scale * sums["gv"]) / sums["vv"] if v else None
    return {
        "norm": scale * g, "max": scale * sums["max"], "cosine": sums["gh"] / (g * h) if g and h else None,
        "d1": first, "d2": second,
        "curvature": abs(second) / (1 + first * first) ** 1.5 if first is not None and second is not None else None,
    }  # fmt: skip


def pair_numbers(roles: Mapping[str, Sums], norm: float | None, next_norm: float | None) -> dict[str, Any]:
    """The numbers of a pair of steps from the sums of each role, over all parameters and, as ``roles``, over each role's own.

    The norms are those of both whole gradients before clipping.
    """
    whole = nothing()
    for sums in roles.values():
        whole = added(whole, sums)
    scales = clip_scales(whole, norm, next_norm)
    return {**derivatives(whole, *scales), "roles": {role: derivatives(sums, *scales) for role, sums in roles.items()}}


class Looks(Protocol):
    """What looks before and after the update of a step."""

    def before(self) -> None: ...

    def after(self) -> None: ...


class Watched(Together):
    """Optimizers driven as one, with a probe that looks before and after every step."""

    def __init__(self, *parts: torch.optim.Optimizer, probe: Looks) -> None:
        super().__init__(*parts)
        self._probe = probe

    def step(self) -> None:
        self._probe.before()
        super().step()
        self._probe.after()


def watched(optimizer: Optimizer, probe: Looks) -> Watched:
    """The same optimizer with a probe."""
    return Watched(*(optimizer.parts if isinstance(optimizer, Together) else (optimizer,)), probe=probe)


class LiveProbe:
    """Takes a pair of updates every so many steps while a stage trains: update t if t is a multiple of ``every``, and t + 1.

    It keeps a copy of gradients and weights from the one to the other, and says besides how far the first update moved each
    matrix at most. Ranks with a copy of the weights see the same numbers
    and only the first looks; of ranks with slices each looks at its own, and ``closed`` adds them up. A pair that a stop, a
    skipped update or the end of the stage tears is left out.
    """

    def __init__(self, model: Transformer, every: int, runtime: Runtime) -> None:
        self._model, self._every, self._runtime = model, every, runtime
        self._looks = runtime.rank == 0 or runtime.sharded
        self._step = 0
        self._open: dict[str, tuple[Tensor, Tensor]] | None = None
        self._opened = (0, 0.0)
        self._roles = sorted({role.value for role in model.roles.values()})
        self._matrices = [name for name, p in model.named_parameters() if p.ndim >= 2]
        self._sums: dict[str, Sums] | None = None
        self._moves: dict[str, float] = {}
        self.seconds = 0.0
        """Time that it took so far."""

    def at(self, step: int) -> None:
        """The number of the step that comes now."""
        self._step = step

    def before(self) -> None:
        """Gradients are there, the update is not made yet."""
        begun = time.perf_counter()
        parameters = {n: p for n, p in self._model.named_parameters() if self._looks and p.grad is not None}
        if self._open is not None and self._opened[0] == self._step - 1:
            self._sums = {role: nothing() for role in self._roles}
            for name, (g, v) in self._open.items():
                if name in parameters:
                    role = self._model.roles[name].value
                    found = inner_products(g, local(_gradient(parameters[name])), v)
                    self._sums[role] = added(self._sums[role], found)
        self._open = None
        if self._step % self._every == 0:
            self._open = {n: (local(_gradient(p)).clone(), local(p.detach()).clone()) for n, p in parameters.items()}
        self.seconds += time.perf_counter() - begun

    def after(self) -> None:
        """The update is made: from here on an open pair holds the move in place of the weights."""
        if self._open is None:
            return
        begun = time.perf_counter()
        now = dict(self._model.named_parameters())
        self._open = {name: (g, local(now[name].detach()) - x) for name, (g, x) in self._open.items()}
        moved = {name: self._open[name][1] for name in self._matrices if name in self._open}
        tops = [v.abs().max() if v.numel() else v.new_zeros(()) for v in moved.values()]
        self._moves = dict(zip(moved, torch.stack(tops).tolist(), strict=True)) if tops else {}
        self.seconds += time.perf_counter() - begun

    def closed(self, norm: float, applied: bool) -> dict[str, float]:
        """The metrics of the pair that ended with this step; empty if none did. Every rank calls it.

        Args:
            norm: of this step's whole gradient before clipping.
            applied: False for a skipped update.
        """
        before, sums, self._sums = self._opened, self._sums, None
        self._opened = (self._step, norm)
        due = (self._step - 1) % self._every == 0 and before[0] == self._step - 1
        if not applied:
            self._open = None
        if not (due and applied):
            return {}
        roles, moves = self._over_ranks(sums or {}, self._moves)
        if not any(one["vv"] for one in roles.values()):
            return {}
        found = pair_numbers(roles, before[1], norm)
        out = {f"pair_{name}": found[name] for name in LIVE}
        for role, numbers in found["roles"].items():
            out |= {f"pair_{name}/{role}": numbers[name] for name in ("norm", *LIVE)}
        out |= {f"{MOVE}{name}": value for name, value in moves.items()}
        return {name: value for name, value in out.items() if value is not None}

    def _over_ranks(self, roles: dict[str, Sums], moves: dict[str, float]) -> tuple[dict[str, Sums], dict[str, float]]:
        if self._runtime.world == 1 or not self._runtime.sharded:
            return roles, moves
        keys = tuple(nothing())
        own = [roles.get(role, nothing())[key] for role in self._roles for key in keys]
        every = np.zeros((self._runtime.world, len(own) + len(self._matrices)))
        every[self._runtime.rank] = [*own, *(moves.get(name, 0.0) for name in self._matrices)]
        rows = sum_over_ranks(every, self._runtime)
        parts = rows[:, : len(own)].reshape(len(rows), len(self._roles), len(keys))
        together = np.where([key == "max" for key in keys], parts.max(0), parts.sum(0))
        sums = {
            role: dict(zip(keys, row, strict=True)) for role, row in zip(self._roles, together.tolist(), strict=True)
        }
        return sums, dict(zip(self._matrices, rows[:, len(own) :].max(0).tolist(), strict=True))


def _gradient(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
