"""What a search costs and loses, on real text: against a whole grid, against a search left to run on, and with early stopping.

    PYTHONPATH=. python bench/search.py [grid] [enough] [pruning] [--recipe RECIPE] [--home HOME] [--set KEY=VALUE ...] [--json]

The setting is the quickstart's search; ``--recipe`` and ``--set`` change it. All trials lie in a home, so that a
call that was interrupted goes on. *grid*: the search of 12 trials against five values in each of four hyper-parameters (625
trials); the pick and the grid's best five are trained again on fresh seeds, in pairs. *enough*: searches of 24 trials, what they
say is left to find, and what four times as many trials found, both picks trained again on fresh seeds. *pruning*: 64 trials
whose losses after a short decay and at the plateau are recorded on each rung, and rules of promotion replayed over them in many
orders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from windtunnel.base.artefact import read_json, write_json
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.program import Program
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.study import Rungs, choose, make_trial, mean_loss, numbered_points
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.enough import remaining_gap
from windtunnel.tunnel.halving import replay
from windtunnel.tunnel.promotion import ByForecast, ByRank, Promotion, Rung, places_of, rate_column
from windtunnel.tunnel.propose import Trial
from windtunnel.tunnel.space import Space, Values

GRID, SHORT, LONG, RECORDED, FRESH = 625, 24, 96, 64, 10_000
"""Trials of the grid, of the shorter and longer search, of the recorded table; what is added to a seed to make it fresh."""


class Bench:
    """One home and one recipe: searches in it, and trials again on fresh seeds."""

    def __init__(self, home: Path, recipe: str, overrides: Sequence[str]) -> None:
        self._home, self._recipe, self._overrides = Home(home), recipe, list(overrides)

    def recipe(self, *more: str) -> Recipe:
        return load_recipe(self._recipe, [*self._overrides, *more])

    def search(self, *more: str) -> tuple[list[Trial], Values]:
        """Runs a search, or finds its record; its trials and what it picks."""
        with Desk(self._home, self.recipe().name, quiet=True) as desk:
            program = choose(desk, open_program(desk, self.recipe(*more)))
            names = [axis.name for axis in program.space]
            path = self._home.search(program.name, program.search_key)
        found = read_json(path)
        trials = [Trial(t["number"], {name: t[name] for name in names}, t["loss"]) for t in found["trials"]]
        return trials, {name: found["choices"][name] for name in names}

    def space(self, *more: str) -> Any:
        with Desk(self._home, self.recipe().name, quiet=True) as desk:
            return open_program(desk, self.recipe(*more)).space

    def again(self, points: Mapping[str, Values], seeds: int) -> dict[str, np.ndarray]:
        """Losses of points on fresh seeds, the same for all of them: name → shape (seeds,)."""
        with Desk(self._home, self.recipe().name, quiet=True) as desk:
            program = open_program(desk, self.recipe())
            tunnel, prepared = program.recipe.tunnel, program.prepared
            assert tunnel is not None
            assert prepared is not None
            shape = program.shape_of(tunnel.search_size or tunnel.proxies[0])
            tokens = tunnel.trial_tokens or 10 * shape.body
            stages = {
                (name, seed): make_trial(program, f"fresh-{name}-{seed}", shape, values, tokens, seed=FRESH * seed)
                for name, values in points.items() for seed in range(1, seeds + 1)
            }  # fmt: skip
            results = desk.train("fresh seeds", "fresh", list(stages.values()), prepared)
        loss = {key: mean_loss(results[s.key]["scores"], program.recipe.mixture) for key, s in stages.items()}
        return {name: np.array([loss[name, seed] for seed in range(1, seeds + 1)]) for name in points}

    def recorded(self) -> Recorded:
        """Every rung of 64 trials, written down one by one: a trunk's score at a rung is gone once the trunk has gone on."""
        with Desk(self._home, self.recipe().name, quiet=True) as desk:
            program = open_program(desk, self.recipe())
            prepared, ladder = program.prepared, Rungs(desk, program)
            assert prepared is not None
            points = numbered_points(program.space, RECORDED, program.recipe.seed, "sobol")
            ladder.values.update(points)
            path = self._home.search(program.name, program.search_key).with_suffix(".rungs.json")
            known: list[list[list[float | None]]] = read_json(path)["rungs"] if path.is_file() else []
            for rung in range(len(known), len(ladder.rungs)):
                pairs = [ladder.stages(number, rung) for number, _ in points]
                pairs = [(replace(trunk, score=branch.score), branch) for trunk, branch in pairs]  # the plateau, too
                stages = [trunk for trunk, _ in pairs] + [branch for _, branch in pairs]
                results = desk.train(f"all trials on rung {rung + 1}", "recorded", stages, prepared)
                known.append([[_loss(results[pair[part].key], program) for pair in pairs] for part in (1, 0)])
                write_json(path, {"rungs": known})
        decayed, plateau = (
            np.array([[np.inf if loss is None else loss for loss in rung[part]] for rung in known]).T for part in (0, 1)
        )
        return Recorded(decayed, plateau, ladder.rungs, program.space, dict(points))


@dataclass(frozen=True)
class Recorded:
    """Losses after the decay and at the plateau, each of shape (trials, rungs), with the rungs and the trials' values."""

    decayed: np.ndarray
    plateau: np.ndarray
    rungs: tuple[Rung, ...]
    space: Space
    values: dict[int, Values]


def _loss(result: dict[str, Any], program: Program) -> float | None:
    return None if "failed" in result else mean_loss(result["scores"], program.recipe.mixture)


def _percent(differences: np.ndarray, level: float) -> dict[str, Any]:
    """Mean of paired differences in % of a level, with the 90 % interval of Student's t."""
    x = 100 * differences / level
    half = stats.t.ppf(0.95, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return {"percent": float(x.mean()), "low": float(x.mean() - half), "high": float(x.mean() + half), "pairs": len(x)}


def against_grid(bench: Bench, seeds: int = 5) -> dict[str, Any]:
    """The search's cost and what its pick loses against the grid's best five, and against the best of these five again."""
    searched, pick = bench.search()
    whole, _ = bench.search("tunnel.sampler='grid'", f"tunnel.trials={GRID}")
    best = sorted((t for t in whole if t.loss is not None), key=lambda t: t.loss or 0.0)[:5]
    again = bench.again({"search": pick, **{f"grid{i}": t.values for i, t in enumerate(best, 1)}}, seeds)
    five = np.stack([again[f"grid{i}"] for i in range(1, 6)])
    winner = five[five.mean(axis=1).argmin()]
    return {
        "cost_percent_of_grid": 100 * len(searched) / len(whole), "trials": len(searched), "grid": len(whole),
        "grid_failed": sum(t.loss is None for t in whole), "pick": pick, "grid_best": [t.values for t in best],
        "loses_to_five": _percent(again["search"] - five.mean(axis=0), float(five.mean())),
        "loses_to_best_of_five": _percent(again["search"] - winner, float(winner.mean())),
        "losses": {name: values.tolist() for name, values in again.items()},
    }  # fmt: skip


def searched_enough(bench: Bench, searches: int = 6, seeds: int = 4) -> dict[str, Any]:
    """What each short search says is left to find, and what four times as many trials found of it."""
    rows = []
    for number in range(1, searches + 1):
        setting = (f"seed={100 + number}", f"tunnel.trials={LONG}")
        trials, _ = bench.search(*setting)
        first = trials[:SHORT]
        picks = {
            name: min((t for t in part if t.loss is not None), key=lambda t: t.loss or 0.0)
            for name, part in (("short", first), ("long", trials))
        }
        again = bench.again({f"{name}{number}": pick.values for name, pick in picks.items()}, seeds)
        short, long = again[f"short{number}"], again[f"long{number}"]
        noise = float(np.sqrt((short.var(ddof=1) + long.var(ddof=1)) / 2))
        gap = remaining_gap(bench.space(*setting), first, noise)
        assert gap is not None
        level = float(long.mean())
        rows.append({
            "said_percent": 100 * gap.value / level, "at_most_percent": 100 * gap.high / level, "enough": gap.enough,
            "more": gap.more, "noise_percent": 100 * noise / level, "found": _percent(short - long, level),
        })  # fmt: skip
    inside = [row["found"]["percent"] <= row["at_most_percent"] + row["noise_percent"] for row in rows]
    return {"searches": rows, "found_within_what_was_said": int(np.sum(inside)), "of": searches}


def early_stopping(bench: Bench, orders: int = 200) -> dict[str, Any]:
    """Rules of promotion over the recorded trials; plain asynchronous halving, judged at the plateau, is one of them."""
    of = bench.recorded()
    final, draw = of.decayed[:, -1], np.random.default_rng(0)
    shuffled = [draw.permutation(len(final)).tolist() for _ in range(orders)]
    forecast = ByForecast(of.rungs, places_of(of.space, of.values), rate_column(of.space))
    rules: dict[str, tuple[Promotion, np.ndarray | None]] = {
        "by forecast, after a short decay": (forecast, None),
        "best 1/4, after a short decay": (ByRank(), None),
        "best 1/4, at the plateau": (ByRank(), of.plateau),
        "best 2/5, at the plateau": (ByRank(2.5), of.plateau),
    }  # fmt: skip
    out: dict[str, Any] = {
        "trials": len(final), "diverged": int((~np.isfinite(final)).sum()),
        "second_best_percent": 100 * float(np.sort(final)[1] / final.min() - 1),
        "tenth_best_percent": 100 * float(np.sort(final)[9] / final.min() - 1),
    }  # fmt: skip
    for name, (rule, plateau) in rules.items():
        runs = [replay(of.decayed, order, of.rungs, rule=rule, plateau=plateau) for order in shuffled]
        lost = np.array([final[run.kept] / final.min() - 1 for run in runs])
        out[name] = {
            "median_percent_of_tokens": 100 * float(np.median([run.share for run in runs])),
            "best_not_kept_percent": 100 * float(np.mean(lost > 0)), "median_loss_percent": 100 * float(np.median(lost)),
            "mean_loss_percent": 100 * float(lost.mean()), "most_lost_percent": 100 * float(lost.max()), "orders": orders,
        }  # fmt: skip
    return out


STUDIES = {"grid": against_grid, "enough": searched_enough, "pruning": early_stopping}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", nargs="*", choices=[[], *STUDIES], default=[])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--home", type=Path, default=Path("windtunnel-home"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.home, options.recipe, options.set)
    for name in options.study or STUDIES:
        found = STUDIES[name](bench)
        print(json.dumps({name: found}) if options.json else f"{name}\n" + json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
