"""``windtunnel replicate``: the paper's experiments again, each as a claim with a test and seeds. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import write_bytes, write_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.recipe import Recipe
from windtunnel.replication_claims import CLAIMS
from windtunnel.replication_found import Claim, Found, to_fact
from windtunnel.replication_lab import STUDY, Lab
from windtunnel.report.cost import cost_line, cost_of, target_flops
from windtunnel.report.cost import together as all_together
from windtunnel.report.replication import replication_figures, replication_markdown, replication_page
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.claims import ELSEWHERE, VERDICTS, together
from windtunnel.tunnel.replica import Scale, scale_of
from windtunnel.views import View, line, table


def replicate(
    recipe: Recipe, home: Path, *, size: str = "small", claims: Sequence[str] = (), seeds: int | None = None,
    out: Path | None = None, markdown: Path | None = None, devices: str | None = None, quiet: bool = False,
) -> View:  # fmt: skip
    """Trains what the claims need, decides each, and writes the table after every claim, so that a stop loses nothing.

    Args:
        recipe: corpora, tokenizer, row and the decay with better data; sizes and lengths are the scale's.
        size: the scale, a name of ``tunnel.replica.SCALES``.
        claims: names of ``CLAIMS``; all without any.
        seeds: how many; without it, the scale's.
        out: the HTML page; without it, studies/replicate-SIZE.html in the program's folder.
        markdown: also a Markdown table, with its figures as SVG files beside it.

    Raises:
        UserError: there is no such scale or claim.
        Stopped: a stop was asked for; the same command continues.
    """
    scale, chosen = scale_of(size), _chosen(claims)
    count = seeds or scale.seeds
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        lab = Lab(desk, open_program(desk, recipe), scale, count)
        page = out or desk.home.program(recipe.name) / "studies" / f"replicate-{scale.name}.html"
        for claim in chosen:
            before = set(lab.results)
            fact = {**to_fact(claim, found := claim.test(lab)), **_facts(lab, found, before)}
            with desk.book as book:
                book.put_fact(recipe.name, STUDY, f"{scale.name}/{claim.name}", fact)
            write_json(desk.home.program(recipe.name) / "studies" / f"replicate-{scale.name}-{claim.name}.json", fact)
            facts = known_claims(desk.book, recipe.name, scale)
            write_bytes(page, replication_page(recipe.name, scale.name, facts).encode())
            if markdown is not None:
                write_markdown(markdown, recipe.name, scale, facts)
        facts = known_claims(desk.book, recipe.name, scale)
    data = {"program": recipe.name, "size": scale.name, "claims": facts, "page": str(page)}
    return View(data, tuple(_parts(facts, page)))


def write_markdown(path: Path, program: str, scale: Scale, facts: Sequence[Mapping[str, Any]]) -> None:
    """The table as Markdown and its figures as SVG files beside it."""
    names: dict[str, list[str]] = {}
    for claim, index, svg in replication_figures(facts):
        file = path.with_name(f"{path.stem}-{claim}{f'-{index}' if index else ''}.svg")
        write_bytes(file, svg.encode())
        names.setdefault(claim, []).append(file.name)
    write_bytes(path, replication_markdown(program, scale.name, facts, names).encode())


def known_claims(book: LabBook, program: str, scale: Scale) -> list[dict[str, Any]]:
    """What has been decided at this scale so far, in the paper's order."""
    found = book.facts(program, STUDY)
    return [fact for name in CLAIMS if (fact := found.get(f"{scale.name}/{name}")) is not None]


def _chosen(names: Sequence[str]) -> list[Claim]:
    if unknown := [name for name in names if name not in CLAIMS]:
        raise UserError("--claim", f"expected some of {', '.join(CLAIMS)}, got {unknown[0][:60]!r}")
    return [claim for name, claim in CLAIMS.items() if not names or name in names]


def _facts(lab: Lab, found: Found, before: set[str]) -> dict[str, Any]:
    """Verdict, setting and cost. Runs that an earlier claim of this call needed too are counted there."""
    setting, own = lab.program.setting(), [stage for key, stage in lab.stages.items() if key not in before]
    return {
        "verdict": together(found.parts), "seeds": lab.seeds, "size": lab.scale.name, "model": lab.scale.model,
        "parameters": lab.shape(lab.scale.model).body, "unit": lab.scale.unit, "batch": lab.scale.batch, "row": setting.row,
        "corpora": dict(setting.corpora), "mixture": dict(lab.mixture), "rates": dict(lab.rates),
        "cost": cost_of(own, lab.results, target_flops(lab.desk.book, lab.program.name)),
    }  # fmt: skip


def _parts(facts: Sequence[Mapping[str, Any]], page: Path) -> Iterator[RenderableType]:
    rows = [
        (fact["name"], part["says"], shown(part), f"{part['asks']} {part['unit']}", part["verdict"])
        for fact in facts
        for part in fact["parts"]
        or [{"says": fact["says"], "estimate": None, "asks": "", "unit": "", "verdict": "cannot tell"}]
    ]
    yield table(("claim", "sentence", "measured, 90 %", "asked", "verdict"), rows)
    for fact in facts:
        yield from (line(f"{fact['name']}: {note}", "dim") for note in fact["notes"])
    yield from (line(f"{where}, {what}: {verb} answers it", "dim") for where, what, verb in ELSEWHERE)
    found = [fact["verdict"] for fact in facts]
    counts = ", ".join(f"{verdict}: {found.count(verdict)}" for verdict in VERDICTS)
    yield line(f"claims: {counts}; {cost_line(all_together(fact['cost'] for fact in facts))}; the page is {page}")


def shown(part: Mapping[str, Any]) -> str:
    """A mean with its interval."""
    found = part["estimate"]
    if found is None:
        return "–"
    value = f"{found['value']:+.2f}"
    if found["low"] is not None:
        value += f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return minus(f"{value} {part['unit']}")
