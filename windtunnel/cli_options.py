"""What several commands share: arguments, options, exit codes in words. Loads nothing but typer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from typer.core import TyperGroup

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong recipe, option or input, 3 the forecast exceeds a limit, 4 training diverged, "
    "75 stopped on request (the same command continues), 130 interrupted."
)
Home = Annotated[
    Path,
    typer.Option(
        "--home", envvar="WINDTUNNEL_HOME", help="Folder of runs, corpora and the lab book.", show_default=True
    ),
]
HOME = Path("windtunnel-home")
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file, or the name of a shipped recipe.")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run: PROGRAM/NAME, NAME if it is unique, or its folder.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set trunk.tokens=6.4M.")
]
DynamicNtk = Annotated[
    str | None,
    typer.Option(
        "--dynamic-ntk",
        metavar="FACTOR[@TOKENS]",
        help="Stretch positions beyond so many tokens, by default the model's; none: as trained. Default: as its recipe says.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="Devices to use: cpu, cuda, cuda:0,1, or ray[:HOST:PORT] for trials on a Ray cluster. Default: what is there.",
    ),
]


SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
"""Of every group of commands."""


Part = Annotated[str | None, typer.Option("--part", metavar="K/N", help="Only this share of the trials: 3/28.")]
Workers = Annotated[
    str, typer.Option("--workers", metavar="auto|N", help="Workers for small stages; auto: one for each core or GPU.")
]
PerGpu = Annotated[
    str,
    typer.Option(
        "--workers-per-gpu", metavar="auto|N", help="Workers on each GPU; auto: as many as are measured to pay."
    ),
]


class ShowByDefault(TyperGroup):
    """``windtunnel data PATH`` is ``windtunnel data show PATH``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["show", *args])


def load(recipe: str, overrides: list[str] | None) -> Any:
    """A recipe by path or name, checked, with all local files that it names there."""
    from windtunnel.recipe import check_files, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_files(loaded)
    return loaded


class Result(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def show(result: Result | None, as_json: bool = False) -> None:
    """Prints a result: as JSON, as rich text if it has a form for the terminal, or as its ``str``."""
    if result is None:
        return
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    elif hasattr(result, "__rich__") or hasattr(result, "__rich_console__"):
        from rich.console import Console

        terminal = sys.stdout.isatty()
        Console(highlight=False, width=None if terminal else 130, soft_wrap=not terminal).print(result)
    else:
        typer.echo(str(result))
