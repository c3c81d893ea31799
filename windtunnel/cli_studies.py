"""Commands of the studies on the paper's claims, the decay stage and new text; each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from windtunnel.cli_options import HOME, AsJson, Devices, Home, Overrides, RecipeFile, load, show


def replicate(
    recipe: RecipeFile = "replicate",
    overrides: Overrides = None,
    size: Annotated[
        str, typer.Option("--size", help="tiny (minutes), small (an hour on 2 cores), medium, or paper (GPUs).")
    ] = "small",
    claims: Annotated[
        list[str] | None, typer.Option("--claim", metavar="NAME", help="Only this claim; repeatable.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, max=100, help="Default: 3.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default: in the program's folder.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also a Markdown file, with its figures beside it.")
    ] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Try the paper's claims: holds, does not hold, cannot tell."""
    loaded = load(recipe, overrides)
    from windtunnel.replication import replicate as call

    found = call(loaded, home, size=size, claims=claims or (), seeds=seeds, out=out, markdown=markdown, devices=devices)
    show(found, as_json)


def register(app: typer.Typer, law: typer.Typer) -> None:
    """Adds the commands to the program and to its group of laws."""
    app.command()(replicate)
