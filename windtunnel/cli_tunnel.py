"""The commands ``windtunnel tunnel …``: the studies on tiny models. They parse, call and print; nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from windtunnel.base.devices import Crew
from windtunnel.cli_options import (
    HOME,
    SETTINGS,
    AsJson,
    Devices,
    Home,
    Overrides,
    Part,
    PerGpu,
    RecipeFile,
    Workers,
    load,
    show,
)

app = typer.Typer(help="The studies on tiny models, one at a time.", **SETTINGS)


@app.command("search")
def tunnel_search(
    recipe: RecipeFile,
    overrides: Overrides = None,
    part: Part = None,
    devices: Devices = None,
    workers: Workers = "auto",
    per_gpu: PerGpu = "1",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Search hyper-parameters, check them on a wider model."""
    loaded = load(recipe, overrides)
    from windtunnel.pipeline import run as call

    show(call(loaded, home, until="search", devices=devices, part=part, crew=Crew(workers, per_gpu)), as_json)


@app.command("scale")
def tunnel_scale(
    recipe: RecipeFile,
    overrides: Overrides = None,
    part: Part = None,
    devices: Devices = None,
    workers: Workers = "auto",
    per_gpu: PerGpu = "1",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Train the trunks and branches that give the law."""
    loaded = load(recipe, overrides)
    from windtunnel.pipeline import run as call

    show(call(loaded, home, until="scaling", devices=devices, part=part, crew=Crew(workers, per_gpu)), as_json)


@app.command("transfer")
def tunnel_transfer(
    recipe: RecipeFile,
    overrides: Overrides = None,
    axes: Annotated[
        str | None, typer.Option("--axes", help="Of width, depth, batch, horizon, size: --axes width,depth.")
    ] = None,
    part: Part = None,
    devices: Devices = None,
    workers: Workers = "auto",
    per_gpu: PerGpu = "1",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Does the best learning rate carry over? One axis at a time."""
    loaded = load(recipe, overrides)
    from windtunnel.transfer_study import transfer as call

    wanted = [name.strip() for name in axes.split(",") if name.strip()] if axes else []
    show(call(loaded, home, axes=wanted, devices=devices, part=part, crew=Crew(workers, per_gpu)), as_json)


@app.command("batch")
def tunnel_batch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    part: Part = None,
    devices: Devices = None,
    workers: Workers = "auto",
    per_gpu: PerGpu = "1",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Which batch, and what does half or double of it cost?"""
    loaded = load(recipe, overrides)
    from windtunnel.batch_study import batch as call

    show(call(loaded, home, devices=devices, part=part, crew=Crew(workers, per_gpu)), as_json)


@app.command("coordinates")
def tunnel_coordinates(
    recipe: RecipeFile = "quickstart",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    workers: Workers = "auto",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Do wide models compute with changes as large as narrow ones?"""
    loaded = load(recipe, overrides)
    from windtunnel.coordinate_study import coordinates as call

    show(call(loaded, home, out=out, crew=Crew(workers)), as_json)


@app.command("merge")
def tunnel_merge(
    homes: Annotated[list[Path], typer.Argument(metavar="HOME ...", help="Homes in which parts were trained.")],
    into: Annotated[Path, typer.Option("--into", help="Home that receives all runs; made if it is new.")],
    mixed: Annotated[
        bool, typer.Option("--mixed-numerics", help="Also trials of different devices, dtypes, threads or torches.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Join the runs of several homes into one study."""
    from windtunnel.merging import merge as call

    show(call(homes, into, mixed=mixed), as_json)
