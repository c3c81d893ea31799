"""``windtunnel law mixture``: which shares of which corpora? Drawn mixtures on proxies, a regression, its optimum tried.

The loss of small runs on drawn mixtures is fitted (``laws/mixture.py``), and the mixture at which the fit is lowest, none of
its corpora read more often than a cap by the *target*, is trained on fresh seeds beside the stratified mixture, which reads
all corpora equally often and is hard to beat (arXiv 2407.01492). What is judged is that pair, never the fit. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from windtunnel.base.artefact import content_hash, write_bytes, write_json
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.base.units import Length
from windtunnel.decay_data_study import known_corpora
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.laws.mixture import (
    MIXTURE_FORMS,
    MixtureLaw,
    best_mixture,
    choose_mixture_law,
    fit_mixture,
    rank_correlation,
)
from windtunnel.program import Program
from windtunnel.proxy_trunk import ProxyTrunk
from windtunnel.recipe import Recipe
from windtunnel.report.cost import cost_line, cost_of, target_flops, together
from windtunnel.report.mixtures import mixture_columns, mixture_figure, mixture_rows, mixture_title, verdict_lines
from windtunnel.study import mean_loss
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.audit import Estimate
from windtunnel.tunnel.mixtures import as_mixture, draw_mixtures, share_limits, stratified
from windtunnel.views import View, line, table

STUDY = "mixture"
_RUNS_PER_CORPUS = 4
Shares = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What is asked: corpora to mix, those that judge, the stage that mixes, the cap, and the size of the study."""

    corpora: tuple[str, ...]
    on: tuple[str, ...]
    stage: str
    cap: float
    mixtures: int
    size: str | None
    tokens: str
    decay: float
    seeds: int


def study_mixture(
    recipe: Recipe, home: Path, *, corpora: Sequence[str] = (), on: Sequence[str] = (), stage: str = "decay",
    cap: float = 4.0, mixtures: int | None = None, size: str | None = None, tokens: str = "20N", decay: float = 0.2,
    seeds: int = 3, out: Path | None = None, devices: str | None = None, quiet: bool = False,
) -> View:  # fmt: skip
    """Trains the drawn mixtures, fits, and says whether the fit's optimum beats the stratified mixture.

    Args:
        corpora: what is mixed; without any, what the recipe's first decay with a mixture of its own reads, or its trunk.
        on: corpora whose held-out parts judge, equally weighted; without any, all that are mixed.
        stage: ``decay``: one trunk, and the mixtures in short branches; ``trunk``: whole runs, each on its mixture.
        cap: how often the target would read a corpus at most.
        mixtures: how many are drawn; without it, four a corpus.
        size: of the proxies; without it, the tunnel's smallest, or the target.
        tokens: of a whole run, decay included.
        decay: share of the whole that decays.
        out: the SVG file; without it, studies/mixture.svg in the program's folder.

    Raises:
        UserError: an option is wrong, or the corpora hold too little for the cap.
        WindtunnelError: too few runs were finite for a fit.
        Stopped: a stop was asked for; the same command continues.
    """
    asked = _asked(recipe, corpora, on, stage, cap, mixtures, size, tokens, decay, seeds)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        fact = _study(desk, program, asked)
        studies = desk.home.program(recipe.name) / "studies"
        target = out or studies / "mixture.svg"
        write_bytes(target, mixture_figure(fact, alone=True).encode())
        write_json(studies / f"mixture-{fact['key'][:12]}.json", fact)
        with desk.book as book:
            book.put_fact(recipe.name, STUDY, f"{stage}-{fact['key'][:12]}", fact)
    return View({"program": recipe.name, "figure": str(target), **fact}, tuple(_parts(fact, target)))


def _asked(
    recipe: Recipe, corpora: Sequence[str], on: Sequence[str], stage: str, cap: float, mixtures: int | None,
    size: str | None, tokens: str, decay: float, seeds: int,
) -> Asked:  # fmt: skip
    if stage not in ("decay", "trunk"):
        raise UserError("--stage", f"expected decay or trunk, got {stage[:40]!r}")
    own = _own_mixture(recipe, stage)
    names = known_corpora(recipe, corpora, "--corpus") or tuple(own or recipe.mixture)
    if len(names) < 2 or len(set(names)) < len(names):
        fix = "name two corpora or more, each with --corpus"
        raise UserError("--corpus", f"expected two different corpora or more, got {', '.join(names)}", fix)
    count = mixtures or max(len(names) + 4, _RUNS_PER_CORPUS * len(names))
    if count < len(names) + 2:
        raise UserError(
            "--mixtures", f"expected {len(names) + 2} or more for {len(names)} corpora, got {count}",
            "the law has a number for each corpus",
        )  # fmt: skip
    Length.parse(tokens, "--tokens")
    return Asked(names, known_corpora(recipe, on, "--on") or names, stage, cap, count, size, tokens, decay, seeds)


def _own_mixture(recipe: Recipe, stage: str) -> Shares | None:
    """What the recipe itself would read there."""
    if stage == "trunk":
        return dict(recipe.mixture)
    found = (recipe.branch[name].mixture for name in recipe.decays)
    return next((dict(m) for m in found if m and m != recipe.mixture), None)


def _study(desk: Desk, program: Program, asked: Asked) -> dict[str, Any]:
    """Runs, fit, optimum and verdict as JSON."""
    assert program.prepared is not None
    rows = program.prepared.rows(program.recipe.model.row)
    before, own = _target_reads(program, asked)
    limits = share_limits(rows, before, own, asked.corpora, asked.cap)
    equal = stratified(rows, limits)
    drawn = draw_mixtures(equal, limits, asked.mixtures, program.recipe.seed)
    stages, losses, cost = _train(desk, program, asked, {f"{i:03d}": mix for i, mix in enumerate(drawn)}, [0])
    finite = [(mix, row[0]) for mix, row in zip(drawn, losses.values(), strict=True) if row[0] is not None]
    if len(finite) < len(asked.corpora) + 2:
        raise WindtunnelError(
            f"law mixture: {len(finite)} of {len(drawn)} runs ended with a finite loss, too few for a fit; lower optimizer.lr"
        )
    laws = _fit(asked, finite)
    law = choose_mixture_law(laws)
    best = _optimum(law, laws, asked, finite, limits, equal)
    rivals = {"optimum": best, "stratified": equal}
    mine = _own_mixture(program.recipe, asked.stage)
    if mine is not None:
        rivals["recipe"] = {name: weight / sum(mine.values()) for name, weight in mine.items()}
    fresh = [i + 1 for i in range(asked.seeds)]
    tried, found, more = _train(desk, program, asked, rivals, fresh)
    epochs = {
        n: {c: (before.get(c, 0) + s * own) / max(1, rows.get(c, 0)) for c, s in mix.items()}
        for n, mix in rivals.items()
    }
    one = next(iter(stages.values()))[0]
    return {
        "key": content_hash([[s.key for s in row] for row in (*stages.values(), *tried.values())] + [list(asked.on), asked.cap]),
        **asdict(asked), "parameters": one.shape.body, "run_tokens": one.tokens, "stage_tokens": one.own_tokens,
        "limits": limits, "target_rows": own,
        "runs": [{"shares": mix, "loss": row[0]} for mix, row in zip(drawn, losses.values(), strict=True)],
        "law": law.to_dict(), "forms": {other.form: other.error for other in laws},
        "rank": rank_correlation(law.left_out, [loss for _, loss in finite]),
        "mixtures_tried": rivals, "epochs": epochs, "losses": found, "against": _judged(found),
        "predicted": _predicted(law, asked, best, equal),
        "cost": together([cost, more]),
    }  # fmt: skip


def _target_reads(program: Program, asked: Asked) -> tuple[dict[str, int], int]:
    """Rows of each corpus that the target has read when the stage begins, and rows that the stage reads."""
    if asked.stage == "trunk":
        return {}, max(1, program.total_tokens // program.recipe.model.row)
    name = program.recipe.forecast_branch or next(iter(program.recipe.decays), None)
    if name is None:
        own = max(1, round(asked.decay * program.total_tokens / program.recipe.model.row))
        trunk = program.trunk()
        return trunk.plan.counts(max(0, program.total_tokens // program.recipe.model.row - own)), own
    stage = program.branch(name)
    return stage.plan.counts(stage.batches.sequences(stage.first_step)), stage.own_tokens // stage.plan.row


def _train(
    desk: Desk, program: Program, asked: Asked, mixtures: Mapping[str, Shares], seeds: Sequence[int]
) -> tuple[dict[str, list[Stage]], dict[str, list[float | None]], dict[str, Any]]:
    """Stages and losses of each mixture, one a seed, and their cost; no loss of a run that failed."""
    assert program.prepared is not None
    length = Length.parse(asked.tokens, "--tokens")
    score = (*asked.on, *asked.corpora, *program.recipe.mixture)
    trunks: list[Stage] = []
    stages: dict[str, list[Stage]] = {name: [] for name in mixtures}
    for number in seeds:
        proxy = ProxyTrunk.of(program, STUDY, number, size=asked.size, tokens=length, decay=asked.decay, score=score)
        trunks += [proxy.trunk] if asked.stage == "decay" else []
        for name, shares in mixtures.items():
            made = proxy.branch if asked.stage == "decay" else proxy.whole
            stages[name].append(made(name, as_mixture(shares)))
    every = [*trunks, *(stage for row in stages.values() for stage in row)]
    results = desk.train(f"mixture: {len(every)} runs", STUDY, every, program.prepared)
    desk.need_all(trunks, results)
    on = dict.fromkeys(asked.on, 1.0)
    losses = {
        name: [None if "failed" in (r := results[s.key]) else mean_loss(r["scores"], on) for s in row]
        for name, row in stages.items()
    }
    return stages, losses, cost_of(every, results, target_flops(desk.book, program.name))


def _fit(asked: Asked, finite: Sequence[tuple[Shares, float]]) -> list[MixtureLaw]:
    shares = [[mix[name] for name in asked.corpora] for mix, _ in finite]
    losses = [loss for _, loss in finite]
    return [fit_mixture(form, shares, losses) for form in MIXTURE_FORMS]


def _optimum(
    law: MixtureLaw, laws: Sequence[MixtureLaw], asked: Asked, finite: Sequence[tuple[Shares, float]],
    limits: Mapping[str, float], equal: Shares,
) -> Shares:  # fmt: skip
    """Where the law is lowest: within the caps, and no share beyond the largest that was trained. If nothing explains the
    losses better than their mean, the simplest form with shares in it is asked all the same, and the pair decides."""
    chosen = law if law.form != "constant" else laws[1]
    seen = {name: max(mix[name] for mix, _ in finite) for name in asked.corpora}
    high = np.array([min(limits[name], seen[name]) for name in asked.corpora])
    ordered = sorted(finite, key=lambda pair: pair[1])
    starts = [np.array([mix[name] for name in asked.corpora]) for mix in (equal, *(mix for mix, _ in ordered[:3]))]
    found = np.round(best_mixture(chosen, high, starts), 4)
    return {name: float(share) for name, share in zip(asked.corpora, found, strict=True)}


def _judged(losses: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """How much lower the optimum ends than each rival, in percent of the rival's loss, paired by seed."""
    out: dict[str, Any] = {}
    for rival in (name for name in losses if name != "optimum"):
        pairs = [
            (a, b) for a, b in zip(losses["optimum"], losses[rival], strict=True) if a is not None and b is not None
        ]
        whole = len(pairs) == len(losses["optimum"])
        gains = [100 * (1 - a / b) for a, b in pairs]
        found = Estimate.of(gains) if whole else None
        out[rival] = {
            "gain": found.to_dict() if found else None, "seeds": gains, "verdict": _verdict(found, rival)
        }  # fmt: skip
    return out


def _verdict(gain: Estimate | None, rival: str) -> str:
    named = {"stratified": "the stratified mixture", "recipe": "the recipe's own mixture"}[rival]
    if gain is None:
        return f"cannot tell against {named}: a run failed"
    if gain.low is None or gain.high is None:
        return f"cannot tell against {named} from one seed"
    if gain.low > 0:
        return f"beats {named}"
    return f"does not beat {named}" if gain.high < 0 else f"cannot tell from {named}"


def _predicted(law: MixtureLaw, asked: Asked, best: Shares, equal: Shares) -> float:
    """The gain over the stratified mixture that the law foretells, in percent."""
    a, b = law.predict(np.array([[mix[name] for name in asked.corpora] for mix in (best, equal)]))
    return float(100 * (1 - a / b))


def _parts(fact: Mapping[str, Any], figure: Path) -> Iterator[RenderableType]:
    """The study for the terminal."""
    columns = mixture_columns(fact)
    yield table(columns, mixture_rows(fact), title=mixture_title(fact), right=tuple(range(1, len(columns))))
    yield from (line(text) for text in verdict_lines(fact))
    yield line(f"{cost_line(fact['cost'])}; the figure is {figure}", "dim")
