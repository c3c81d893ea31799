"""Finished runs as points (N, D, loss), and what makes a set of them unusable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from windtunnel.base.units import si
from windtunnel.laws.fit import Array, LawError


@dataclass(frozen=True)
class Point:
    """One finished run: N, D (decay included), final held-out loss, and the trunk (cluster) that it was grown from."""

    parameters: float
    tokens: float
    loss: float
    cluster: str
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters, "tokens": self.tokens, "loss": self.loss, "cluster": self.cluster,
            "seed": self.seed,
        }  # fmt: skip


def check_points(points: Sequence[Point], *, sizes: int = 2) -> None:
    """Refuses what no law can be fitted to.

    Raises:
        LawError: a value is not finite and positive, a point occurs twice, two losses contradict each other, a trunk
            has two sizes, or there are fewer than ``sizes`` distinct N.
    """
    seen: dict[tuple[float, float, str, int], float] = {}
    owner: dict[str, float] = {}
    losses: dict[tuple[float, float], list[float]] = {}
    for index, p in enumerate(points):
        where = f"points[{index}] ({p.cluster}, N = {si(p.parameters)}, D = {si(p.tokens)}, seed {p.seed})"
        for what, value in (("parameters", p.parameters), ("tokens", p.tokens), ("loss", p.loss)):
            if not (math.isfinite(value) and value > 0):
                raise LawError(where, f"expected a finite positive {what}, got {value}", "leave diverged runs out")
        key = (p.parameters, p.tokens, p.cluster, p.seed)
        if key in seen:
            word = "the same point twice" if seen[key] == p.loss else f"losses {seen[key]:g} and {p.loss:g} for one run"
            raise LawError(where, f"got {word}", "give each run once")
        seen[key] = p.loss
        if owner.setdefault(p.cluster, p.parameters) != p.parameters:
            raise LawError(where, "got two sizes in one trunk", "give each trunk its own cluster name")
        losses.setdefault((p.parameters, p.tokens), []).append(p.loss)
    for (n, d), values in losses.items():
        if max(values) > 1.1 * min(values):
            raise LawError(
                f"points at N = {si(n)}, D = {si(d)}",
                f"expected seeds to agree within 10 %, got losses {min(values):.4g} to {max(values):.4g}",
                "leave the diverged run out",
            )
    distinct = len({p.parameters for p in points})
    if distinct < sizes:
        raise LawError("points", f"expected at least {sizes} sizes, got {distinct}", "train proxies of more sizes")


def columns(points: Sequence[Point]) -> tuple[Array, Array, Array]:
    """N, D and log loss as arrays."""
    table = np.array([[p.parameters, p.tokens, math.log(p.loss)] for p in points], dtype=np.float64)
    return table[:, 0], table[:, 1], table[:, 2]
