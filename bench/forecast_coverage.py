"""Does the forecast's interval hold what it says? Planted worlds, simulated proxies, one outcome each.

    python bench/forecast_coverage.py [--draws 300] [--world NAME ...] [--json]

Each draw plants a world with random constants of a size that was measured on tiny models (1.2 to 2.2 nats per byte),
trains three sizes at three token counts on 1 to 3 seeds in it (noise half of each trunk, half of each branch) and
forecasts a target 3.4 times the largest proxy, which then falls with its own noise. Two worlds have no candidate form:
``repetition`` (data repeated up to 2.4 times counts less, and more so for larger models), ``drift`` (curvature in log N).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import numpy as np

from windtunnel.laws.forecast import forecast
from windtunnel.laws.points import Point

WORLDS = ("additive", "coupled", "skaling", "repetition", "drift")
SIZES, LENGTHS, TARGET = (0.024e6, 0.053e6, 0.095e6), (1.6e6, 3.2e6, 6.4e6), (0.319e6, 6.4e6)
_REFERENCE = (0.095e6, 3.2e6)
_UNIQUE = 6.4e6 / 2.4


def plant(name: str, rng: np.random.Generator) -> Callable[[float, float], float]:
    """A random loss function of N and D: level, slopes (in all about .1 an e-fold), balance and floor are drawn."""
    form = str(rng.choice(WORLDS[:3])) if name in WORLDS[3:] else name
    level, balance = math.log(rng.uniform(1.35, 1.65)), rng.uniform(0.35, 0.65)
    if form == "additive":
        k, floor, p, q = 1.0, rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.55), rng.uniform(0.2, 0.55)
    elif form == "coupled":
        k, floor, p = rng.uniform(0.12, 0.30), 0.0, rng.uniform(0.12, 0.28)
        q = k
    else:
        k, floor, p, q = rng.uniform(0.31, 0.45), rng.uniform(0.1, 0.4), rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4)
    a, b = (level + math.log(1 - floor) + k * math.log(share) for share in (balance, 1 - balance))
    memory, harm, drift = rng.uniform(3, 15), rng.uniform(-0.008, 0.012), rng.uniform(-0.006, 0.006)

    def loss(n: float, d: float) -> float:
        x, epochs = math.log(n / _REFERENCE[0]), d / _UNIQUE
        repeated = name == "repetition" and epochs > 1
        seen = _UNIQUE * (1 + memory * (1 - math.exp(-(epochs - 1) / memory))) if repeated else d
        y = math.log(seen / _REFERENCE[1])
        value = math.exp(k * float(np.logaddexp((a - p * x) / k, (b - q * y) / k))) + floor * math.exp(level)
        if repeated:
            value *= 1 + harm * math.sqrt(n / TARGET[0]) * (epochs - 1) / 1.4
        return value * math.exp(drift * x * x) if name == "drift" else value

    return loss


def simulate(name: str, rng: np.random.Generator, noise: float, seeds: int) -> tuple[list[Point], float]:
    """Proxies and the target's outcome."""
    loss = plant(name, rng)
    half = noise * math.sqrt(0.5)
    points: list[Point] = []
    for n in SIZES:
        for seed in range(seeds):
            shared = half * rng.normal()
            points += [
                Point(n, d, loss(n, d) * math.exp(shared + half * rng.normal()), f"{n:g}-{seed}", seed) for d in LENGTHS
            ]
    return points, loss(*TARGET) * math.exp(noise * rng.normal())


def cover(name: str, noise: float, seeds: int, draws: int) -> dict[str, float]:
    """Coverage, width and errors over many draws; errors and widths as shares of the outcome."""
    rng = np.random.default_rng([WORLDS.index(name), round(noise * 1e5), seeds])
    rows: list[list[float]] = []
    for _ in range(draws):
        points, outcome = simulate(name, rng, noise, seeds)
        said = forecast(points, *TARGET)
        e = said.expected
        rows.append([
            e.low90 <= outcome <= e.high90, e.low50 <= outcome <= e.high50, e.half_width, abs(e.value / outcome - 1),
            *(abs(said.naive[key].value / outcome - 1) for key in ("largest", "line")),
            abs(e.value / outcome - 1) <= 0.02,
        ])  # fmt: skip
    table = np.array(rows, dtype=float)
    names = ("coverage90", "coverage50", "half_width", "error", "error_largest", "error_line", "within_2_percent")
    return {key: float(value) for key, value in zip(names, table.mean(0), strict=True)} | {
        "wide_share": float((table[:, 2] > 0.03).mean())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--world", choices=WORLDS, nargs="+", default=WORLDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    cells: list[dict[str, object]] = []
    worlds: dict[str, dict[str, float]] = {}
    for world in options.world:
        results = []
        for noise in (0.0015, 0.003):
            for seeds in (1, 2, 3):
                results.append(cover(world, noise, seeds, options.draws))
                cells.append({"world": world, "noise": noise, "seeds": seeds, **results[-1]})
        worlds[world] = {key: float(np.mean([r[key] for r in results])) for key in results[0]}
        if not options.json:
            for cell in cells[-6:]:
                print(_line(f"{world:10s} noise {cell['noise']:.2%} seeds {cell['seeds']}", cell))
            print(_line(f"{world:10s} all", worlds[world]))
    seconds = time.perf_counter() - began
    if options.json:
        print(json.dumps({"draws": options.draws, "seconds": seconds, "worlds": worlds, "cells": cells}, indent=1))
    else:
        print(f"{options.draws} draws a cell, {seconds / len(cells) / options.draws * 1000:.0f} ms a forecast")


def _line(head: str, r: dict[str, object] | dict[str, float]) -> str:
    return (
        f"{head:34s} 90 % covers {r['coverage90']:5.1%}  50 % {r['coverage50']:4.0%}  half-width {r['half_width']:.2%}"
        f"  |error| {r['error']:.2%}  largest {r['error_largest']:.1%}  line {r['error_line']:.1%}"
        f"  within 2 % {r['within_2_percent']:.0%}"
    )


if __name__ == "__main__":
    main()
