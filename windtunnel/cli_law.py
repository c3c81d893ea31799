"""Verbs of ``windtunnel law`` that fit laws and ask them; registered by ``cli``. Loads nothing but typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from windtunnel.cli_options import HOME, AsJson, Devices, Home, Overrides, RecipeFile, load, show


def law_fit(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="CSV of runs with columns n, d, loss and, if any, cluster.")
    ],
    form: Annotated[str, typer.Option("--form", help="additive, coupled, skaling, or best of the three.")] = "additive",
    unit: Annotated[str, typer.Option("--unit", help="Unit of the losses.")] = "nats per byte",
    counts: Annotated[str, typer.Option("--counts", help="What n counts: body or body+head.")] = "body",
    delta: Annotated[
        float, typer.Option("--delta", min=1e-6, help="Log residual beyond which a point counts less.")
    ] = 1e-3,
    draws: Annotated[int, typer.Option("--draws", min=0, help="Refits to resampled trunks for intervals.")] = 200,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for windtunnel law predict --law.")] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="SVG file for the map of the law.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit L(N, D) to finished runs in a table."""
    from windtunnel.cli_tables import FittedTable

    show(
        FittedTable.of(path, form, unit=unit, counts=counts, delta=delta, draws=draws, out=out, figure=figure), as_json
    )


def law_schedule(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE ...", help="A run of the home, or CSV files of step, lr, loss.")
    ],
    length: Annotated[str, typer.Option("--length", help="Of the whole run: 6.4M tokens, 20N or '20000 steps'.")],
    warmup: Annotated[int | None, typer.Option("--warmup", min=0, help="Updates of warmup of CSV runs.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="FORM:SHARE:FLOOR", help="To beat; default: the run's own, or linear:10%:0.1."
        ),
    ] = None,
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Also decays longer and lower than the runs speak for.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Choose the decay of a run by the law of its curves."""
    from windtunnel.schedule_design import schedule as call

    show(call(home, sources, length, warmup=warmup, against=against, anywhere=anywhere), as_json)


def law_curve(
    recipe: RecipeFile,
    overrides: Overrides = None,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="SCHEDULE", help="own, cosine, or a decay FORM:SHARE:FLOOR.")
    ] = "own",
    size: Annotated[str | None, typer.Option("--size", help="Of the family; default: the recipe's target.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Whole length; default: the recipe's.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Then train the run, and score the forecast.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Forecast a whole loss curve under any schedule."""
    loaded = load(recipe, overrides)
    from windtunnel.curve_forecast import curve as call

    found = call(loaded, home, schedule=schedule, size=size, tokens=tokens, train=train, out=out, devices=devices)
    show(found, as_json)


def law_decide(
    a: Annotated[str, typer.Argument(metavar="A", help="A run; runs that differ in seeds only count with it.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A run of the other recipe.")],
    least: Annotated[
        str | None, typer.Option("--least", metavar="SHARE", help="Difference that matters, fixed at first; 0.5%.")
    ] = None,
    alpha: Annotated[
        str | None, typer.Option("--alpha", metavar="SHARE", help="False picks over all looks, fixed at first; 5%.")
    ] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Held-out corpus; default: the mean of all.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Which of two recipes is better, by paired seeds."""
    from windtunnel.base.units import parse_share
    from windtunnel.decisions import decide_between as call

    shares = {
        name: None if text is None else parse_share(text, f"--{name}")
        for name, text in (("least", least), ("alpha", alpha))
    }
    show(call(home, a, b, **shares, corpus=corpus), as_json)


def law_scale(
    recipe: RecipeFile,
    overrides: Overrides = None,
    counts: Annotated[str, typer.Option("--counts", help="What N counts: body or body+head.")] = "body",
    flops: Annotated[str, typer.Option("--flops", help="What a token costs: 6ND or exact.")] = "6ND",
    budget: Annotated[
        str | None, typer.Option("--budget", help="FLOPs whose best use is asked for; default: ten times a point's.")
    ] = None,
    inference: Annotated[
        str | None, typer.Option("--inference-tokens", help="Expected in use, which the budget then pays for too.")
    ] = None,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Train trunks and branches, fit L(N, D) on every corpus."""
    from windtunnel.recipe import check_files, load_recipe
    from windtunnel.scale_study import scale as call

    loaded = load_recipe(recipe, overrides or ())
    check_files(loaded)
    found = call(loaded, home, devices=devices, counts=counts, flops=flops, budget=budget, inference_tokens=inference)
    show(found, as_json)


VERBS = {"scale": law_scale, "curve": law_curve, "decide": law_decide, "fit": law_fit, "schedule": law_schedule}
