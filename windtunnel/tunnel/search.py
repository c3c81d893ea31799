"""The search: proposals in rounds, each a pure function of seed, round and earlier results. Needs no torch.

Optuna only proposes. The results lie in our run folders, so a search that was killed asks for the same trials again, finds
most of them done and goes on; its final table equals that of a search that nobody killed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna

from windtunnel.base.errors import WindtunnelError
from windtunnel.tunnel.space import Space

Values = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One tried point. ``loss`` is None for a trial that diverged or failed."""

    number: int
    values: Values
    loss: float | None


@dataclass(frozen=True)
class SearchResult:
    """All trials in order, the best one, and the axes on whose edge it lies."""

    trials: tuple[Trial, ...]
    best: Trial
    edges: tuple[str, ...]


def propose(space: Space, earlier: Sequence[Trial], number: int, seed: int) -> list[Values]:
    """The next ``number`` points to try: the same for the same space, earlier results and seed.

    The first round is a scrambled Sobol sequence, later ones are TPE with the earlier results.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler
        if earlier:
            sampler = optuna.samplers.TPESampler(
                seed=seed * 1009 + len(earlier), n_startup_trials=0, multivariate=True, constant_liar=True
            )
        else:
            sampler = optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        study = optuna.create_study(sampler=sampler)
        distributions = {
            axis.name: optuna.distributions.FloatDistribution(axis.low, axis.high, log=True) for axis in space
        }
        worst = max((t.loss for t in earlier if t.loss is not None), default=0.0)
        for trial in earlier:
            loss = worst if trial.loss is None else trial.loss  # a diverged trial tells where not to look
            study.add_trial(optuna.create_trial(params=trial.values, distributions=dict(distributions), value=loss))
        return [rounded(study.ask(dict(distributions)).params) for _ in range(number)]


def rounded(values: Values) -> Values:
    """Values with four significant digits, as shown and as used."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def search(
    space: Space, trials: int, seed: int, evaluate: Callable[[Sequence[tuple[int, Values]]], Sequence[float | None]],
    *, per_round: int = 4, first: Values | None = None,
) -> SearchResult:  # fmt: skip
    """Runs a search.

    Args:
        evaluate: trains the given (number, values) pairs and returns their losses, None for a diverged trial.
        per_round: trials of a round; it does not follow the number of workers, so the search is the same on any machine.
        first: a point that opens the first round, the defaults for example.

    Raises:
        WindtunnelError: every trial failed.
    """
    done: list[Trial] = []
    while len(done) < trials:
        number = min(per_round if done else max(per_round, 2 * len(space)), trials - len(done))
        opening = [first] if first and not done else []
        points = opening + propose(space, done, number - len(opening), seed)
        numbered = [(len(done) + i, values) for i, values in enumerate(points)]
        losses = evaluate(numbered)
        done += [Trial(i, values, loss) for (i, values), loss in zip(numbered, losses, strict=True)]
    finite = [t for t in done if t.loss is not None and math.isfinite(t.loss)]
    if not finite:
        raise WindtunnelError(
            f"all {trials} trials of the search failed or diverged; lower the learning rates in tunnel.space"
        )
    best = min(finite, key=lambda t: (t.loss, t.number))
    edges = tuple(f"{axis.name} ({side})" for axis in space if (side := axis.near_edge(best.values[axis.name])))
    return SearchResult(tuple(done), best, edges)
