"""The tunnel's search for a program, and the check that its rate carries over. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from windtunnel.base.artefact import read_json, write_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.desk import Desk, Result
from windtunnel.home import Home
from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trial_stage, trunk_stage
from windtunnel.program import Program
from windtunnel.train.stage import Stage
from windtunnel.tunnel.enough import Gap, remaining_gap
from windtunnel.tunnel.halving import Ladder, rungs_of
from windtunnel.tunnel.promotion import ByForecast, ByRank, places_of, rate_column
from windtunnel.tunnel.propose import BLIND, Trial
from windtunnel.tunnel.search import AllFailed, SearchResult, numbered_points, search, share_of
from windtunnel.tunnel.space import Axis, Space, Values, apply, apply_to_shape, inside, to_dicts
from windtunnel.views import View, line

_CHECK_FACTORS = (0.5, 1.0, 2.0)
_TRIAL_DECAY = 0.2
_NEAR = 4.0
"""The seed noise is measured once the gap's upper end is under this many times the noise that the surface shows."""


def mean_loss(scores: Mapping[str, Any], mixture: Mapping[str, float]) -> float:
    """Nats per byte over the corpora of a mixture, weighted by it."""
    total = sum(mixture.values())
    return sum(w / total * scores[name]["nats"] / scores[name]["bytes"] for name, w in mixture.items())


def choose(desk: Desk, program: Program) -> Program:
    """The program with its searched hyper-parameters, from the search or from the record of an earlier one."""
    recipe = program.recipe
    if recipe.tunnel is None or not recipe.tunnel.trials or not program.searched:
        return program
    record = desk.home.search(program.name, program.search_key)
    if known := _record(desk.home, program):
        for study, runs in known["runs"].items():
            desk.use(study, runs)
        return program.with_choices(known["choices"], known.get("warmup"))
    found, gap = _search(desk, program)
    choices = dict(found.best.values)
    chosen = program.with_choices(choices)
    check = _check(desk, chosen)
    fact = {
        "key": program.search_key, "choices": choices, "best": found.best.number, "edges": list(found.edges),
        "trials": [_as_fact(trial) for trial in found.trials], "check": check,
        "space": to_dicts(found.space), "stopped": found.stopped, "warmup": chosen.warmup,
        "gap": gap.to_dict() if gap else None,
        "size": recipe.tunnel.search_size or recipe.tunnel.proxies[0], "seed": recipe.seed,
        "runs": {study: desk.used(study) for study in ("search", "check")},
    }  # fmt: skip
    with desk.book as book:
        book.put_fact(program.name, "study", "search", fact)
    write_json(record, fact)
    if found.edges:
        desk.screen.say(
            f"search: the best value lies on the edge of the space: {', '.join(found.edges)}; widen it to be sure"
        )
    return chosen


def _as_fact(trial: Trial) -> dict[str, Any]:
    guess = {"guess": trial.guess} if trial.guess is not None else {}
    return {"number": trial.number, "loss": trial.loss, **guess, **trial.values}


def train_part(desk: Desk, program: Program, part: tuple[int, int]) -> int:
    """Trains one share of a search whose points are known before any result; returns the number of its trials.

    Raises:
        UserError: the sampler looks at results, so that a share alone does not know its points; or there is no search.
    """
    tunnel, prepared = program.recipe.tunnel, program.prepared
    assert prepared is not None
    if tunnel is None or not tunnel.trials or not program.searched:
        raise UserError("--part", "expected a search to take part in, got a recipe without one", "give [tunnel] trials")
    if tunnel.sampler not in BLIND or tunnel.prune != "none":
        got = f"the sampler '{tunnel.sampler}'" if tunnel.sampler not in BLIND else f"prune = '{tunnel.prune}'"
        fix = 'write tunnel.sampler = "sobol", "random" or "grid", and leave prune out'
        raise UserError("--part", f"expected a search whose trials do not depend on results, got {got}", fix)
    points = numbered_points(
        program.space, tunnel.trials, program.recipe.seed, tunnel.sampler, tunnel.per_round,
        inside(program.space, program.starting_values()),
    )  # fmt: skip
    own = share_of(points, part)
    if own:
        stages = search_stages(program, own)
        desk.train(f"search: part {part[0]} of {part[1]}, {len(own)} trials", "search", stages, prepared)
    return len(own)


def train_scaling_part(desk: Desk, program: Program, part: tuple[int, int]) -> int:
    """Trains one share of the scaling study's trunks with their branches; returns the number of its runs.

    Raises:
        UserError: the search whose choices the trunks need has not ended in this home.
    """
    assert program.prepared is not None
    assert program.recipe.tunnel is not None
    if program.recipe.tunnel.trials and program.searched and not program.choices:
        fix = "end windtunnel tunnel search in one home and copy that home, or write its choices into the recipe"
        raise UserError("--part", "expected a search that has ended, whose choices all trunks share, found none", fix)
    runs = share_of(program.scaling(), part)
    stages = [run.trunk for run in runs] + [branch for run in runs for _, branch in run.branches]
    if stages:
        title = f"scaling: part {part[0]} of {part[1]}, {len(stages)} runs"
        desk.train(title, "scaling", stages, program.prepared)
    return len(stages)


def part_view(program: Program, part: tuple[int, int], trials: int) -> View:
    """What a command says that trained a share of a study."""
    text = (
        f"part {part[0]} of {part[1]}: {trials} trials are done; when all parts are, join their homes with: "
        "windtunnel tunnel merge HOME HOME ... --into HOME"
    )
    return View({"program": program.name, "part": list(part), "trials": trials}, (line(text),))


def with_known_choices(home: Home, program: Program) -> Program:
    """The program with the choices that an earlier search recorded, or as it is."""
    if program.recipe.tunnel is None or not program.recipe.tunnel.trials:
        return program
    known = _record(home, program)
    return program.with_choices(known["choices"], known.get("warmup")) if known else program


def _record(home: Home, program: Program) -> dict[str, Any] | None:
    """What a search wrote down; None if there is nothing, or not what a search writes: then its trials are found again."""
    try:
        known = read_json(home.search(program.name, program.search_key))
    except ArtefactError:
        return None
    whole = isinstance(known, dict) and all(isinstance(known.get(name), dict) for name in ("choices", "runs"))
    return known if whole and set(program.searched) <= set(known["choices"]) else None


def trial_steps(tokens: int, setting: Setting) -> tuple[int, int, int]:
    """(steps, decay steps, warmup steps) of a trial: a fifth decays, and at most a tenth warms up."""
    steps = max(10, setting.steps(tokens))
    return steps, max(2, round(_TRIAL_DECAY * steps)), max(1, min(setting.warmup, steps // 10))


def make_trial(program: Program, name: str, shape: Shape, values: Values, tokens: int, seed: int = 0) -> Stage:
    """The stage of one trial with the given hyper-parameters; ``seed`` is added to the recipe's."""
    setting = program.setting(chosen=False)
    setting = setting.with_seed(setting.seed + seed)
    steps, decay, warmup = trial_steps(tokens, setting)
    setting = apply(replace(setting, warmup=warmup), values, steps)
    names = tuple(corpus for corpus, _ in setting.mixture)
    return trial_stage(name, apply_to_shape(shape, values), replace(setting, score=names), steps, decay)


def search_stages(program: Program, points: Sequence[tuple[int, Values]]) -> list[Stage]:
    """Trials of the search, on the recipe's search size."""
    tunnel = program.recipe.tunnel
    assert tunnel is not None
    shape = program.shape_of(tunnel.search_size or tunnel.proxies[0])
    tokens = tunnel.trial_tokens or 10 * shape.body
    return [make_trial(program, f"trial-{number:03d}", shape, values, tokens) for number, values in points]


def _search(desk: Desk, program: Program) -> tuple[SearchResult, Gap | None]:
    tunnel, prepared, mixture = program.recipe.tunnel, program.prepared, program.recipe.mixture
    assert tunnel is not None
    assert prepared is not None
    lost: dict[str, Result] = {}

    def evaluate(points: Sequence[tuple[int, Values]]) -> list[float | None]:
        stages = search_stages(program, points)
        title = f"search: trials {points[0][0] + 1}–{points[-1][0] + 1} of {tunnel.trials}"
        results = desk.train(title, "search", stages, prepared)
        lost.update(_failed(stages, results))
        return [_loss(results[stage.key], mixture) for stage in stages]

    enough = _Enough(desk, program)
    ladder = Rungs(desk, program) if tunnel.prune != "none" else None
    try:
        found = search(
            program.space, tunnel.trials, program.recipe.seed, ladder.evaluate if ladder else evaluate,
            per_round=tunnel.per_round, first=inside(program.space, program.starting_values()), sampler=tunnel.sampler,
            on_edge=tunnel.on_edge, revise=ladder.revise if ladder else lambda trial: trial,
            enough=enough if tunnel.stop == "enough" else lambda space, done: "",
        )  # fmt: skip
    except AllFailed as error:
        fix = _way_out(program, ladder.lost if ladder else lost)
        raise AllFailed(error.trials, program.recipe.where("tunnel.space"), fix) from None
    return found, remaining_gap(found.space, found.trials, enough.noise(found.best.loss))


def _failed(stages: Sequence[Stage], results: Mapping[str, Result]) -> dict[str, Result]:
    """Results without a score, by the stage's name."""
    return {stage.name: result for stage in stages if "failed" in (result := results[stage.key])}


def _way_out(program: Program, lost: Mapping[str, Result]) -> str:
    """What to do about a search of which no trial ended."""
    lower = "lower its learning rates" if "learning_rate" in program.searched else "lower optimizer.lr"
    crashed = [(name, result["failed"]) for name, result in lost.items() if not result.get("diverged")]
    if not crashed:
        return lower
    name, reason = crashed[0]
    mend = f"mend what ended {name} ({reason}), then windtunnel clean --failed --really lets the next call try"
    return mend if len(crashed) == len(lost) else f"{lower}, or {mend}"


class Rungs:
    """Trials as trunks with a decay branch on each rung, of which only some go on to the next: the best, or the most promising.

    ``rungs`` are the judged lengths, shortest first; ``values`` the hyper-parameters of each trial by its number; ``lost`` what
    failed, by name.
    """

    def __init__(self, desk: Desk, program: Program) -> None:
        tunnel = program.recipe.tunnel
        assert tunnel is not None
        self._desk, self._program = desk, program
        self._shape = program.shape_of(tunnel.search_size or tunnel.proxies[0])
        setting = program.setting(chosen=False)
        self._steps, _, warmup = trial_steps(tunnel.trial_tokens or 10 * self._shape.body, setting)
        shares = [axis.high for axis in program.space if isinstance(axis, Axis) and axis.name == "warmup"]
        self._warmup = warmup
        longest = max([warmup, *(round(share * self._steps) for share in shares)])
        self.rungs = rungs_of(self._steps, _TRIAL_DECAY, longest)
        self.values: dict[int, Values] = {}
        self.lost: dict[str, Result] = {}
        by_forecast = ByForecast(self.rungs, places_of(program.space, self.values), rate_column(program.space))
        self._ladder = Ladder(self.rungs, by_forecast if tunnel.prune == "forecast" else ByRank())

    def evaluate(self, points: Sequence[tuple[int, Values]]) -> list[float | None]:
        self.values.update(points)
        numbers = [number for number, _ in points]
        self._ladder.climb(numbers, self._judge)
        return [self.finished(number) for number in numbers]

    def finished(self, number: int) -> float | None:
        """The loss of a trial that went to its end, else None."""
        return self._ladder.finished(number)

    def revise(self, trial: Trial) -> Trial:
        loss = self.finished(trial.number)
        return replace(trial, loss=loss, guess=self._ladder.guess(trial.number) if loss is None else None)

    def _judge(self, rung: int, numbers: Sequence[int]) -> dict[int, float | None]:
        prepared, mixture = self._program.prepared, self._program.recipe.mixture
        assert prepared is not None
        pairs = {number: self.stages(number, rung) for number in numbers}
        title = f"search: {len(numbers)} trials on rung {rung + 1} of {len(self.rungs)}"
        stages = [trunk for trunk, _ in pairs.values()] + [branch for _, branch in pairs.values()]
        results = self._desk.train(title, "search", stages, prepared)
        self.lost |= _failed(stages, results)
        return {number: _loss(results[branch.key], mixture) for number, (_, branch) in pairs.items()}

    def stages(self, number: int, rung: int) -> tuple[Stage, Stage]:
        """A trial's trunk up to a rung, and the decay branch that is judged there."""
        values, rungs, program = self.values[number], self.rungs, self._program
        setting = apply(replace(program.setting(chosen=False), warmup=self._warmup), values, self._steps)
        setting = replace(setting, score=tuple(corpus for corpus, _ in setting.mixture))
        name, shape, at = f"trial-{number:03d}", apply_to_shape(self._shape, values), rungs[rung].trunk
        trunk = trunk_stage(name, shape, setting, at, [r.trunk for r in rungs[: rung + 1]])
        branch = decay_stage(trunk, f"{name}-rung{rung}", setting, at=at, steps=rungs[rung].decay)
        return trunk, replace(branch, save_final=False)


class _Enough:
    """Whether a search has gone on long enough, with a seed noise that is stated, or measured once when the end seems near."""

    def __init__(self, desk: Desk, program: Program) -> None:
        self._desk, self._program, self._measured = desk, program, math.nan
        assert program.recipe.tunnel is not None
        self._tunnel = program.recipe.tunnel

    def noise(self, loss: float | None) -> float | None:
        """Standard deviation from seed to seed, in the loss's unit, or None where it is not known."""
        if self._tunnel.noise is not None and loss is not None:
            return self._tunnel.noise * loss
        return self._measured if math.isfinite(self._measured) else None

    def __call__(self, space: Space, done: Sequence[Trial]) -> str:
        best = min((t for t in done if t.loss is not None), key=lambda t: (t.loss, t.number), default=None)
        gap = remaining_gap(space, done, self.noise(best.loss)) if best else None
        if best is None or gap is None:
            return ""
        if self.noise(best.loss) is None and gap.high < _NEAR * gap.noise:
            self._measure(best)
            gap = remaining_gap(space, done, self.noise(best.loss)) or gap
        if self.noise(best.loss) is None or not gap.enough:
            return ""
        self._desk.screen.say(
            f"search: enough after {len(done)} trials: about {gap.value:.2g} nats per byte are left to find (90 %: at most "
            f"{gap.high:.2g}), the seed noise is {gap.noise:.2g}"
        )
        return f"the gap to the optimum is under the seed noise after {len(done)} trials"

    def _measure(self, best: Trial) -> None:
        program, prepared = self._program, self._program.prepared
        assert prepared is not None
        shape = program.shape_of(self._tunnel.search_size or self._tunnel.proxies[0])
        tokens = self._tunnel.trial_tokens or 10 * shape.body
        stages = [
            make_trial(program, f"repeat-{best.number:03d}-{i}", shape, best.values, tokens, seed=1000 * i)
            for i in range(1, self._tunnel.repeats + 1)
        ]
        results = self._desk.train("search: the best trial on other seeds", "search", stages, prepared)
        losses = [_loss(results[stage.key], program.recipe.mixture) for stage in stages]
        finite = [loss for loss in losses if loss is not None]
        if len(finite) > 1 and len(set(finite)) > 1:
            self._measured = statistics.stdev(finite)


def _loss(result: Result, mixture: Mapping[str, float]) -> float | None:
    if "failed" in result:
        return None
    loss = mean_loss(result["scores"], mixture)
    return loss if math.isfinite(loss) else None


def _check(desk: Desk, program: Program) -> dict[str, Any]:
    """Whether the found learning rate is also best on a wider model: half, same and double, each to the end of its decay."""
    recipe, prepared, choices = program.recipe, program.prepared, program.choices
    assert recipe.tunnel is not None
    assert prepared is not None
    assert choices is not None
    size = recipe.tunnel.check_size or recipe.tunnel.proxies[-1]
    if "learning_rate" not in choices:
        return {}
    shape = program.shape_of(size)
    searched = program.shape_of(recipe.tunnel.search_size or recipe.tunnel.proxies[0])
    tokens = recipe.tunnel.trial_tokens or 10 * searched.body
    rates = [float(f"{float(choices['learning_rate']) * factor:.4g}") for factor in _CHECK_FACTORS]
    stages = [
        make_trial(program, f"check-{size}-{i}", shape, {**choices, "learning_rate": rate}, tokens)
        for i, rate in enumerate(rates)
    ]
    results = desk.train(f"check: is the learning rate best at {size} too?", "check", stages, prepared)
    losses = [_loss(results[stage.key], recipe.mixture) for stage in stages]
    best = min((loss, i) for i, loss in enumerate(losses) if loss is not None)[1] if any(losses) else None
    return {
        "size": size, "width": shape.width, "rates": rates, "losses": losses, "drift": parabola_minimum(rates, losses),
        "carries_over": best == 1,
    }  # fmt: skip


def parabola_minimum(rates: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """log2 of the minimum of the parabola through three points in log rate, relative to the middle one, clipped to ±1.

    None where a run failed or the parabola opens downwards.
    """
    if len(losses) != 3 or any(loss is None for loss in losses):
        return None
    low, middle, high = (float(loss) for loss in losses if loss is not None)
    curvature = low - 2 * middle + high
    if curvature <= 0:
        return None
    return max(-1.0, min(1.0, 0.5 * (low - high) / curvature * math.log2(rates[1] / rates[0])))
