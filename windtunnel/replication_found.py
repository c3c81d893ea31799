"""What a claim is and what it comes to: decided parts, figures as data, notes. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from windtunnel.base.units import minus
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.train.stage import Stage
from windtunnel.tunnel.claims import Part

LN2 = math.log(2)


@dataclass(frozen=True)
class Series:
    """A named line of a figure; ``dots`` marks its points, ``line`` joins them."""

    name: str
    points: tuple[tuple[float, float], ...]
    dots: bool = True
    line: bool = True


@dataclass(frozen=True)
class Figure:
    """A figure as data: axes, series, what it shows."""

    caption: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Found:
    """What a claim came to: decided parts, figures, and numbers that decide nothing but belong to the picture."""

    parts: tuple[Part, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One experiment of the paper: its name here, where it stands there, what is said, and how it is tried."""

    name: str
    where: str
    says: str
    test: Callable[[Lab], Found] = field(compare=False)


def bits(loss: float) -> float:
    return loss / LN2


def signed(value: float, unit: str = " %") -> str:
    return minus(f"{value:+.2f}{unit}")


def means(lab: Lab, runs: Sequence[Sequence[Stage]]) -> list[float]:
    """Mean loss over seeds, in bits per byte, of runs[seed][point], a value a point."""
    return [bits(fmean(lab.loss(stage) for stage in stages)) for stages in zip(*runs, strict=True)]


def points_of(stages: Sequence[Stage], values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    pairs = [(float(stage.tokens), value) for stage, value in zip(stages, values, strict=True)]
    return tuple(pair for pair in pairs if math.isfinite(pair[1]))


def tuned_rates(lab: Lab, *kinds: str) -> str:
    words = [f"{kind} {lab.tuned(kind):g} of {', '.join(f'{r:g}' for r in lab.grids[kind])}" for kind in kinds]
    return f"base rates tuned on another seed at {TUNED_AT}N: {'; '.join(words)}"


def to_fact(claim: Claim, found: Found) -> dict[str, Any]:
    """A claim with what it came to, as JSON."""
    figures = [
        {"caption": f.caption, "x": f.x, "y": f.y, "log_x": f.log_x, "log_y": f.log_y,
         "series": [{"name": s.name, "points": [list(p) for p in s.points if math.isfinite(p[1])],
                     "dots": s.dots, "line": s.line} for s in f.series]}
        for f in found.figures
    ]  # fmt: skip
    return {
        "name": claim.name, "where": claim.where, "says": claim.says, "parts": [part.to_dict() for part in found.parts],
        "figures": figures, "notes": list(found.notes),
    }  # fmt: skip
