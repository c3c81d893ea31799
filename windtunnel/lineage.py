"""The tree of models in a home: what grew from what, a new branch from any checkpoint, a run deleted. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import explained
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import bytes_size, si
from windtunnel.comparison import find_run, open_book
from windtunnel.desk import Desk
from windtunnel.home import Home, keep_fact
from windtunnel.pipeline import run
from windtunnel.recipe import check_files, parse_recipe
from windtunnel.recipe_errors import nearest, toml_value
from windtunnel.recipe_schema import Origin, Recipe
from windtunnel.train.folder import steps_saved
from windtunnel.train.stage import Stage
from windtunnel.views import View, line

Row = Mapping[str, Any]
GROWN = "grown"
"""Kind of the facts that keep the table of every branch grown beside the recipe, by its name."""
_SHARES = {"accuracy": "right", "stop_rate": "ends", "preference_accuracy": "prefers"}


def tree(home: Path, program: str | None = None) -> View:
    """The trunks of a home, or of one program, with everything that grew from them.

    Raises:
        UserError: no such program.
    """
    book = open_book(home)
    names = book.programs()
    if program is not None and program not in names:
        raise UserError("model tree", f"expected a program of this home, got {program[:60]!r}", nearest(program, names))
    data: dict[str, Any] = {}
    parts: list[RenderableType] = []
    for name in [program] if program else names:
        rows = book.runs(program=name, study="")
        nodes = [_node(book, home, row) for row in rows]
        data[name] = nodes
        if nodes:
            parts.append(line(f"{name}   {bytes_size(sum(node['bytes'] for node in nodes))} on disk", "bold"))
            parts += [line(text) for text in _drawn(nodes)]
    if not parts:
        parts.append(line("no model has been trained here yet; try: windtunnel quickstart"))
    return View({"programs": data}, tuple(parts))


def _node(book: LabBook, home: Path, row: Row) -> dict[str, Any]:
    folder = home / row["folder"]
    scores = [
        {key: score[key] for key in ("corpus", "name", "value", "unit", "count", "low", "high")}
        for score in book.scores(row["id"])
        if score["name"] != "nats_per_byte"
    ]
    start = row["config"].get("start")
    return {
        "id": row["id"], "name": row["name"], "kind": row["kind"], "status": row["status"], "parent": row["parent"] or None,
        "forecast": row["forecast"] or None,
        "from_step": start["step"] if start else None, "averages": _members(row), "steps": row["steps"],
        "tokens": row["tokens"], "scores": scores, "checkpoints": steps_saved(folder), "bytes": disk(folder),
    }  # fmt: skip


def _members(row: Row) -> list[str]:
    """The runs that a soup averages, by the beginning of their keys and step."""
    return [f"{member['stage'][:10]}@{member['step']}" for member in row["config"].get("average") or ()]


def disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _drawn(nodes: list[dict[str, Any]]) -> list[str]:
    """The tree as lines of text, children under their parents in the order in which they were recorded."""
    known = {node["id"] for node in nodes}
    out: list[str] = []

    def draw(node: dict[str, Any], lead: str, last: bool, root: bool) -> None:
        mark = "" if root else "└─ " if last else "├─ "
        out.append(f"{lead}{mark}{_said(node)}")
        below = [other for other in nodes if other["parent"] == node["id"]]
        for i, child in enumerate(below):
            draw(child, lead if root else lead + ("   " if last else "│  "), i == len(below) - 1, False)

    for node in nodes:
        if node["parent"] not in known:
            draw(node, "  ", True, True)
    return out


def _said(node: dict[str, Any]) -> str:
    tokens = f"{si(node['tokens'])} tokens" if node["tokens"] else ""
    at = f"from step {node['from_step']:,}" if node["from_step"] is not None and not node["averages"] else ""
    at = f"mean of {len(node['averages'])} checkpoints" if node["averages"] else at
    shown = [f"{s['corpus']} {s['value']:.4f}" for s in node["scores"] if s["name"] == "bits_per_byte"]
    bits = f"bits per byte: {', '.join(shown)}" if shown else ""
    shares = [
        f"{s['corpus']} {_SHARES[s['name']]} {100 * s['value']:.0f} %" for s in node["scores"] if s["name"] in _SHARES
    ]
    count = len(node["checkpoints"])
    place = f"{bytes_size(node['bytes'])} in {count} checkpoint{'' if count == 1 else 's'}"
    under = f"forecast {node['forecast'][:12]}" if node["forecast"] else ""
    parts = [node["kind"], node["status"] if node["status"] != "done" else "", at, tokens, under, bits, *shares, place]
    return f"{node['name']}   {' · '.join(part for part in parts if part)}"


def branch(
    home: Path,
    source: str,
    name: str,
    *,
    kind: str | None = None,
    values: Sequence[str] = (),
    devices: str | None = None,
) -> View:
    """Grows one more branch of a program: adds it to the recipe as it was last run, and runs up to it.

    After an interruption the same call goes on.

    Args:
        source: a run, and ``@STEP`` for that step of it: from a checkpoint that stays there, or trained again up to it.
        kind: of the branch; by default a decay from a trunk, and from a branch what its mixture is for.
        values: ``KEY=VALUE`` of the branch's table; with ``corpus.`` in front, of a corpus.

    Raises:
        UserError: no such run, a name that is taken, a step that is no number.
        RecipeError: a value is wrong; nothing has been trained.
    """
    book = open_book(home)
    place, at, step = source.rpartition("@") if "@" in source else (source, "", "")
    row = find_run(book, place)
    program = row["program"]
    resolved = book.fact(program, "recipe", "resolved")
    if resolved is None or row["study"]:
        raise UserError(
            "model branch",
            f"expected a trunk or a branch, got the {row['kind']} '{row['name']}'",
            "see: windtunnel model tree",
        )
    grown = book.facts(program, GROWN)
    resolved = _with_grown(resolved, grown)
    taken = UserError("--name", f"expected a new name, got {name!r}, which '{program}' has", "choose another")
    before, begun = dict(resolved["corpus"]), resolved["branch"].pop(name, None)
    above = {parent for one in resolved["branch"].values() for parent in (one["parent"], *(one.get("of") or ()))}
    if begun is not None and (name in grown or name in above):
        raise taken
    trunk, key = row["kind"] == "trunk", f"branch.{name}"
    chosen = kind or ("decay" if trunk else _kind_for(resolved, values))
    overrides = [] if chosen == "soup" else [f"{key}.parent={row['name']}"]
    if at:
        overrides.append(f"{key}.at={_own_step(row, source, step, chosen)} steps")
    overrides += [value if value.startswith("corpus.") else f"{key}.{value}" for value in values]
    base = Path(book.fact(program, "recipe", "base") or ".")
    recipe = parse_recipe(resolved, [f"{key}.kind={chosen}", *overrides], Origin(f"recipe of '{program}'", base))
    kept = _kept(recipe, name)
    if begun is not None and kept != {
        "branch": begun,
        "corpus": {corpus: before.get(corpus) for corpus in kept["corpus"]},
    }:
        raise taken
    check_files(recipe)
    book.close()
    run(recipe, home, until=name, devices=devices, alone=True)
    keep_fact(home, program, GROWN, name, kept)
    stated = recipe.branch[name].model_dump(mode="json", exclude_unset=True)
    table = "\n".join([f"[{key}]", *(f"{k} = {toml_value(v)}" for k, v in stated.items())])
    shown = tree(home, program)
    said = line(f"'{name}' is grown; to keep it in your recipe, add:\n\n{table}\n")
    return View({"branch": name, "program": program, "table": table, **shown.data}, (*shown.parts, said))


def _own_step(row: Row, source: str, step: str, kind: str) -> int:
    """The step of a run that ``RUN@STEP`` names, counted from where that run begins.

    Raises:
        UserError: it is none of that run's, or nothing begins there.
    """
    if not step.isdigit():
        raise UserError("model branch", f"expected RUN or RUN@STEP, got {source[:80]!r}", "write for example trunk@300")
    if kind == "soup":
        raise UserError("model branch", f"expected no step for a soup, got {source[:80]!r}", "name its members with of")
    parent = Stage.from_dict(row["config"])
    if row["kind"] != "trunk" and not parent.first_step < int(step) <= parent.steps:
        problem = f"expected a step of '{parent.name}', {parent.first_step + 1} to {parent.steps}, got {step[:20]}"
        raise UserError("model branch", problem, "leave it out for its end")
    return int(step) - parent.first_step


def _kept(recipe: Recipe, name: str) -> dict[str, Any]:
    """A branch's table and those of the corpora that it reads: what a later call needs to know of it."""
    now = recipe.resolved()
    needs = recipe.branch[name].mixture or {}
    return {"branch": now["branch"][name], "corpus": {corpus: now["corpus"][corpus] for corpus in needs}}


def _with_grown(resolved: Mapping[str, Any], grown: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it was last run, with the branches that were grown beside it: a later run of its file knows nothing of them."""
    branches, corpora = dict(resolved["branch"]), dict(resolved["corpus"])
    for name, kept in grown.items():
        branches.setdefault(name, kept["branch"])
        corpora = {**kept["corpus"], **corpora}
    return {**resolved, "branch": branches, "corpus": corpora}


def _kind_for(resolved: Mapping[str, Any], values: Sequence[str]) -> str:
    """What a mixture is for: pairs for dpo, any chats for sft, else text to adapt to."""
    stated = next((value for value in values if value.partition("=")[0].strip() == "mixture"), "")
    named = [corpus for name, corpus in resolved["corpus"].items() if name in stated]
    if any(corpus.get("chosen") for corpus in named):
        return "dpo"
    return "sft" if any(corpus.get("messages") or corpus.get("user") for corpus in named) else "adapt"


@dataclass(frozen=True)
class Doomed:
    """A run that may be deleted, with the question that a person is asked first."""

    row: Row
    bytes: int
    question: str


def doomed(home: Path, name: str) -> Doomed:
    """The run to delete, if nothing grows from it.

    Raises:
        UserError: no such run, or another run grows from it or averages it; nothing is deleted.
    """
    book = open_book(home)
    row = find_run(book, name)
    key = Path(row["folder"]).name.rpartition("-")[2]
    children = [  # of any program: an adapted model grows from another program's
        other for other in book.runs()
        if other["parent"] == row["id"] or any(member.startswith(f"{key}@") for member in _members(other))
    ]  # fmt: skip
    if children:
        own = row["program"]
        names = ", ".join(
            str(c["name"] if c["program"] == own else f"{c['program']}/{c['name']}") for c in children[:5]
        )
        more = f" and {len(children) - 5} more" if len(children) > 5 else ""
        fix = "delete what grows from it first"
        raise UserError(
            "model delete", f"expected a run that nothing grows from, but {names}{more} grow from '{row['name']}'", fix
        )
    size = disk(home / row["folder"])
    said = f"Delete {row['id']} ({row['kind']}, {bytes_size(size)}) with its checkpoints, metrics and scores?"
    return Doomed(row, size, said)


def _forget_branch(book: LabBook, program: str, name: str) -> None:
    """Takes a deleted branch out of the recipe as it was last run, unless another one there needs it: its name is free again."""
    book.forget_fact(program, GROWN, name)
    resolved = book.fact(program, "recipe", "resolved")
    if resolved is None or name not in resolved["branch"]:
        return
    others = {key: table for key, table in resolved["branch"].items() if key != name}
    if not any(name in (table.get("parent"), *(table.get("of") or ())) for table in others.values()):
        book.put_fact(program, "recipe", "resolved", {**resolved, "branch": others})


def delete(home: Path, found: Doomed) -> View:
    """Deletes a run's folder and what the lab book knows of it. An export of it stays.

    Raises:
        UserError: another command is at work on its program, or a child has grown meanwhile.
    """
    row = found.row
    folder, place = home / row["folder"], Home(home)
    with Desk(place, row["program"], quiet=True) as desk:
        doomed(home, row["id"])
        with explained(folder):
            if folder.is_dir():
                aside = folder.with_name(
                    f".{folder.name}.old"
                )  # a kill in the middle leaves nothing that looks like a run
                folder.rename(aside)
                shutil.rmtree(aside)
        with desk.book as book:
            book.forget_run(row["id"])
            for kind in ("model", "outcome"):
                book.forget_fact(row["program"], kind, folder.name)
            _forget_branch(book, row["program"], row["name"])
    again = "" if row["study"] else f"; a recipe that still has '{row['name']}' trains it again"
    return View(
        {"deleted": row["id"], "bytes": found.bytes}, (line(f"deleted {row['id']}, {bytes_size(found.bytes)}{again}"),)
    )
