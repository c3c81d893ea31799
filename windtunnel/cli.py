"""The command ``windtunnel``: parses, calls and prints; nothing else.

Every command imports what it needs when it runs, so that ``--help`` and recipe errors answer at once, without torch.

    exit code 0   done
              1   failed for a reason that has no number of its own
              2   a recipe, an option or an input file is wrong
              3   the forecast exceeds a limit of the recipe (max_loss, max_hours, max_cost)
              4   training diverged
              75  stopped cleanly on request; the same command continues
              130 interrupted before there was anything to save
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from windtunnel import cli_tunnel
from windtunnel.base.devices import Crew
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.cli_law import VERBS as LAW_VERBS
from windtunnel.cli_model import VERBS as MODEL_VERBS
from windtunnel.cli_options import (
    EPILOG,
    HOME,
    SETTINGS,
    AsJson,
    Devices,
    DynamicNtk,
    Home,
    Overrides,
    PerGpu,
    RecipeFile,
    RunName,
    ShowByDefault,
    Workers,
    load,
    show,
)
from windtunnel.cli_studies import register

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}
_INTERRUPTED = 130
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])
"""The base class of all usage errors, which typer does not export."""

app = typer.Typer(
    help="Design, forecast and train small language models.", epilog=EPILOG, add_completion=True, **SETTINGS
)

data = typer.Typer(help="Look at text before training on it: windtunnel data PATH.", cls=ShowByDefault, **SETTINGS)
law = typer.Typer(help="Named and fitted laws.", **SETTINGS)
model = typer.Typer(help="Sizes, and the tree of models.", **SETTINGS)
for _name, _group in (("data", data), ("tunnel", cli_tunnel.app), ("law", law), ("model", model)):
    app.add_typer(_group, name=_name)
for _name, _verb in MODEL_VERBS.items():
    model.command(_name)(_verb)


# -- everyday verbs --------------------------------------------------------------------------------------------------------


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the program; the recipe becomes NAME.toml.")],
    paths: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help="Your text: file, folder or glob; repeatable.")
    ],
    size: Annotated[str, typer.Option("--size", help="Size of the model.")] = "0.3M",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default NAME.toml.")] = None,
) -> None:
    """Write a commented recipe for your own text."""
    from windtunnel.recipe_new import new_recipe

    target = out or Path(f"{name}.toml")
    text = new_recipe(name, size=size, data=paths, folder=target.parent.absolute())
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(target), "expected no file there, found one", "choose another with --out") from None
    except FileNotFoundError:
        raise UserError(str(target), "expected an existing folder, found none", "create it first") from None
    typer.echo(f"wrote {target}; next: windtunnel plan {target}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option(help="Measure this machine for the times; without it, shapes and steps only.")
    ] = True,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Show all that would be done, with sources; does nothing."""
    loaded = load(recipe, overrides)
    from windtunnel.planning import plan as call

    show(call(loaded, home, measure=measure), as_json)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    devices: Devices = None,
    home: Home = HOME,
    workers: Workers = "auto",
    per_gpu: PerGpu = "1",
) -> None:
    """Do it: skips what is done, continues what was stopped."""
    loaded = load(recipe, overrides)
    from windtunnel.pipeline import run as call

    show(call(loaded, home, until=until, devices=devices, crew=Crew(workers, per_gpu)))


@app.command()
def forecast(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A .toml file, or a shipped recipe.")] = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--list", help="Show all forecasts with outcomes, misses too.")] = False,
    devices: Devices = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Run the tunnel, say what the big run will reach, stop."""
    if every == (recipe is not None):
        raise UserError("forecast", "expected either a recipe or --list", "windtunnel forecast quickstart")
    if recipe is None:
        from windtunnel.ledger import forecasts

        show(forecasts(home), as_json)
        return
    loaded = load(recipe, overrides)
    from windtunnel.pipeline import run as call

    show(call(loaded, home, devices=devices, stop_after_forecast=True), as_json)


@app.command()
def status(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First write the lab book anew from the runs.")] = False,
    average: Annotated[
        bool, typer.Option("--average", help="Also score the mean of a trunk's last checkpoints.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Show programs and runs, and what a trunk would give now."""
    from windtunnel.manage import status as call
    from windtunnel.rebuild import rebuild as again

    if rebuild:
        again(home)
    show(call(home, average=average), as_json)


@app.command()
def report(
    program: Annotated[str | None, typer.Argument(metavar="[PROGRAM]", help="Default: the one that ran last.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default: in the program's folder.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Leave all training text and samples out.")] = False,
    home: Home = HOME,
) -> None:
    """Write the report: one HTML file, forecast beside outcome."""
    from windtunnel.manage import report as call

    show(call(home, program, out=out, share=share))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN ...", help="Two runs or more.")],
    out: Annotated[Path | None, typer.Option("--out", help="SVG file for the figure.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Compare runs: recipes, losses at equal tokens and seconds."""
    if len(runs) < 2:
        raise UserError("compare", "expected two runs or more, got one", "windtunnel status lists them")
    from windtunnel.comparison import compare as call

    show(call(home, runs, out=out), as_json)


@app.command("eval")
def evaluate(
    name: RunName,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME=FILE", help="JSONL of query, choices, gold; repeatable.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Score at most this many held-out tokens of each corpus.")
    ] = None,
    retrieval: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Also hide so many keys at each length and depth, and ask for them.",
        ),
    ] = 0,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Score a model on held-out corpora, tasks and hidden keys."""
    from windtunnel.base.units import parse_count

    files: dict[str, Path] = {}
    for task in tasks or ():
        key, equals, path = task.partition("=")
        if not (key and equals and path):
            raise UserError("--task", f"expected NAME=FILE, got {task[:60]!r}")
        files[key] = Path(path)
    limit = None if tokens is None else parse_count(tokens, "--tokens")
    from windtunnel.manage import evaluate as call

    show(call(home, name, tasks=files, tokens=limit, retrieval=retrieval), as_json)


@app.command()
def export(
    name: RunName,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: exports/ of the run's program.")] = None,
    dynamic_ntk: DynamicNtk = None,
    home: Home = HOME,
) -> None:
    """Write a Hugging Face folder, and check its logits."""
    from windtunnel.manage import export as call

    show(call(home, name, out=out, dynamic_ntk=dynamic_ntk))


@app.command()
def chat(
    name: RunName,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this one prompt and end.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=10.0, help="0 takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Share of probability that is sampled from.")
    ] = 0.9,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    dynamic_ntk: DynamicNtk = None,
    home: Home = HOME,
) -> None:
    """Talk to a model in the terminal; an empty line or Ctrl-D ends."""
    from windtunnel.manage import chat as call

    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    show(call(home, name, prompt=prompt, dynamic_ntk=dynamic_ntk, **sampling))


# -- beside the everyday verbs ---------------------------------------------------------------------------------------------


@app.command()
def quickstart(home: Home = HOME, overrides: Overrides = None, devices: Devices = None) -> None:
    """Real text to forecast, model, report and chat in minutes."""
    run("quickstart", overrides, None, devices, home)


@app.command()
def finish(name: RunName, devices: Devices = None, home: Home = HOME) -> None:
    """Start a trunk's decay at its next step."""
    from windtunnel.manage import finish as call

    show(call(home, name, devices=devices))


@app.command()
def clean(
    really: Annotated[bool, typer.Option("--really", help="Remove it; without this, it is only listed.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Also the notes of failed trials, to try them again.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """List what can go; never a parent or an only copy."""
    from windtunnel.manage import clean as call

    show(call(home, really=really, failed=failed), as_json)


# -- groups ----------------------------------------------------------------------------------------------------------------


@data.command("show")
def datashow(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH ...", help="Files, folders, globs, pypi: or hf: sources; or a recipe.")
    ],
    overrides: Overrides = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Languages, sizes, tokens, what cleaning drops; no training."""
    from windtunnel.manage import inspect_data as call

    recipe = load(paths[0], overrides) if len(paths) == 1 and paths[0].endswith(".toml") else None
    show(call(home, paths, recipe=recipe), as_json)


@data.command("compression")
def data_compression(
    recipe: RecipeFile, overrides: Overrides = None, home: Home = HOME, as_json: AsJson = False
) -> None:
    """Bytes for each token, by corpus and vocabulary size."""
    loaded = load(recipe, overrides)
    from windtunnel.manage import compression as call

    show(call(loaded, home), as_json)


@law.command("list")
def law_list(as_json: AsJson = False) -> None:
    """The named laws with their constants and sources."""
    from windtunnel.cli_tables import NamedLaws

    show(NamedLaws(), as_json)


@law.command("batch")
def law_batch(
    name: Annotated[str, typer.Option("--law", help="minicpm, or the JSON file of a batch study.")],
    loss: Annotated[float, typer.Option("--loss", help="Expected loss in nats per token, of the law's own tokenizer.")],
    as_json: AsJson = False,
) -> None:
    """The best batch at a loss, with the law's warning."""
    from windtunnel.cli_tables import BestBatch

    show(BestBatch.of(name, loss), as_json)


@law.command("predict")
def law_predict(
    name: Annotated[
        str, typer.Option("--law", help="A named law (windtunnel law list) or a JSON file of a fitted one.")
    ],
    flops: Annotated[str | None, typer.Option("--flops", help="Best size and length for this compute.")] = None,
    parameters: Annotated[
        str | None, typer.Option("--parameters", help="With --tokens: the loss at this size and length.")
    ] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="See --parameters.")] = None,
    inference: Annotated[
        str | None,
        typer.Option("--inference-tokens", help="With --flops: tokens expected in use, which it then pays for too."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="A law without a floor beyond ten times its largest size, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The loss at a size and length, or the best for a compute."""
    from windtunnel.cli_tables import Prediction

    show(Prediction.of(name, flops, parameters, tokens, inference, force=force), as_json)


for _verb, _call in LAW_VERBS.items():
    law.command(_verb)(_call)


register(app, law)

# -- entry -----------------------------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from windtunnel import __version__

        typer.echo(f"windtunnel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Design, forecast and train small language models."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: known errors as one line on stderr, unknown ones with their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        code = app(arguments or ["--help"], prog_name="windtunnel", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # typer has caught the interrupt
            return _say("interrupted", code)
        return code if isinstance(code, int) else 0
    except WindtunnelError as error:
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return _say(f"{error.filename or 'windtunnel'}: {error.strerror}", UserError.exit_code)
    except _USAGE_ERROR as error:
        return _say(_usage(error), 2)


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "windtunnel"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{command}: {message}{' See' if message.endswith('?') else '; see'} {command} --help"


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
