"""``windtunnel tunnel batch``: which batch, and what does half or double cost? Needs no torch.

Losses are nats per token here, the unit of the paper's law: an absolute loss means nothing under another tokenizer. At one
size exact FLOPs are proportional to tokens, so that a share of tokens is a share of FLOPs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import content_hash, write_json
from windtunnel.base.devices import USUAL, Crew
from windtunnel.base.errors import UserError
from windtunnel.base.units import si
from windtunnel.batch_answer import STUDY
from windtunnel.corpus.mixture import check_epochs
from windtunnel.desk import Desk, Result
from windtunnel.home import Home
from windtunnel.laws.batch import NAMED_BATCH
from windtunnel.laws.batch_fit import BatchRun, FittedBatchLaw, find_minima, fit_batch_law
from windtunnel.laws.batch_terms import BatchPoint, ThreeTermLaw, fit_three_terms
from windtunnel.laws.fit import LawError
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.report.cost import cost_line, cost_of, target_flops
from windtunnel.study import part_view
from windtunnel.train.noise import SQUARE, TRACE, noise_scale
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.batch import Cell, branch_points, cells, go_on, usual_batches
from windtunnel.tunnel.search import part_of, share_of
from windtunnel.tunnel.study_config import BatchConfig
from windtunnel.views import View, line, table

_SEED_STEP = 1000
_NOISE = 2e-3
"""Seed noise of the log loss that is assumed where one seed cannot tell (docs/lab-log.md: .1 to .6 % at these sizes)."""
_REACH = 8.0
"""Beyond this multiple of the longest run an answer is called an extrapolation."""
Fact = dict[str, Any]


def batch(
    recipe: Recipe, home: Path, *, devices: str | None = None, quiet: bool = False, part: str | None = None, crew: Crew = USUAL
) -> View:  # fmt: skip
    """Trains every size with every batch, fits both laws, goes on from checkpoints with larger batches, and answers.

    Args:
        part: ``3/28`` trains only that share of the trunks with their branches, and nothing after it.

    Raises:
        UserError: the recipe has no proxies and names no sizes.
        Stopped: a stop was asked for; the same command continues.
    """
    config = (recipe.tunnel.batch if recipe.tunnel else None) or BatchConfig()
    share = part_of(part) if part is not None else None
    if recipe.tunnel is None:
        raise UserError(recipe.where("tunnel"), "expected proxies for the batch study, found no [tunnel]")
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet, crew=crew) as desk:
        study = Study(desk, open_program(desk, recipe, answered=False), config)
        if share is not None:
            return part_view(study.program, share, study.train(share))
        study.train()
        fact = study.fact(study.critical())
        with desk.book as book:
            book.put_fact(recipe.name, STUDY, STUDY, fact)
        write_json(desk.home.program(recipe.name) / "studies" / f"{STUDY}-{fact['key'][:12]}.json", fact)
    return View({"program": recipe.name, **fact}, tuple(_parts(recipe.name, fact)))


@dataclass
class Study:
    """The trials of one call and what they ended with."""

    desk: Desk
    program: Program
    config: BatchConfig
    results: dict[str, Result] = field(default_factory=dict[str, Result])
    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])

    @property
    def seeds(self) -> list[int]:
        return [self.program.recipe.seed + _SEED_STEP * i for i in range(self.config.seeds)]

    @property
    def exponent(self) -> float:
        return 0.5 if self.config.rate_rule == "sqrt" else 0.0

    @property
    def batches(self) -> list[int]:
        """In sequences, smallest first."""
        row = self.program.recipe.model.row
        stated = tuple(tokens // row for tokens in self.config.batches or ())
        return sorted(stated or usual_batches(self.program.batch))

    @property
    def base(self) -> int:
        """The batch nearest to the recipe's own, from whose trunks branches go on."""
        return min(self.batches, key=lambda batch: abs(math.log(batch / self.program.batch)))

    def cells(self) -> list[Cell]:
        """Every size, batch and seed."""
        program = self.program
        assert program.recipe.tunnel is not None
        names = self.config.sizes or program.recipe.tunnel.proxies
        sizes = sorted(((name, program.shape_of(name)) for name in names), key=lambda pair: pair[1].body)
        lengths = [
            sorted({length.tokens(parameters=shape.body) for length in self.config.tokens}) for _, shape in sizes
        ]
        return cells(sizes, self.batches, lengths, self.seeds, program.setting(), program.decay(), self.exponent)

    def train(self, part: tuple[int, int] = (1, 1)) -> int:
        """Trunks and decays of all cells, or of a share of these; returns how many there are."""
        own = share_of(self.cells(), part)
        stages = [s for cell in own for s in (cell.run.trunk, *(b for _, b in cell.run.branches))]
        if stages:
            share = f", part {part[0]} of {part[1]}" if part != (1, 1) else ""
            self._train(f"batch: {len(self.batches)} batches at each size{share}", stages)
        return len(stages)

    def _train(self, title: str, stages: Sequence[Stage]) -> None:
        prepared = self.program.prepared
        assert prepared is not None
        self.stages |= {stage.key: stage for stage in stages}
        longest = max(stages, key=lambda stage: stage.tokens)
        rows = prepared.rows(longest.plan.row)
        for warning in check_epochs(longest.plan, rows, longest.tokens // longest.plan.row):
            self.desk.screen.say(f"{longest.name}: {warning}")
        self.results |= self.desk.train(f"{title}, {len(stages)} runs", STUDY, list(stages), prepared)

    def loss(self, stage: Stage) -> float | None:
        """Held-out nats per token over the mixture; None for a run that failed or diverged."""
        result, mixture = self.results[stage.key], self.program.recipe.mixture
        if "failed" in result:
            return None
        total = sum(mixture.values())
        scores = result["scores"]
        loss = sum(w / total * scores[name]["nats"] / scores[name]["tokens"] for name, w in mixture.items())
        return loss if math.isfinite(loss) else None

    def points(self) -> list[BatchPoint]:
        """Every finished run."""
        return [
            BatchPoint(b.shape.body, b.step_tokens, b.steps, loss, cell.run.trunk.folder_name)
            for cell in self.cells()
            for _, b in cell.run.branches
            if (loss := self.loss(b)) is not None
        ]

    def curves(self) -> list[BatchRun]:
        """Each size with each batch: losses over tokens, seeds averaged."""
        groups: dict[tuple[float, float], dict[float, list[float]]] = {}
        for point in self.points():
            groups.setdefault((point.parameters, point.batch), {}).setdefault(point.tokens, []).append(point.loss)
        return [
            BatchRun(size, own, tuple((d, statistics.fmean(v)) for d, v in sorted(lengths.items())))
            for (size, own), lengths in sorted(groups.items())
        ]

    def noise(self) -> float | None:
        """Standard deviation of the log loss from seed to seed, pooled over cells; None with one seed."""
        groups: dict[tuple[float, float, float], list[float]] = {}
        for p in self.points():
            groups.setdefault((p.parameters, p.batch, p.tokens), []).append(math.log(p.loss))
        variances = [statistics.variance(values) for values in groups.values() if len(values) > 1]
        return math.sqrt(statistics.fmean(variances)) if variances and any(variances) else None

    # -- the critical batch ------------------------------------------------------------------------------------------------

    def critical(self) -> list[Fact]:
        """What larger batches cost from the checkpoints of the base batch's trunks."""
        todo: dict[tuple[str, int, float], list[Stage]] = {}
        setting, row = self.program.setting(), self.program.recipe.model.row
        for cell in (c for c in self.cells() if c.batch == self.base):
            if "failed" in self.results[cell.run.trunk.key]:
                continue
            for at in branch_points(cell.run):
                tokens = round(self.config.branch_tokens * at * cell.batch * row)
                for factor in self.config.factors:
                    branch = go_on(cell.run.trunk, setting, at=at, factor=factor, tokens=tokens, exponent=self.exponent)
                    todo.setdefault((cell.size, at, factor), []).append(branch)
        if not todo:
            return []
        self._train("batch: larger batches from checkpoints", [s for stages in todo.values() for s in stages])
        trunks = {cell.size: cell.run.trunk for cell in self.cells() if cell.batch == self.base}
        out = []
        for size, at in dict.fromkeys((size, at) for size, at, _ in todo):
            losses = {f: [self.loss(s) for s in todo[size, at, f]] for f in self.config.factors}
            out.append(self._branch_fact(size, at, trunks[size], losses))
        return out

    def _branch_fact(self, size: str, at: int, trunk: Stage, losses: Mapping[float, Sequence[float | None]]) -> Fact:
        tokens = at * trunk.batch * trunk.plan.row
        slope = self._slope(trunk, (1 + self.config.branch_tokens) * tokens)
        means = {f: statistics.fmean(v) for f, values in losses.items() if (v := [x for x in values if x is not None])}
        costs = {
            f: math.expm1((mean - means[1]) / slope) for f, mean in means.items() if slope and 1 in means and f != 1
        }
        within = [f for f in sorted(means) if f == 1 or costs.get(f, math.inf) <= self.config.tolerance]
        return {
            "size": size, "parameters": trunk.shape.body, "tokens": tokens, "batch": trunk.step_tokens,
            "factors": list(losses), "losses": [list(values) for values in losses.values()],
            "costs": [costs.get(f) for f in losses], "slope": slope,
            "critical": within[-1] * trunk.step_tokens if costs else None,
            "beyond": bool(costs) and within[-1] == max(losses),
            "noise_scale": self._noise_scale(trunk, at),
        }  # fmt: skip

    def _slope(self, trunk: Stage, tokens: float) -> float | None:
        """−dL/d ln D of this size and batch around a length, from the finished runs next to it."""
        own = next(
            (c.points for c in self.curves() if (c.parameters, c.batch) == (trunk.shape.body, trunk.step_tokens)), ()
        )
        pairs = [(math.sqrt(d0 * d1), (v0 - v1) / math.log(d1 / d0)) for (d0, v0), (d1, v1) in itertools.pairwise(own)]
        nearest = min(pairs, key=lambda pair: abs(math.log(pair[0] / tokens)), default=None)
        return nearest[1] if nearest is not None and nearest[1] > 0 else None

    def _noise_scale(self, trunk: Stage, at: int) -> float | None:
        """Tokens at which gradient noise equals signal, from the trunk's own micro-batches in the half before a step."""
        found: dict[str, dict[int, float]] = {}
        for name in (TRACE, SQUARE):
            steps, values = self.desk.book.metrics(self.desk.run_id(trunk), name)
            found[name] = {s: v for s, v in zip(steps, values, strict=True) if at / 2 < s <= at}
        common = sorted(found[TRACE].keys() & found[SQUARE].keys())
        return noise_scale([found[TRACE][s] for s in common], [found[SQUARE][s] for s in common])

    # -- what is recorded --------------------------------------------------------------------------------------------------

    def fact(self, branches: list[Fact]) -> Fact:
        """Everything about the study as JSON."""
        program, setting, curves = self.program, self.program.setting(), self.curves()
        noise = self.noise()
        undecided = {"undecided": "", "minima": _minima(curves, self.config.levels)}
        law, terms = _line_of(curves, self.config.levels), _terms_of(self.points(), noise)
        paper = NAMED_BATCH["minicpm"]
        out: Fact = {
            "unit": "nats per token", "seeds": self.seeds, "row": setting.row, "corpora": dict(setting.corpora),
            "mixture": dict(setting.mixture), "rule": "base rate × √factor" if self.exponent else "base rate × 1",
            "base": self.base * setting.row, "noise": noise, "tolerance": self.config.tolerance,
            "curves": [{"parameters": c.parameters, "batch": c.batch, "points": [list(p) for p in c.points]} for c in curves],
            "law": law.to_dict() if isinstance(law, FittedBatchLaw) else {**undecided, "undecided": law},
            "terms": terms.to_dict() if isinstance(terms, ThreeTermLaw) else {"undecided": terms},
            "paper": {"coefficient": paper.coefficient, "exponent": paper.exponent, "warning": paper.warning,
                      "source": paper.source},
            "branches": branches,
            "answer": _answer(program, law, terms),
            "cost": cost_of(self.stages.values(), self.results, target_flops(self.desk.book, program.name)),
        }  # fmt: skip
        return {"key": content_hash([sorted(self.results), self.config.model_dump(mode="json")]), **out}


def _minima(curves: Sequence[BatchRun], levels: int) -> list[Fact]:
    """The best batches without a line through them, those on an edge of the grid too."""
    try:
        found = find_minima(curves, levels)
    except LawError:
        return []
    return [{k: v if v == v else None for k, v in asdict(m).items()} for m in found]


def _line_of(curves: Sequence[BatchRun], levels: int) -> FittedBatchLaw | str:
    try:
        return fit_batch_law(find_minima(curves, levels))
    except LawError as error:
        return str(error)


def _terms_of(points: Sequence[BatchPoint], noise: float | None) -> ThreeTermLaw | str:
    try:
        return fit_three_terms(points, noise=max(noise or _NOISE, 2e-4))
    except LawError as error:
        return str(error)


def _answer(program: Program, law: FittedBatchLaw | str, terms: ThreeTermLaw | str) -> Fact | None:
    """Which batch the target should have, and what half, double and the recipe's own cost."""
    if not isinstance(terms, ThreeTermLaw):
        return None
    tokens, size, own = program.total_tokens, program.shape.body, program.batch * program.recipe.model.row
    best = terms.best_batch(tokens)
    loss = terms.loss(size, best.value, tokens / best.value)
    notes = []
    if (reach := tokens / terms.tokens[1]) > _REACH:
        notes.append(f"the target reads {reach:.3g} times the tokens of the longest run of the study: an extrapolation")
    low, high = terms.batches
    if not low <= best.value <= high:
        notes.append(f"the answer lies outside the batches that were tried, {si(low)} to {si(high)} tokens")
    return {
        "parameters": size, "tokens": tokens, "best": best.to_dict(), "half": terms.cost(tokens, 0.5).to_dict(),
        "double": terms.cost(tokens, 2.0).to_dict(), "band": list(terms.band(tokens)), "own": own,
        "own_cost": terms.cost_of(tokens, own).to_dict(), "loss": loss,
        "by_line": law.law.tokens(loss) if isinstance(law, FittedBatchLaw) else None, "notes": notes,
    }  # fmt: skip


# -- what is shown ---------------------------------------------------------------------------------------------------------


def _parts(program: str, fact: Fact) -> Iterable[RenderableType]:
    law, terms = fact["law"], fact["terms"]
    if law["minima"]:
        rows = [
            (si(m["parameters"]), f"{m['loss']:.3f}", si(m["batch"]), si(m["tokens"]),
             f"at the {m['edge']} edge" if m["edge"] else f"{_percent(m['half'])} / {_percent(m['double'])}")
            for m in law["minima"]
        ]  # fmt: skip
        columns = ("N", "nats per token", "best batch", "tokens to there", "half / double cost, % of FLOPs")
        yield table(columns, rows, title="equal-loss points, parabola over log batch", right=(0, 1, 2, 3))
    yield line(f"line through the minima: {line_sentence(law)}", "bold")
    yield line(f"three terms: {terms_sentence(terms)}", "bold")
    paper = fact["paper"]
    yield line(f"the paper's line: B = {paper['coefficient']:.3g} / L^{paper['exponent']:g} ({paper['source']})")
    yield line(f"  {paper['warning']}", "yellow")
    if fact["branches"]:
        rows = [
            (si(b["parameters"]), si(b["tokens"]), si(b["batch"]),
             " ".join(f"×{f:g} {_percent(c)}" for f, c in zip(b["factors"], b["costs"], strict=True) if f != 1),
             critical_sentence(b), si(b["noise_scale"]) if b["noise_scale"] else "–")
            for b in fact["branches"]
        ]  # fmt: skip
        columns = ("N", "from", "batch", "going on with a larger batch costs", "critical batch", "noise scale")
        yield table(columns, rows, title="branches with a larger batch from checkpoints, in tokens", right=(0, 1, 2))
    yield line(answer_sentence(fact["answer"]), "bold")
    for note in (fact["answer"] or {}).get("notes", []):
        yield line(f"  {note}", "yellow")
    yield line(f"{cost_line(fact['cost'])}; windtunnel report {program} draws the curves")


def _percent(share: float | None) -> str:
    return "never gets there" if share is None or not math.isfinite(share) else f"{100 * share:+.1f} %"


def line_sentence(law: Mapping[str, Any]) -> str:
    """B = a / L^b with its interval, or why there is none."""
    if "undecided" in law:
        return f"undecided: {law['undecided']}"
    interval = "" if law["exponent_low"] is None else (
        f", b in [{law['exponent_low']:.3g}, {law['exponent_high']:.3g}], a in "
        f"[{law['coefficient_low']:.3g}, {law['coefficient_high']:.3g}] (90 %, leaving out a size at a time)"
    )  # fmt: skip
    low, high = law["losses"]
    fitted = f"B = {law['coefficient']:.3g} / L^{law['exponent']:.3g} tokens"
    return f"{fitted} for L from {low:.3g} to {high:.3g} nats per token{interval}"


def terms_sentence(terms: Mapping[str, Any]) -> str:
    """The three-term law in one line, or why there is none."""
    if "undecided" in terms:
        return f"undecided: {terms['undecided']}"
    k, power = terms["constants"], terms["exponent"]
    span = "" if power["low"] is None else f" [{power['low']:.2f}, {power['high']:.2f}]"
    return (
        f"L = {k['E']:.3g} + {k['A']:.3g} N^-{k['a']:.2g} + {k['B']:.3g} M^-{k['b']:.2g} + {k['C']:.3g} K^-{k['c']:.2g}, "
        f"so the best batch grows as D^{power['value']:.2f}{span}; residual {100 * terms['residual']:.2f} %"
    )


def critical_sentence(branch: Mapping[str, Any]) -> str:
    """The largest batch of a checkpoint that costs no more than the tolerance."""
    if branch["critical"] is None:
        return "undecided"
    return f"{'at least ' if branch['beyond'] else ''}{si(branch['critical'])}"


def answer_sentence(answer: Mapping[str, Any] | None) -> str:
    """Which batch, and what half or double costs."""
    if answer is None:
        return "which batch? undecided: the three-term law could not be fitted"
    best = answer["best"]
    span = "" if best["low"] is None else f" [{si(best['low'])}, {si(best['high'])}]"
    low, high = answer["band"]
    half, double, own = (_percent(answer[name]["value"]) for name in ("half", "double", "own_cost"))
    return (
        f"which batch for {si(answer['parameters'])} parameters and {si(answer['tokens'])} tokens? "
        f"{si(best['value'])} tokens{span}: half costs {half}, double {double} of exact FLOPs; "
        f"{si(low)} to {si(high)} costs at most 5 %; the recipe's {si(answer['own'])} costs {own}"
    )
