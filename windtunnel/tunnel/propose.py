"""What to try next: a pure function of the space, the results so far and a seed. Needs no torch, except the GP.

Optuna only proposes; its studies live as long as one call. Its Gaussian process imports torch, which the driver never loads,
so those proposals are made by this module run as a program (``python -m windtunnel.tunnel.propose``).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna

from windtunnel.base.errors import WindtunnelError
from windtunnel.tunnel.space import Axis, Space, Value, Values, from_dicts, grid, to_dicts

Sampler = Literal["tpe", "gp", "sobol", "random", "grid"]
BLIND: tuple[Sampler, ...] = ("sobol", "random", "grid")
"""Samplers whose proposals do not depend on results."""


@dataclass(frozen=True)
class Trial:
    """One tried point. ``loss`` is None for a trial that diverged or failed, or was given up by the pruner.

    ``guess`` is then what the pruner expects of it, which tells the sampler more than nothing.
    """

    number: int
    values: Values
    loss: float | None
    guess: float | None = None


def propose(space: Space, earlier: Sequence[Trial], number: int, seed: int, sampler: Sampler = "tpe") -> list[Values]:
    """The next ``number`` points to try: the same for the same space, earlier results, seed and sampler.

    The first round is a scrambled Sobol sequence, later ones are the sampler's with the earlier results. Sobol and random
    go on with their sequence, whatever the results. A grid has no next points: ``number`` is its size.

    Raises:
        RecipeError: no grid of the space has ``number`` points.
    """
    if sampler == "grid":
        return grid(space, number)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler in BLIND:
            made: optuna.samplers.BaseSampler = (
                _sobol(seed) if sampler == "sobol" else optuna.samplers.RandomSampler(seed=seed)
            )
            return _ask(made, space, (), len(earlier) + number, ordinal=True)[len(earlier) :]
        if not earlier:
            return _ask(_sobol(seed), space, (), number, ordinal=True)
        own = seed * 1009 + len(earlier)
        if sampler == "gp":
            gp = optuna.samplers.GPSampler(seed=own, n_startup_trials=0)
            return _ask(gp, space, earlier, number, losses=tamed(told(earlier)))
        tpe = optuna.samplers.TPESampler(seed=own, n_startup_trials=0, multivariate=True, constant_liar=True)
        return _ask(tpe, space, earlier, number)


def propose_apart(space: Space, earlier: Sequence[Trial], number: int, seed: int, sampler: Sampler) -> list[Values]:
    """As ``propose``, in a process of its own where the sampler would load torch.

    Raises:
        WindtunnelError: the process failed; the last line that it said.
    """
    if sampler != "gp" or not earlier:
        return propose(space, earlier, number, seed, sampler)
    job = {
        "space": to_dicts(space), "number": number, "seed": seed, "sampler": sampler,
        "earlier": [[t.number, t.values, t.loss, t.guess] for t in earlier],
    }  # fmt: skip
    command = [sys.executable, "-m", "windtunnel.tunnel.propose"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread: the same sums in the same order
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise WindtunnelError(f"the Gaussian process could not propose: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _sobol(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _ask(
    sampler: optuna.samplers.BaseSampler, space: Space, earlier: Sequence[Trial], number: int, *, ordinal: bool = False,
    losses: Sequence[float] | None = None,
) -> list[Values]:  # fmt: skip
    """Asks one sampler; ``ordinal`` numbers the options of choices, which a Sobol sequence needs to spread over them."""
    distributions: dict[str, Any] = {axis.name: _distribution(axis, ordinal) for axis in space}
    study = optuna.create_study(sampler=sampler)
    for trial, loss in zip(earlier, told(earlier) if losses is None else losses, strict=True):
        params = {axis.name: _told_value(axis, trial.values[axis.name]) for axis in space}
        study.add_trial(optuna.create_trial(params=params, distributions=dict(distributions), value=loss))
    asked = [study.ask(dict(distributions)).params for _ in range(number)]
    return [{axis.name: _value(axis, params[axis.name], ordinal) for axis in space} for params in asked]


def told(earlier: Sequence[Trial]) -> list[float]:
    """What a sampler is told about each trial: its loss, or a guess, or the worst one: that tells where not to look."""
    known = [t.loss if t.loss is not None else t.guess for t in earlier]
    finite = [loss for loss in known if loss is not None]
    if not finite:
        return [0.0] * len(earlier)
    ceiling = max(finite)
    return [ceiling if loss is None else loss for loss in known]


def tamed(losses: Sequence[float]) -> list[float]:
    """Losses of which none exceeds best + 4 (median − best): still "not here", but they no longer hide the valley from a GP."""
    best, middle = min(losses), statistics.median(losses)
    ceiling = best + 4 * (middle - best) if middle > best else max(losses)
    return [min(loss, ceiling) for loss in losses]


def _distribution(axis: Any, ordinal: bool) -> optuna.distributions.BaseDistribution:
    if isinstance(axis, Axis):
        ends = sorted((axis.inner(axis.low), axis.inner(axis.high)))
        return optuna.distributions.FloatDistribution(*ends, log=True)
    if ordinal:
        return optuna.distributions.IntDistribution(0, len(axis.options) - 1)
    return optuna.distributions.CategoricalDistribution(axis.options)


def _told_value(axis: Any, value: Value) -> Value:
    if not isinstance(axis, Axis):
        return value
    low, high = sorted((axis.inner(axis.low), axis.inner(axis.high)))
    return min(max(axis.inner(float(value)), low), high)


def _value(axis: Any, asked: Any, ordinal: bool) -> Value:
    if isinstance(axis, Axis):
        return axis.outer(float(asked))
    return axis.options[int(asked)] if ordinal else asked


def main() -> None:
    """Reads a job as JSON on standard input and writes the proposals as JSON."""
    job = json.load(sys.stdin)
    earlier = [Trial(*one) for one in job["earlier"]]
    points = propose(from_dicts(job["space"]), earlier, job["number"], job["seed"], job["sampler"])
    sys.stdout.write(json.dumps(points) + "\n")


if __name__ == "__main__":
    main()
