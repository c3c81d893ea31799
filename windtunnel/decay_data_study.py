"""``windtunnel law decay-data``: which data belongs into the decay? One trunk a seed, a short branch a candidate. Needs no torch.

All branches grow from the same checkpoint and read equally many tokens: the trunk's own mixture, or 70 % of it and 30 % of one
candidate. A candidate's value is how much lower its branch ends than the trunk's own, in percent of the loss, paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import content_hash, write_bytes, write_json
from windtunnel.base.errors import UserError
from windtunnel.base.units import Length
from windtunnel.desk import Desk, Result
from windtunnel.home import Home
from windtunnel.pretrain.setting import Mixture
from windtunnel.program import Program
from windtunnel.proxy_trunk import ProxyTrunk
from windtunnel.recipe import Recipe
from windtunnel.report.cost import cost_line, cost_of, target_flops
from windtunnel.report.decay_data import value_columns, value_figure, value_rows, value_title
from windtunnel.study import mean_loss
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.audit import Estimate
from windtunnel.views import View, line, table

STUDY = "decay-data"


@dataclass(frozen=True)
class Question:
    """What is asked: candidates, the corpora on whose held-out parts they are judged, share, sizes and seeds."""

    candidates: tuple[str, ...]
    on: tuple[str, ...]
    share: float
    size: str | None
    tokens: Length
    decay: float
    seeds: int


def decay_data(
    recipe: Recipe, home: Path, *, candidates: Sequence[str] = (), on: Sequence[str] = (), share: float = 0.3,
    size: str | None = None, tokens: str = "20N", decay: float = 0.1, seeds: int = 3, out: Path | None = None,
    devices: str | None = None, quiet: bool = False,
) -> View:  # fmt: skip
    """Trains the trunks and branches and says what each candidate is worth in the decay.

    Args:
        candidates: corpora of the recipe; without any, all that the trunk does not read and that are no pairs.
        on: corpora whose held-out parts judge, equally weighted; without any, those of the trunk by its mixture.
        share: of the branch's tokens that are the candidate's.
        size: of the model; without it, the tunnel's smallest proxy, or the target.
        tokens: the whole length, decay included.
        decay: share of the whole length that the branch takes.
        out: the SVG file; without it, studies/decay-data.svg in the program's folder.

    Raises:
        UserError: a corpus is unknown, or there is no candidate.
        Stopped: a stop was asked for; the same command continues.
    """
    question = Question(
        _candidates(recipe, candidates),
        known_corpora(recipe, on, "--on"),
        share,
        size,
        Length.parse(tokens, "--tokens"),
        decay,
        seeds,
    )
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        trunks, plain, mixed = stages_of(program, question)
        every = [*trunks, *plain, *(stage for row in mixed.values() for stage in row)]
        assert program.prepared is not None
        results = desk.train(f"decay data: {len(every)} runs", STUDY, every, program.prepared)
        desk.need_all(trunks, results)
        cost = cost_of(every, results, target_flops(desk.book, program.name))
        fact = {**judged(program, question, plain, mixed, results), "cost": cost}
        studies = desk.home.program(recipe.name) / "studies"
        target = out or studies / "decay-data.svg"
        write_bytes(target, value_figure(fact, alone=True).encode())
        write_json(studies / f"decay-data-{fact['key'][:12]}.json", fact)
        with desk.book as book:
            book.put_fact(recipe.name, STUDY, fact["key"][:12], fact)
    return View({"program": recipe.name, "figure": str(target), **fact}, tuple(_parts(fact, target)))


def known_corpora(recipe: Recipe, names: Sequence[str], option: str) -> tuple[str, ...]:
    """The names that an option gives.

    Raises:
        UserError: one of them is no corpus of text or chats of this recipe.
    """
    usable = [name for name, corpus in recipe.corpus.items() if not corpus.pairs]
    if unknown := [name for name in names if name not in usable]:
        raise UserError(option, f"expected some of {', '.join(usable)}, got {unknown[0][:60]!r}")
    return tuple(names)


def _candidates(recipe: Recipe, names: Sequence[str]) -> tuple[str, ...]:
    found = known_corpora(recipe, names, "--candidate") or tuple(
        name for name, corpus in recipe.corpus.items() if name not in recipe.mixture and not corpus.pairs
    )
    if not found:
        fix = "add a [corpus.NAME], or name one with --candidate"
        raise UserError(recipe.where("corpus"), "expected a corpus that the trunk does not read, found none", fix)
    return found


def stages_of(program: Program, question: Question) -> tuple[list[Stage], list[Stage], dict[str, list[Stage]]]:
    """Trunks, the trunk's own decays, and the candidates' decays, one a seed each."""
    recipe, score = program.recipe, (*program.recipe.mixture, *question.on, *question.candidates)
    trunks: list[Stage] = []
    plain: list[Stage] = []
    mixed: dict[str, list[Stage]] = {name: [] for name in question.candidates}
    for i in range(question.seeds):
        proxy = ProxyTrunk.of(
            program, STUDY, i, size=question.size, tokens=question.tokens, decay=question.decay, score=score
        )
        trunks.append(proxy.trunk)
        plain.append(proxy.branch("own"))
        for name in question.candidates:
            mixed[name].append(proxy.branch(name, blend(recipe.mixture, name, question.share)))
    return trunks, plain, mixed


def blend(mixture: Mapping[str, float], candidate: str, share: float) -> Mixture:
    """A share of a candidate in a mixture, the rest as it was among itself."""
    whole = sum(mixture.values())
    out = {name: (1 - share) * weight / whole for name, weight in mixture.items()}
    out[candidate] = out.get(candidate, 0.0) + share
    return tuple(sorted(out.items()))


def judged(
    program: Program, question: Question, plain: Sequence[Stage], mixed: Mapping[str, Sequence[Stage]],
    results: Mapping[str, Result],
) -> dict[str, Any]:  # fmt: skip
    """Each candidate's value with its interval, where it was judged and on the trunk's own text, best first."""
    own = program.recipe.mixture
    on = dict.fromkeys(question.on, 1.0) or dict(own)
    rows = program.prepared.rows(program.recipe.model.row) if program.prepared else {}

    def values(stages: Sequence[Stage], mixture: Mapping[str, float]) -> list[float]:
        pairs = [(results[a.key], results[b.key]) for a, b in zip(plain, stages, strict=True)]
        losses = [(mean_loss(a["scores"], mixture), mean_loss(b["scores"], mixture)) for a, b in pairs]
        return [100 * (1 - b / a) for a, b in losses]

    found: list[dict[str, Any]] = []
    for name, stages in mixed.items():
        if any("failed" in results[s.key] for s in (*plain, *stages)):
            found.append({"name": name, "value": None, "own": None, "verdict": "a run failed", "read": None})
            continue
        value = Estimate.of(values(stages, on))
        read = stages[0].plan.epochs(rows, stages[0].tokens // stages[0].plan.row)[name]
        found.append({"name": name, "value": value.to_dict(), "own": Estimate.of(values(stages, own)).to_dict(),
                      "verdict": _verdict(value), "read": read, "seeds": values(stages, on)})  # fmt: skip
    found.sort(key=lambda one: -math.inf if one["value"] is None else one["value"]["value"], reverse=True)
    stage = plain[0]
    return {
        "key": content_hash([[s.key for s in row] for row in (plain, *mixed.values())] + [sorted(on)]), "candidates": found,
        "on": on, "share": question.share, "parameters": stage.shape.body, "tokens": stage.tokens,
        "branch_tokens": stage.own_tokens, "seeds": [s.seed for s in plain], "mixture": dict(own),
    }  # fmt: skip


def _verdict(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return "one seed: cannot tell"
    return "helps" if value.low > 0 else "hurts" if value.high < 0 else "cannot tell"


def _parts(fact: Mapping[str, Any], figure: Path) -> Iterator[RenderableType]:
    yield table(value_columns(fact), value_rows(fact), title=value_title(fact), right=(3,))
    yield line(
        f"value: how much lower the held-out loss ends than with the trunk's own data, in percent; "
        f"{cost_line(fact['cost'])}; the figure is {figure}"
    )
