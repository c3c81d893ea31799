"""Commands of the studies on the paper's claims, the decay stage and new text; each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from windtunnel.cli_options import HOME, AsJson, Devices, Home, Overrides, RecipeFile, RunName, load, show


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


def adapt(
    name: RunName,
    paths: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help="The new text: file, folder or glob; repeatable.")
    ],
    chats: Annotated[
        list[str] | None, typer.Option("--chats", metavar="PATH", help="JSONL of messages, for the decay; repeatable.")
    ] = None,
    program: Annotated[str, typer.Option("--name", help="Name of the new program.")] = "adapted",
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Default: a quarter of the model's, or the text twice.")
    ] = None,
    replay: Annotated[
        float, typer.Option("--replay", min=0.0, max=0.95, help="Share of old text, against forgetting.")
    ] = 0.25,
    lr: Annotated[float | None, typer.Option("--lr", min=1e-8, help="Base rate; default: the model's.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=20, help="Seeds of the short branches.")] = 3,
    only_plan: Annotated[bool, typer.Option("--plan", help="Stop after the forecast of gain and loss.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe's file; default NAME.toml.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Go on from a finished model with your own text."""
    from windtunnel.adaptation import Wish
    from windtunnel.adaptation import adapt as call

    wish = Wish(program, tuple(paths), tuple(chats or ()), tokens, replay, lr, seeds)
    show(call(home, name, wish, out=out, plan=only_plan, devices=devices), as_json)


def law_dynamics(
    name: RunName,
    steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Its last so many; default: the decay and as many before.")
    ] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Look at every so many steps.")] = 1,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Steps between snapshots of the weights.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Show what trunk.dynamics recorded; no second pass.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """What a decay does to gradients, curvature and weights."""
    from windtunnel.dynamics_study import dynamics as call

    show(call(home, name, steps=steps, every=every, window=window, out=out, devices=devices, live=live), as_json)


def law_decay_data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option("--candidate", metavar="CORPUS", help="Repeatable; default: all the trunk leaves out."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="CORPUS", help="Held-out text that judges; default: the trunk's."),
    ] = None,
    share: Annotated[float, typer.Option("--share", min=0.01, max=1.0, help="Share of the candidate.")] = 0.3,
    size: Annotated[str | None, typer.Option("--size", help="Default: the smallest proxy.")] = None,
    tokens: Annotated[str, typer.Option("--tokens", help="Whole length of a run, decay included.")] = "20N",
    decay: Annotated[float, typer.Option("--decay", min=0.01, max=0.9, help="Share of it that decays.")] = 0.1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Paired seeds.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """What is each corpus worth in the decay?"""
    loaded = load(recipe, overrides)
    from windtunnel.decay_data_study import decay_data as call

    found = call(
        loaded, home, candidates=candidates or (), on=on or (), share=share, size=size, tokens=tokens, decay=decay,
        seeds=seeds, out=out, devices=devices,
    )  # fmt: skip
    show(found, as_json)


def law_mixture(
    recipe: RecipeFile,
    overrides: Overrides = None,
    corpora: Annotated[
        list[str] | None, typer.Option("--corpus", metavar="NAME", help="Mixed; repeatable. Default: the recipe's.")
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option("--on", metavar="CORPUS", help="Held-out text that judges; default: all mixed.")
    ] = None,
    stage: Annotated[str, typer.Option("--stage", help="What reads the mixture: decay or trunk.")] = "decay",
    cap: Annotated[float, typer.Option("--cap", min=0.1, help="The target reads no corpus more often.")] = 4.0,
    mixtures: Annotated[int | None, typer.Option("--mixtures", min=4, help="Drawn; default: 4 a corpus.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Default: the smallest proxy.")] = None,
    tokens: Annotated[str, typer.Option("--tokens", help="Whole length of a run, decay included.")] = "20N",
    decay: Annotated[float, typer.Option("--decay", min=0.01, max=0.9, help="Share of it that decays.")] = 0.2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Fresh seeds of the comparison.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Choose the shares of corpora on proxies, and try them."""
    loaded = load(recipe, overrides)
    from windtunnel.mixture_study import study_mixture as call

    found = call(
        loaded, home, corpora=corpora or (), on=on or (), stage=stage, cap=cap, mixtures=mixtures, size=size, tokens=tokens,
        decay=decay, seeds=seeds, out=out, devices=devices,
    )  # fmt: skip
    show(found, as_json)


def register(app: typer.Typer, law: typer.Typer) -> None:
    """Adds the commands to the program and to its group of laws."""
    app.command()(replicate)
    app.command()(adapt)
    law.command("dynamics")(law_dynamics)
    law.command("decay-data")(law_decay_data)
    law.command("mixture")(law_mixture)
