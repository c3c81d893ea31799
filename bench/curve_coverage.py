"""Does the band of a curve forecast over model size hold what it says? Planted worlds, simulated proxies, one target each.

    python bench/curve_coverage.py [--draws 40] [--json]

Each draw plants a curve law with random constants that change with size (kernel multi-power, which no forecast is fitted
with), trains three sizes in it with a trunk and three decays each, and forecasts a target 3 to 6 times the largest proxy
under a schedule that no proxy had. Every trunk and branch has a level of its own (seed noise .25 %), every mean loss 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence

import numpy as np

from windtunnel.laws.curve import Kernel
from windtunnel.laws.curve_law import Curve, CurveLaw
from windtunnel.laws.curve_sizes import SIZED, End, Proxy, SizedForecast, forecast_sizes
from windtunnel.laws.design import DecayRule, rates_of
from windtunnel.laws.points import Point
from windtunnel.train.schedule import Schedule

SIZES, LENGTHS, WARMUP, PEAK, TOKENS = (24e3, 53e3, 95e3), (300, 600, 1200), 24, 0.03, 1024
SEED_NOISE, POINT_NOISE, RATIO = 0.0025, 0.005, 0.35
UNSEEN = {
    "cosine": Schedule(WARMUP, decay_steps=1200, kind="cosine"),
    "linear 10 %": DecayRule(0.1, "linear", 0.1).schedule(1200, WARMUP),
    "linear to zero": DecayRule(0.5, "linear", 0.0).schedule(1200, WARMUP),
    "1-sqrt": DecayRule(0.3, "1-sqrt", 0.0).schedule(1200, WARMUP),
}


def world(rng: np.random.Generator) -> dict[str, float]:
    """Constants at the middle size, and their exponents in N."""
    return {
        "L0": rng.uniform(2.4, 3.4), "drop": rng.uniform(0.06, 0.16), "A": rng.uniform(0.8, 2.5), "p": rng.uniform(-0.2, 0.1),
        "alpha": rng.uniform(0.3, 0.7), "B": rng.uniform(8, 20), "q": rng.uniform(-0.05, 0.1), "C": rng.uniform(0.5, 2),
        "beta": rng.uniform(0.3, 0.6), "gamma": rng.uniform(0.3, 0.7),
    }  # fmt: skip


def law_at(constants: dict[str, float], size: float) -> CurveLaw:
    x, c = math.log(size / SIZES[1]), dict(constants)
    floor, drop, p, q = (c.pop(key) for key in ("L0", "drop", "p", "q"))
    return CurveLaw(
        "multipower",
        {
            **c,
            "L0": 1.5 + (floor - 1.5) * math.exp(-2 * drop * x),
            "A": c["A"] * math.exp(-p * x),
            "B": c["B"] * math.exp(q * x),
        },
    )


def run(name: str, law: CurveLaw, rates: np.ndarray, first: int, rng: np.random.Generator, level: float) -> Curve:
    at = np.unique(np.linspace(first, len(rates), 60 if first < 200 else 16).round().astype(np.int64))
    return Curve(name, rates, at, law.losses(rates, at) * np.exp(level + POINT_NOISE * rng.standard_normal(len(at))))


def simulate(
    constants: dict[str, float],
    rng: np.random.Generator,
    size: float,
    schedule: Schedule,
    kernels: Sequence[Kernel] = SIZED,
) -> tuple[SizedForecast, Curve, float]:
    """The forecast, the target's curve and its held-out loss."""
    proxies: list[Proxy] = []
    ends: list[End] = []
    half = SEED_NOISE * math.sqrt(0.5)
    for n in SIZES:
        law, level = law_at(constants, n), half * rng.standard_normal()
        flat = rates_of(Schedule(WARMUP), PEAK, round(0.8 * LENGTHS[-1]))
        proxies.append(Proxy(n, f"{n:g}", run(f"{n:g} trunk", law, flat, 100, rng, level)))
        for length in LENGTHS:
            decay = DecayRule(0.2, "exponential", 0.1).schedule(length, WARMUP)
            rates, own = rates_of(decay, PEAK, length), level + half * rng.standard_normal()
            first = round(0.8 * length) + 1
            proxies.append(Proxy(n, f"{n:g}", run(f"{n:g} {length}", law, rates, first, rng, own)))
            held = RATIO * law.final(rates) * math.exp(own)
            ends.append(End(Point(n, float(TOKENS * length), held, f"{n:g}"), rates))
    rates = rates_of(schedule, PEAK, LENGTHS[-1])
    said = forecast_sizes(proxies, ends, size, float(TOKENS * LENGTHS[-1]), rates, kernels=kernels)
    level, law = SEED_NOISE * rng.standard_normal(), law_at(constants, size)
    return said, run("target", law, rates, 100, rng, level), RATIO * law.final(rates) * math.exp(level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    begun, rows = time.time(), []
    for draw in range(arguments.draws):
        rng = np.random.default_rng(draw)
        name = list(UNSEEN)[draw % len(UNSEEN)]
        said, curve, outcome = simulate(world(rng), rng, 95e3 * rng.uniform(3, 6), UNSEEN[name])
        value, low, high = (np.interp(curve.steps, said.steps, part) for part in (said.value, said.low90, said.high90))
        final = said.final.expected
        rows.append({
            "schedule": name, "error": math.log(final.value / outcome), "half": final.half_width,
            "inside": bool(final.low90 <= outcome <= final.high90),
            "curve_error": float(np.abs(value / curve.losses - 1).mean()),
            "curve_inside": float(((low <= curve.losses) & (curve.losses <= high)).mean()),
        })  # fmt: skip
    for name in (*UNSEEN, "all"):
        mine = [row for row in rows if name in (row["schedule"], "all")]
        if arguments.json:
            print(json.dumps({"schedule": name, "rows": mine}))
            continue
        mean = {key: float(np.mean([abs(float(row[key])) for row in mine])) for key in mine[0] if key != "schedule"}
        print(
            f"{name:15} {len(mine):4d} worlds: |final error| {100 * mean['error']:.2f} %, half width {100 * mean['half']:.2f} %, "
            f"inside {100 * mean['inside']:.0f} %; curve: error {100 * mean['curve_error']:.2f} %, "
            f"inside {100 * mean['curve_inside']:.0f} %"
        )
    if not arguments.json:
        print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
