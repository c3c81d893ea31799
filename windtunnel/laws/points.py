"""Finished runs as points (N, D, loss), and what makes a set of them unusable."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.errors import RecipeError
from windtunnel.base.units import parse_count, si
from windtunnel.laws.fit import Array, LawError

_FAR = 0.05


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


def read_points(path: Path) -> list[Point]:
    """Runs from a CSV file with columns n, d, loss and, if several rows come from one trunk, cluster (and seed).

    Without a cluster each row is a run of its own. Counts may be written as 6.4M.

    Raises:
        LawError: the file cannot be read, lacks a column, or holds something else than numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LawError(str(path), f"expected a CSV file, got: {getattr(error, 'strerror', None) or error}") from None
    missing = [name for name in ("n", "d", "loss") if not rows or rows[0].get(name) is None]
    if missing:
        raise LawError(
            str(path), "expected rows under the columns n, d, loss (and cluster), got none of " + ", ".join(missing)
        )
    points: list[Point] = []
    for index, row in enumerate(rows):
        where = f"{path}, row {index + 2}"
        try:
            loss = float(row["loss"])
            seed = int(row.get("seed") or 0)
        except (TypeError, ValueError):
            raise LawError(where, f"expected a loss as a number, got {row['loss']!r}") from None
        n, d = (_count(row[key], where, key) for key in ("n", "d"))
        points.append(Point(n, d, loss, row.get("cluster") or f"row {index + 2}", seed))
    return points


def _count(text: str, where: str, key: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        try:
            return float(parse_count(text, key))
        except RecipeError:
            raise LawError(where, f"expected {key} as a count such as 6400000 or 6.4M, got {text!r}") from None


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


def far_off(points: Sequence[Point], residuals: Array) -> list[str]:
    """One sentence for each point so far above or below the law that its run has probably diverged.

    Args:
        residuals: predicted minus observed log losses. Far is more than 5 % and eight times their median size.
    """
    limit = max(_FAR, 8 * float(np.median(np.abs(residuals))))
    return [
        f"the run of '{p.cluster}' with N = {si(p.parameters)}, D = {si(p.tokens)} lies {100 * math.expm1(abs(r)):.0f} % "
        f"{'above' if r < 0 else 'below'} the law: leave it out if it diverged"
        for p, r in zip(points, residuals.tolist(), strict=True)
        if abs(r) > limit
    ]


def columns(points: Sequence[Point]) -> tuple[Array, Array, Array]:
    """N, D and log loss as arrays."""
    table = np.array([[p.parameters, p.tokens, math.log(p.loss)] for p in points], dtype=np.float64)
    return table[:, 0], table[:, 1], table[:, 2]
