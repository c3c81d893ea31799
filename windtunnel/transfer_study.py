"""``windtunnel tunnel transfer``: trains a transfer study, audits each axis, records what it found. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.artefact import content_hash, write_json
from windtunnel.base.devices import USUAL, Crew
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.base.units import si
from windtunnel.batch_answer import with_known_batch
from windtunnel.corpus.mixture import check_epochs
from windtunnel.desk import Desk, Result
from windtunnel.home import Home
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.planning import known_pins
from windtunnel.preparation import note_target, prepare
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.report.cost import cost_of, target_flops
from windtunnel.sizing import with_budget
from windtunnel.study import mean_loss, part_view, with_known_choices
from windtunnel.train.stage import Stage
from windtunnel.transfer_tables import transfer_parts
from windtunnel.tunnel.audit import Audit, Slope, audit, find_valley, regret_of
from windtunnel.tunnel.decay_rules import DecayRule, decay_rules
from windtunnel.tunnel.search import part_of, share_of
from windtunnel.tunnel.study_config import TransferAxis, TransferConfig
from windtunnel.tunnel.transfer import (
    Cell,
    Grid,
    Rules,
    Rung,
    best_rate,
    bridging_rates,
    first_rates,
    idle_decay,
    make_trial,
    next_rates,
    rate_at,
    rungs,
)  # fmt: skip
from windtunnel.views import View

AXES = ("width", "depth", "batch", "horizon", "size")
STUDY = "transfer"
_MOST_ROUNDS = 12
_SEED_STEP = 1000


def transfer(
    recipe: Recipe,
    home: Path,
    *,
    axes: Sequence[str] = (),
    devices: str | None = None,
    quiet: bool = False,
    part: str | None = None,
    crew: Crew = USUAL,
) -> View:
    """Trains small grids of learning rates along each axis and says whether the smallest model's best one carries over.

    Args:
        axes: instead of those in the recipe's [tunnel.transfer].
        part: ``3/28`` trains only that share of the first grids, whose rates do not depend on results.

    Raises:
        UserError: an axis is unknown, or the axis ``size`` has no proxies to go by.
        Stopped: a stop was asked for; the same command continues.
    """
    config, share = study_config(recipe, axes), part_of(part) if part is not None else None
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet, crew=crew) as desk:
        study = Study(desk, open_program(desk, recipe), config)
        ladders = study.ladders()
        cells = list(dict.fromkeys(rung.cell for ladder in ladders.values() for rung in ladder))
        if share is not None:
            return part_view(study.program, share, study.train_part(cells, share))
        study.fill(cells)
        study.bridge(ladders)
        slopes = study.slopes(ladders)
        found = {axis: _fact(study, axis, ladders, slopes) for axis in config.axes}
        for axis, fact in found.items():
            name = axis if config.over == "learning_rate" else f"{axis}-decay"
            with desk.book as book:
                book.put_fact(recipe.name, STUDY, name, fact)
            write_json(desk.home.program(recipe.name) / "studies" / f"{STUDY}-{name}-{fact['key'][:12]}.json", fact)
    return View({"program": recipe.name, "axes": found}, tuple(transfer_parts(recipe.name, found)))


def study_config(recipe: Recipe, axes: Sequence[str] = ()) -> TransferConfig:
    """The recipe's table, or its defaults, with the axes that are asked for."""
    config = (recipe.tunnel.transfer if recipe.tunnel else None) or TransferConfig()
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError("--axes", f"expected some of {', '.join(AXES)}, got {unknown[0][:60]!r}")
    chosen: tuple[TransferAxis, ...] = tuple(a for a in AXES if a in axes) if axes else config.axes  # pyright: ignore[reportAssignmentType]
    if "size" in chosen and recipe.tunnel is None:
        raise UserError(recipe.where("tunnel"), "expected proxies for the axis 'size', found no [tunnel]")
    return config.model_copy(update={"axes": chosen})


def open_program(desk: Desk, recipe: Recipe, *, answered: bool = True) -> Program:
    """The program with its corpora built, its batch and size known, and what an earlier search chose.

    Args:
        answered: take the batch that a batch study found, where it decides; that study itself does not.
    """
    prepared = prepare(desk, recipe)
    with desk.book as book:  # what a report says of the question
        book.put_fact(recipe.name, "recipe", "resolved", recipe.resolved())
        book.put_fact(recipe.name, "recipe", "base", str(recipe.base))
    pinned = known_pins(desk.home, recipe, prepared.tokenizer_hash)
    if pinned and pinned.get("answered") and not answered:
        pinned = None
    program = with_budget(Program(recipe, prepared, pinned=pinned))
    program = with_known_batch(desk.home, program) if answered else program
    program = with_known_choices(desk.home, program)
    note_target(desk, program)
    return program


Ladders = dict[tuple[str, str], list[Rung]]
"""(axis, parametrization) → the values of the axis, smallest first."""


@dataclass
class Study:
    """The trials of one call: which there are, what they ended with."""

    desk: Desk
    program: Program
    config: TransferConfig
    grids: dict[Cell, dict[int, list[float | None]]] = field(default_factory=dict[Cell, dict[int, list[float | None]]])
    results: dict[str, Result] = field(default_factory=dict[str, Result])
    made: dict[str, Stage] = field(default_factory=dict[str, Stage])

    @property
    def seeds(self) -> list[int]:
        return [self.program.recipe.seed + _SEED_STEP * i for i in range(self.config.seeds)]

    def parametrizations(self) -> list[Parametrization]:
        """Those that are compared. The recipe's constants and the search's choices hold for the recipe's own one."""
        own = self.program.setting().parametrization
        names = self.config.parametrizations or (own.name,)
        layers = self.program.recipe.model.base_layers or self.program.recipe.family.base_layers
        return [own if name == own.name else Parametrization.named(name, layers) for name in names]

    def centre(self, name: str) -> float:
        """The middle of a parametrization's first grid."""
        optimizer = self.program.setting().optimizer
        return self.config.centre.get(name, getattr(optimizer, self.config.over))  # pyright: ignore[reportArgumentType, reportCallIssue]

    def rate(self, cell: Cell, k: int) -> float:
        return rate_at(self.centre(cell.parametrization.name), self.config.spacing, k)

    def floor(self, cell: Cell) -> tuple[int, ...]:
        """The k of a weight decay that does nothing in a run of that length; nothing where the learning rate is looked for."""
        if self.config.over == "learning_rate":
            return ()
        centre = self.centre(cell.parametrization.name)
        return (idle_decay(cell, self.program.setting(), centre, self.config.spacing),)

    @property
    def axis_rules(self) -> Rules:
        """How the optimizer's constants follow batch and tokens; what the recipe states comes before the table."""
        stated = {"sqrt": 0.5, "none": 0.0, None: None}[self.config.batch_rule]
        exponent = self.config.horizon_exponent
        return Rules(stated, None if exponent is None else -exponent, self.program.setting().optimizer.decay)

    def rules(self, axis: str, ladder: Sequence[Rung]) -> tuple[DecayRule, ...]:
        """The rules for weight decay that are compared along an axis; none where the learning rate is looked for."""
        if self.config.over == "learning_rate":
            return ()
        first, last = ladder[0].cell, ladder[-1].cell
        by_table = last.parametrization.rule(Role.HIDDEN, last.shape).lr_multiplier
        by_table /= first.parametrization.rule(Role.HIDDEN, first.shape).lr_multiplier
        return decay_rules(
            axis, rate=float(np.log(by_table * last.factors.lr / first.factors.lr) / np.log(factor_of(axis, ladder)))
        )

    def ladders(self) -> Ladders:
        """Every axis under every parametrization."""
        recipe, config = self.program.recipe, self.config
        width = config.width or recipe.model.base_width or recipe.family.base_width
        shape = recipe.shape_at(width, config.layers, self.program.vocab)
        tokens = config.tokens or 10 * shape.body
        out: Ladders = {}
        for parametrization in self.parametrizations():
            base = Cell(parametrization, shape, self.program.batch, tokens)
            for axis in config.axes:
                if axis == "size":
                    assert recipe.tunnel is not None
                    shapes = [(size, self.program.shape_of(size)) for size in recipe.tunnel.proxies]
                    ladder = [Rung(size, replace(base, shape=s)) for size, s in sorted(shapes, key=lambda p: p[1].body)]
                else:
                    ladder = rungs(axis, base, config.factors, self.axis_rules)
                out[axis, parametrization.name] = ladder
        return out

    def train_part(self, cells: Sequence[Cell], part: tuple[int, int]) -> int:
        """Trains one share of the first grids; returns the number of its trials."""
        points = [(cell, k) for cell in cells for k in first_rates(self.config.rates)]
        own = share_of(list(self.stages(points, self.seeds).values()), part)
        if own:
            self._train(f"transfer: part {part[0]} of {part[1]}", own)
        return len(own)

    def fill(self, cells: Sequence[Cell]) -> None:
        """Trains all grids, round by round, until each has what it needs around its best rate."""
        for turn in range(1, _MOST_ROUNDS + 1):
            todo = {cell: next_rates(self.grids.get(cell, {}), self.config.rates, *self.floor(cell)) for cell in cells}
            if not any(todo.values()):
                return
            self.train(f"transfer: round {turn}", [(cell, k) for cell, ks in todo.items() for k in ks])

    def bridge(self, ladders: Ladders) -> None:
        """Trains the targets at the rates around their proxies' best ones, where that has not been done."""
        todo: dict[tuple[Cell, int], None] = {}
        for key, ladder in ladders.items():
            proxy, target = ladder[0].cell, ladder[-1].cell
            best = best_rate(self.grids[proxy])
            if best is None:
                continue
            powers = [rule.exponent for rule in self.rules(key[0], ladder)] or [0.0]
            ratio = factor_of(key[0], ladder)
            low = self.rate(proxy, best - 1) * ratio ** min(powers)
            high = self.rate(proxy, best + 1) * ratio ** max(powers)
            centre = self.centre(proxy.parametrization.name)
            ks = bridging_rates(self.grids[target], low, high, centre, self.config.spacing)
            todo |= {(target, k): None for k in ks if k >= max(self.floor(target), default=k)}
        self.train("transfer: the proxies' rates at the targets", list(todo))

    def slopes(self, ladders: Ladders) -> dict[tuple[str, str], Slope]:
        """How fast each target's loss falls with tokens: from a run of half the tokens, or from the horizon axis itself."""
        halves = {
            key: replace(ladder[-1].cell, tokens=ladder[-1].cell.tokens // 2)
            for key, ladder in ladders.items()
            if key[0] != "horizon"
        }
        bests = {key: best_rate(self.grids[ladder[-1].cell]) for key, ladder in ladders.items()}
        pairs = dict.fromkeys((cell, best) for key, cell in halves.items() if (best := bests[key]) is not None)
        self.train("transfer: the targets on half their tokens", list(pairs), self.seeds[:1])
        out: dict[tuple[str, str], Slope] = {}
        for key, ladder in ladders.items():
            best, target = bests[key], ladder[-1].cell
            shorter = ladder[-2].cell if key[0] == "horizon" else halves[key]
            if best is None or self.grids.get(shorter) is None:
                continue
            if key[0] == "horizon":
                before, after = (_lowest(self.grids[cell]) for cell in (shorter, target))
                source = f"the bottoms of the valleys after {si(shorter.tokens)} and {si(target.tokens)} tokens"
            else:
                before, after = self.grids[shorter][best][0], self.grids[target][best][0]
                source = f"one run of {si(shorter.tokens)} and one of {si(target.tokens)} tokens"
            if before is not None and after is not None:
                out[key] = Slope((before - after) / float(np.log(target.tokens / shorter.tokens)), source)
        return out

    def train(self, title: str, points: Sequence[tuple[Cell, int]], seeds: Sequence[int] | None = None) -> None:
        """Trains cells at rates, every seed, and keeps their losses."""
        if not points:
            return
        seeds = self.seeds if seeds is None else seeds
        stages = self.stages(points, seeds)
        results = self._train(title, list(stages.values()))
        self.results |= results
        self.made |= {stage.key: stage for stage in stages.values()}
        for cell, k in points:
            ended = [results[stages[cell, k, seed].key] for seed in seeds]
            self.grids.setdefault(cell, {})[k] = [_loss(result, self.program.recipe.mixture) for result in ended]

    def stages(self, points: Sequence[tuple[Cell, int]], seeds: Sequence[int]) -> dict[tuple[Cell, int, int], Stage]:
        """The trials of cells at rates, by cell, rate and seed."""
        setting, over = self.program.setting(), self.config.over
        return {
            (cell, k, seed): make_trial(cell, self.rate(cell, k), seed, setting, over)
            for cell, k in points for seed in seeds
        }  # fmt: skip

    def _train(self, title: str, stages: Sequence[Stage]) -> dict[str, Result]:
        prepared = self.program.prepared
        assert prepared is not None
        longest = max(stages, key=lambda stage: stage.tokens)
        for warning in check_epochs(longest.plan, prepared.rows(longest.plan.row), longest.steps * longest.batch):
            self.desk.screen.say(f"{longest.name}: {warning}")
        return self.desk.train(f"{title}, {len(stages)} trials", STUDY, stages, prepared)


def factor_of(axis: str, ladder: Sequence[Rung]) -> float:
    """How many times larger the axis's last value is than its first."""
    first, last = ladder[0].cell, ladder[-1].cell
    if axis == "width":
        return last.shape.width / first.shape.width
    if axis == "depth":
        return last.shape.layers / first.shape.layers
    if axis == "batch":
        return last.batch / first.batch
    return last.tokens / first.tokens if axis == "horizon" else last.shape.body / first.shape.body


def _loss(result: Result, mixture: Mapping[str, float]) -> float | None:
    if "failed" in result:
        return None
    loss = mean_loss(result["scores"], mixture)
    return loss if np.isfinite(loss) else None


def _lowest(grid: Grid) -> float | None:
    """The loss at the bottom of a cell's valley, seeds averaged; None if there is none to speak of."""
    means = {2.0**k: float(np.mean([v for v in losses if v is not None])) for k, losses in grid.items() if any(losses)}
    try:
        return find_valley(means).loss
    except WindtunnelError:
        return None


# -- what is recorded --------------------------------------------------------------------------------------------


def _fact(study: Study, axis: str, ladders: Ladders, slopes: Mapping[tuple[str, str], Slope]) -> dict[str, Any]:
    """Everything about one axis as JSON."""
    config, setting = study.config, study.program.setting()
    mine = {name: ladder for (own, name), ladder in ladders.items() if own == axis}
    parts = {name: _part(study, axis, ladder, slopes.get((axis, name))) for name, ladder in mine.items()}
    rules = dict.fromkeys(part["rule"] for part in parts.values())
    by_name = "; ".join(f"{name}: {part['rule']}" for name, part in parts.items())
    out: dict[str, Any] = {
        "axis": axis, "over": config.over, "rule": by_name if len(rules) > 1 else next(iter(rules)), "spacing": config.spacing,
        "seeds": study.seeds,
        "row": setting.row, "unit": "nats per UTF-8 byte", "corpora": dict(setting.corpora), "mixture": dict(setting.mixture),
        "cost": cost_of(study.made.values(), study.results, target_flops(study.desk.book, study.program.name)),
        "parametrizations": parts,
    }  # fmt: skip
    cells = [
        [r.cell.shape.to_dict(), r.cell.batch, r.cell.tokens, r.cell.parametrization.to_dict(), asdict(r.cell.factors)]
        for ls in mine.values()
        for r in ls
    ]
    other = [] if config.over == "learning_rate" else [config.over]
    identity = [axis, cells, study.seeds, out["corpora"], out["mixture"], config.spacing, *other]
    return {"key": content_hash(identity), **out}


def _part(study: Study, axis: str, ladder: Sequence[Rung], slope: Slope | None) -> dict[str, Any]:
    """One axis under one parametrization."""
    values: list[dict[str, Any]] = []
    grids: list[list[dict[float, float | None]]] = []
    for rung in ladder:
        cell, grid = rung.cell, study.grids[rung.cell]
        ks = sorted(grid)
        rates = [study.rate(cell, k) for k in ks]
        grids.append([{r: grid[k][s] for r, k in zip(rates, ks, strict=True)} for s in range(len(study.seeds))])
        values.append({
            "label": rung.label, "parameters": cell.shape.body, "width": cell.shape.width, "layers": cell.shape.layers,
            "batch": cell.batch * study.program.recipe.model.row, "tokens": cell.tokens, "factors": asdict(cell.factors),
            "rates": rates, "losses": [grid[k] for k in ks],
        })  # fmt: skip
    out: dict[str, Any] = {
        "centre": study.centre(ladder[0].cell.parametrization.name), "values": values,
        "parametrization": ladder[0].cell.parametrization.to_dict(),
        "rule": study.axis_rules.words(ladder[0].cell.parametrization, axis), "slope": asdict(slope) if slope else None,
    }  # fmt: skip
    try:
        floors = [study.rate(rung.cell, k) for rung in ladder for k in study.floor(rung.cell)]
        found = audit(grids, slope, floors=floors, what=study.config.over.replace("_", " ").removeprefix("learning "))
    except WindtunnelError as error:
        return {**out, "verdict": f"undecided: {error}", "at_worst": "", "notes": []}
    for value, valleys in zip(values, found.valleys, strict=True):
        value["valleys"] = [asdict(valley) for valley in valleys]
    ratio = factor_of(axis, ladder)
    rules = [
        {**asdict(rule), "regret_share": regret_of(found, grids[-1], ratio**rule.exponent).to_dict()}
        for rule in study.rules(axis, ladder)
    ]
    return {**out, **_judged(found), "rules": rules}


def _judged(found: Audit) -> dict[str, Any]:
    numbers = ("drift", "regret", "regret_share", "compute")
    estimates = {name: e.to_dict() if (e := getattr(found, name)) is not None else None for name in numbers}
    return {**estimates, "verdict": found.verdict, "at_worst": found.at_worst, "notes": list(found.notes)}
