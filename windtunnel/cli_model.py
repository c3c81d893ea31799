"""Commands about models: their tree, a new branch, a run deleted, shapes; each loads what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from windtunnel.base.errors import UserError
from windtunnel.cli_options import HOME, AsJson, Devices, Home, Overrides, RecipeFile, RunName, load, show


def tree(
    program: Annotated[str | None, typer.Argument(metavar="[PROGRAM]", help="Default: every program.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Trunks and branches: lineage, tokens, scores, disk."""
    from windtunnel.lineage import tree as call

    show(call(home, program), as_json)


def branch(
    source: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="What it grows from: a run, or a step of it.")],
    name: Annotated[str, typer.Option("--name", help="Name of the new branch.")],
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Default: decay from a trunk; from a branch sft, dpo or adapt by its data."),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the branch's table: --set tokens=10%; repeatable."),
    ] = None,
    devices: Devices = None,
    home: Home = HOME,
) -> None:
    """Grow a new branch from any checkpoint."""
    from windtunnel.lineage import branch as call

    show(call(home, source, name, kind=kind, values=values or (), devices=devices))


def delete(
    name: RunName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = HOME,
) -> None:
    """Delete a run after asking; never one that others grow from."""
    from windtunnel.lineage import delete as call
    from windtunnel.lineage import doomed

    found = doomed(home, name)
    if not yes:
        try:
            agreed = typer.confirm(found.question)
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            fix = "nothing is deleted; --yes deletes without asking"
            raise UserError("model delete", "expected an answer, and there is nobody to ask", fix) from None
        if not agreed:
            raise typer.Abort
    show(call(home, found))


def shapes(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    vocab: Annotated[int, typer.Option("--vocab", min=261, help="Vocabulary for the embedding's size.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """The sizes of each family by name: shape, body + embedding = total."""
    from windtunnel.cli_tables import Shapes

    show(Shapes.of(family, vocab), as_json)


def preferences(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN ...", help="One DPO branch of each seed; or their programs.")
    ],
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """What DPO gained on held-out pairs, over seeds."""
    from windtunnel.preference_study import over_seeds as call

    show(call(home, runs), as_json)


def upcycling(
    recipe: RecipeFile,
    overrides: Overrides = None,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Of kind moe; default: the only one.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Paired seeds.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Do upcycled experts pay, beside the same model going on?"""
    loaded = load(recipe, overrides)
    from windtunnel.upcycling_study import upcycling as call

    show(call(loaded, home, branch=branch, seeds=seeds, out=out, devices=devices), as_json)


VERBS: dict[str, Callable[..., Any]] = {
    "tree": tree, "branch": branch, "delete": delete, "preferences": preferences, "shapes": shapes,
    "upcycling": upcycling,
}  # fmt: skip
