"""How often does ``law decide`` pick between equal recipes that were really trained, and how often does it find a difference?

    PYTHONPATH=. python bench/decisions.py [--runs 240] [--tokens 120k] [--decisions 100] [--least 0.5%] [--home HOME] [--json]

One recipe is trained with many seeds (init and data order) on the quickstart's smallest proxy: 240 runs of 120k tokens, 3 to
15 minutes on two cores; all lie in a home, so that a call that was interrupted goes on. They are cut into quarters that share
no run, and each gives a quarter of the decisions. For one, the runs of a quarter are shuffled: seven of them say how large the
seed noise is, the others are pairs of unlike seeds, A and B, none of them used twice, and looks are taken as the decision asks
for them. Every pick is a false one. The power curve repeats this with the losses of B raised by a planted share.

Decisions of one quarter share runs, so that the binomial interval over all of them is a little narrow (with made-up losses the
picks of 100 scatter by 2.5 instead of 2.0): the counts of the quarters, which are independent, stand beside it.

Not yet run to its end: it has shown no figure, and ``make bench`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from windtunnel.base.units import Length, parse_count
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.laws.decision import Decision, Thresholds, follow, registry
from windtunnel.recipe import load_recipe
from windtunnel.study import make_trial, mean_loss
from windtunnel.transfer_study import open_program

KNOWN, QUARTERS = 7, 4
"""Runs of a decision that only speak for the seed noise; groups of runs that share none."""
EFFECTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Planted differences, in units of the least that matters."""


def trained(home: Path, recipe: str, overrides: Sequence[str], runs: int, tokens: int) -> tuple[float, list[float]]:
    """N, and the held-out loss of each seed; diverged runs are left out."""
    loaded = load_recipe(recipe, overrides)
    with Desk(Home(home), loaded.name, quiet=True) as desk:
        program = open_program(desk, loaded)
        assert loaded.tunnel is not None
        assert program.prepared is not None
        shape = program.shape_of(loaded.tunnel.proxies[0])
        stages = [make_trial(program, f"equal-{i:03d}", shape, {}, tokens, seed=20_000 + i) for i in range(runs)]
        results = desk.train(f"{runs} seeds of one recipe", "equal", stages, program.prepared)
    whole = [results[stage.key] for stage in stages]
    return float(shape.body), [mean_loss(r["scores"], loaded.mixture) for r in whole if "failed" not in r]


def outcomes(
    size: float, losses: Sequence[float], count: int, effect: float, thresholds: Thresholds
) -> list[tuple[int, Decision]]:
    """Quarter and last look of ``count`` decisions, B's losses raised by ``effect``."""
    found: list[tuple[int, Decision]] = []
    for quarter in range(QUARTERS):
        own, draw = np.array(losses[quarter::QUARTERS]), np.random.default_rng(quarter)
        each = count // QUARTERS + (quarter < count % QUARTERS)
        for _ in range(each):
            order = draw.permutation(own).tolist()
            noise = registry({size: [order[:KNOWN]]})[size]
            pairs = [(a, b * math.exp(effect)) for a, b in zip(order[KNOWN::2], order[KNOWN + 1 :: 2], strict=False)]
            found.append((quarter, follow(pairs, thresholds, noise=noise)))
    return found


def judged(size: float, losses: Sequence[float], count: int, thresholds: Thresholds) -> dict[str, Any]:
    """False picks with their binomial interval (95 %), and the share found of each planted difference."""
    power: list[dict[str, Any]] = []
    for times in EFFECTS:
        found = outcomes(size, losses, count, times * thresholds.least, thresholds)
        picks = [(quarter, one.outcome) for quarter, one in found if one.outcome in ("A", "B")]
        right = sum(outcome == "A" for _, outcome in picks)
        interval = stats.binomtest(right if times else len(picks), len(found)).proportion_ci(0.95)
        power.append({
            "planted_percent": 100 * times * thresholds.least, "decisions": len(found), "picked": len(picks),
            "right": right if times else 0, "low": float(interval.low), "high": float(interval.high),
            "by_quarter": [sum(quarter == q for quarter, _ in picks) for q in range(QUARTERS)],
            "too_close": sum(one.outcome == "too close" for _, one in found),
            "mean_pairs": float(np.mean([one.pairs for _, one in found])),
        })  # fmt: skip
    noise = registry({size: [losses]})[size]
    return {
        "parameters": size, "runs": len(losses), "noise_percent": 100 * noise.sd, "alpha": thresholds.alpha,
        "least_percent": 100 * thresholds.least, "false_picks": power[0], "power": power[1:],
    }  # fmt: skip


def shown(found: dict[str, Any]) -> str:
    """The findings in a few lines."""
    equal = found["false_picks"]
    lines = [
        f"{found['runs']} runs of {found['parameters']:,.0f} parameters, seed noise {found['noise_percent']:.2f} %",
        f"equal arms: {equal['picked']} false picks of {equal['decisions']} at nominal {100 * found['alpha']:g} % (95 %: "
        f"{100 * equal['low']:.1f} to {100 * equal['high']:.1f} %; by quarter {equal['by_quarter']}), {equal['too_close']} too "
        f"close, {equal['mean_pairs']:.1f} pairs on average",
    ]
    lines += [
        f"planted {row['planted_percent']:.2f} %: found in {row['right']} of {row['decisions']} (95 %: {100 * row['low']:.0f} to "
        f"{100 * row['high']:.0f} %), {row['picked'] - row['right']} the wrong way, {row['mean_pairs']:.1f} pairs on average"
        for row in found["power"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--tokens", default="120k")
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--least", default="0.5%")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--home", type=Path, default=Path("windtunnel-home"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    least = (KNOWN + 6) * QUARTERS
    if options.runs < least:
        parser.error(f"--runs: expected {least} or more, got {options.runs}")
    tokens = parse_count(options.tokens, "--tokens")
    size, losses = trained(options.home, options.recipe, options.set, options.runs, tokens)
    found = judged(size, losses, options.decisions, Thresholds(Length.parse(options.least, "--least").value))
    print(json.dumps(found) if options.json else shown(found), flush=True)


if __name__ == "__main__":
    main()
