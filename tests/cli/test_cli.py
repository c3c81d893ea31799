"""The command line: its surface is frozen, it parses, calls and prints, and it stays light."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import windtunnel as wt
from windtunnel import cli
from windtunnel.base.devices import Crew
from windtunnel.base.errors import (
    ArtefactError,
    DataError,
    Diverged,
    LimitReached,
    RecipeError,
    Stopped,
    UserError,
    WindtunnelError,
)
from windtunnel.base.labbook import LabBook
from windtunnel.comparison import find_run, open_book
from windtunnel.home import Home
from windtunnel.laws.forecast import forecast
from windtunnel.laws.loss import NAMED
from windtunnel.laws.points import Point
from windtunnel.ledger import forecasts

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
SURFACE = {
    "": "--help --install-completion --show-completion --version",
    "new": "--data --help --out --size name",
    "plan": "--help --home --json --measure --no-measure --set recipe",
    "run": "--devices --help --home --set --until --workers --workers-per-gpu recipe",
    "forecast": "--devices --help --home --json --list --set recipe",
    "status": "--average --help --home --json --rebuild",
    "report": "--help --home --out --share program",
    "compare": "--help --home --json --out runs",
    "eval": "--help --home --json --retrieval --task --tokens name",
    "export": "--dynamic-ntk --help --home --out name",
    "chat": "--dynamic-ntk --help --home --max-tokens --prompt --seed --temperature --top-p name",
    "quickstart": "--devices --help --home --set",
    "finish": "--devices --help --home name",
    "clean": "--failed --help --home --json --really",
    "replicate": "--claim --devices --help --home --json --markdown --out --seeds --set --size recipe",
    "adapt": "--chats --data --devices --help --home --json --lr --name --out --plan --replay --seeds --tokens name",
    "data": "--help",
    "data show": "--help --home --json --set paths",
    "data compression": "--help --home --json --set recipe",
    "tunnel": "--help",
    "tunnel search": "--devices --help --home --json --part --set --workers --workers-per-gpu recipe",
    "tunnel merge": "--help --into --json --mixed-numerics homes",
    "tunnel scale": "--devices --help --home --json --part --set --workers --workers-per-gpu recipe",
    "tunnel transfer": "--axes --devices --help --home --json --part --set --workers --workers-per-gpu recipe",
    "tunnel batch": "--devices --help --home --json --part --set --workers --workers-per-gpu recipe",
    "tunnel coordinates": "--help --home --json --out --set --workers recipe",
    "law": "--help",
    "law list": "--help --json",
    "law batch": "--help --json --law --loss",
    "law predict": "--flops --force --help --inference-tokens --json --law --parameters --tokens",
    "law fit": "--counts --delta --draws --figure --form --help --json --out --unit path",
    "law dynamics": "--devices --every --help --home --json --live --out --steps --window name",
    "law curve": "--devices --help --home --json --out --schedule --set --size --tokens --train recipe",
    "law decay-data": "--candidate --decay --devices --help --home --json --on --out --seeds --set --share --size --tokens recipe",
    "law mixture": "--cap --corpus --decay --devices --help --home --json --mixtures --on --out --seeds --set --size --stage "
    "--tokens recipe",
    "law scale": "--budget --counts --devices --flops --help --home --inference-tokens --json --set recipe",
    "law decide": "--alpha --corpus --help --home --json --least a b",
    "law schedule": "--against --anywhere --help --home --json --length --warmup sources",
    "model": "--help",
    "model tree": "--help --home --json program",
    "model branch": "--devices --help --home --kind --name --set source",
    "model delete": "--help --home --yes name",
    "model preferences": "--help --home --json runs",
    "model shapes": "--family --help --json --vocab",
    "model upcycling": "--branch --devices --help --home --json --out --seeds --set recipe",
}
VERBS = [
    "plan",
    "run",
    "forecasts",
    "status",
    "report",
    "compare",
    "evaluate",
    "export",
    "chat",
    "finish",
    "clean",
    "inspect_data",
    "compression",
    "transfer",
    "coordinates",
    "replicate",
    "dynamics",
    "decay_data",
    "tree",
    "branch",
    "delete",
    "batch",
]
EVERYDAY = ["new", "plan", "run", "forecast", "status", "report", "compare", "eval", "export", "chat"]


def surface() -> dict[str, str]:
    found: dict[str, str] = {}

    def visit(command: Any, name: str) -> None:
        context = command.make_context(name or "windtunnel", [], resilient_parsing=True)
        names = [
            option
            for p in command.get_params(context)
            for option in ([*p.opts, *p.secondary_opts] if p.opts[0].startswith("-") else [p.name])
        ]
        found[name] = " ".join(sorted(names))
        for inner, child in getattr(command, "commands", {}).items():
            visit(child, f"{name} {inner}".strip())

    visit(typer.main.get_command(cli.app), "")
    return found


def test_commands_and_options_are_frozen() -> None:
    assert surface() == SURFACE


def test_the_ten_everyday_verbs_come_first() -> None:
    assert list(SURFACE)[1:11] == EVERYDAY
    assert [name for name in surface() if name and " " not in name][:10] == EVERYDAY


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in SURFACE:
        assert cli._run([*name.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert "Usage: windtunnel" in out
        if not name:
            assert "..." not in out.split("Commands:")[1].split("Exit codes")[0], "the summaries fit their lines"
            assert "75 stopped on request" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plann", "quickstart"], "No such command 'plann'"),
        (["plan"], "Missing argument 'RECIPE'"),
        (["plan", "quickstart", "--frob"], "No such option: --frob"),
        (["model"], "Missing command"),
        (["forecast"], "forecast: expected either a recipe or --list"),
        (["forecast", "quickstart", "--list"], "forecast: expected either a recipe or --list"),
        (["compare", "one"], "compare: expected two runs or more"),
        (["eval", "run", "--task", "piqa"], "--task: expected NAME=FILE, got 'piqa'"),
        (["eval", "run", "--tokens", "many"], "--tokens: expected a count"),
        (["chat", "run", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["chat", "run", "--max-tokens", "x"], "Invalid value for '--max-tokens'"),
        (["new", "mine"], "Missing option '--data'"),
        (["new", "mine", "--data", "/absent/file"], "--data: expected an existing file or folder"),
        (["law", "predict", "--law", "chinchilla", "--flops", "1e18"], "--law: expected a named law or a file"),
        (["law", "predict", "--law", "minicpm-average"], "expected either --flops, or --parameters and --tokens"),
        (["model", "shapes", "--family", "gpt"], "--family: expected one of tiny, tiny-wide, minicpm, got 'gpt'"),
        (["run", "nope"], "expected a file or a shipped recipe, got 'nope'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err


# -- calls ---------------------------------------------------------------------------------------------------------------


class Answer:
    """What a verb of the pipeline returns: it prints itself and has a form as JSON."""

    def to_dict(self) -> dict[str, Any]:
        return {"loss": 1.5, "text": "größe"}

    def __str__(self) -> str:
        return "one screen"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """A pipeline that records how it is called."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    fake = types.ModuleType("windtunnel.pipeline")

    def verb(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Answer:
            seen.append((name, args, kwargs))
            return Answer()

        return call

    for name in VERBS:
        setattr(fake, name, verb(name))
    fake.open_book, fake.find_run = open_book, find_run
    names = (
        "pipeline",
        "planning",
        "manage",
        "comparison",
        "transfer_study",
        "coordinate_study",
        "batch_study",
        "replication",
        "dynamics_study",
        "lineage",
        "ledger",
    )
    # Importing a module also sets it on the package: both places are put back as they were.
    keys = [f"windtunnel.{name}" for name in (*names, "api")]
    kept, attributes = {key: sys.modules.pop(key, None) for key in keys}, dict(vars(wt))
    for name in names:
        sys.modules[f"windtunnel.{name}"] = fake
        setattr(wt, name, fake)
    import_module("windtunnel.api")
    monkeypatch.setenv("WINDTUNNEL_HOME", "some-home")
    yield seen
    sys.modules.update({key: module for key, module in kept.items() if module is not None})
    for key in keys:
        if kept[key] is None:
            sys.modules.pop(key, None)
        name = key.partition(".")[2]
        if name in attributes:
            setattr(wt, name, attributes[name])
        else:
            vars(wt).pop(name, None)


HOME = Path("some-home")


@pytest.mark.parametrize(
    ("line", "verb", "args", "kwargs"),
    [
        (
            "run quickstart --until forecast --devices cpu",
            "run",
            (HOME,),
            {"until": "forecast", "devices": "cpu", "crew": Crew()},
        ),
        ("quickstart --home h", "run", (Path("h"),), {"until": None, "devices": None, "crew": Crew()}),
        ("forecast quickstart", "run", (HOME,), {"devices": None, "stop_after_forecast": True}),
        ("forecast --list", "forecasts", (HOME,), {}),
        ("status", "status", (HOME,), {"average": False}),
        ("report quickstart --share", "report", (HOME, "quickstart"), {"out": None, "share": True}),
        ("compare a b", "compare", (HOME, ["a", "b"]), {"out": None}),
        (
            "eval a --task t=f.jsonl --tokens 2k",
            "evaluate",
            (HOME, "a"),
            {"tasks": {"t": Path("f.jsonl")}, "tokens": 2000, "retrieval": 0},
        ),
        ("export a --out o", "export", (HOME, "a"), {"out": Path("o"), "dynamic_ntk": None}),
        ("export a --dynamic-ntk 4@64", "export", (HOME, "a"), {"out": None, "dynamic_ntk": "4@64"}),
        (
            "chat a --prompt Hi",
            "chat",
            (HOME, "a"),
            {"prompt": "Hi", "dynamic_ntk": None, "temperature": 0.7, "top_p": 0.9, "max_tokens": 256, "seed": 0},
        ),
        ("finish a", "finish", (HOME, "a"), {"devices": None}),
        ("clean", "clean", (HOME,), {"really": False, "failed": False}),
        ("clean --really --failed", "clean", (HOME,), {"really": True, "failed": True}),
        ("data a.txt b.txt", "inspect_data", (HOME, ["a.txt", "b.txt"]), {"recipe": None}),
        ("data show a.txt", "inspect_data", (HOME, ["a.txt"]), {"recipe": None}),
        ("data compression quickstart", "compression", (HOME,), {}),
        (
            "tunnel search quickstart",
            "run",
            (HOME,),
            {"until": "search", "devices": None, "part": None, "crew": Crew()},
        ),
        (
            "tunnel batch quickstart --workers 3 --workers-per-gpu auto",
            "batch",
            (HOME,),
            {"devices": None, "part": None, "crew": Crew("3", "auto")},
        ),
        (
            "tunnel scale quickstart --part 2/3",
            "run",
            (HOME,),
            {"until": "scaling", "devices": None, "part": "2/3", "crew": Crew()},
        ),
        (
            "tunnel transfer quickstart --part 2/3",
            "transfer",
            (HOME,),
            {"axes": [], "devices": None, "part": "2/3", "crew": Crew()},
        ),
        (
            "tunnel transfer quickstart --axes width,depth",
            "transfer",
            (HOME,),
            {"axes": ["width", "depth"], "devices": None, "part": None, "crew": Crew()},
        ),
        (
            "tunnel coordinates --out c.svg --workers 3",
            "coordinates",
            (HOME,),
            {"out": Path("c.svg"), "crew": Crew("3")},
        ),
        (
            "replicate --size tiny --claim wsd --claim decay --seeds 4 --out r.html",
            "replicate",
            (HOME,),
            {
                "size": "tiny",
                "claims": ["wsd", "decay"],
                "seeds": 4,
                "out": Path("r.html"),
                "markdown": None,
                "devices": None,
            },
        ),
        (
            "law dynamics a --every 10",
            "dynamics",
            (HOME, "a"),
            {"steps": None, "every": 10, "window": None, "out": None, "devices": None, "live": False},
        ),
        ("model tree quickstart", "tree", (HOME, "quickstart"), {}),
        (
            "model branch a/trunk@90 --name late --set tokens=10% --set floor=0.2",
            "branch",
            (HOME, "a/trunk@90", "late"),
            {"kind": None, "values": ["tokens=10%", "floor=0.2"], "devices": None},
        ),
        ("plan quickstart --no-measure", "plan", (HOME,), {"measure": False}),
    ],
)
def test_each_verb_calls_the_pipeline_and_prints_its_answer(
    line: str,
    verb: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli._run(line.split()) == 0
    ((name, got, options),) = calls
    assert (name, options) == (verb, kwargs)
    assert tuple(a for a in got if type(a).__name__ != "Recipe") == args
    assert capsys.readouterr().out == "one screen\n"


def test_overrides_reach_the_recipe_and_json_is_json(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["plan", "quickstart", "--set", "seed=9", "--set", "trunk.tokens=3M", "--json"]) == 0
    recipe = calls[0][1][0]
    assert recipe.seed == 9
    assert json.loads(capsys.readouterr().out) == {"loss": 1.5, "text": "größe"}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (WindtunnelError("broke"), 1, "broke"),
        (
            RecipeError("a.toml:3: seed", "expected 1, got 2", "write 1"),
            2,
            "a.toml:3: seed: expected 1, got 2; write 1",
        ),
        (DataError("x.txt", "no text"), 2, "x.txt: no text"),
        (ArtefactError("run", "damaged"), 2, "run: damaged"),
        (LimitReached("too dear"), 3, "too dear"),
        (Diverged("nan"), 4, "nan"),
        (Stopped("stopped at step 5"), 75, "stopped at step 5"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/home/x"), 2, "/home/x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "windtunnel: No space left on device"),
        (OSError(30, "Read-only file system", "/x"), 2, "/x: Read-only file system"),
    ],
)
def test_errors_become_one_line_and_their_exit_code(
    error: BaseException,
    code: int,
    line: str,
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["windtunnel.manage"], "status", fail)
    assert cli._run(["status"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_bug_keeps_its_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["windtunnel.manage"], "status", fail)
    with pytest.raises(ZeroDivisionError):
        cli._run(["status"])


# -- light ----------------------------------------------------------------------------------------------------------------


def light(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    check = "\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'\n"
    command = [sys.executable, "-c", script + check, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=cwd)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["--version"], ["model", "shapes"], ["law", "list"],
     ["law", "predict", "--law", "minicpm-average", "--flops", "1e21"], ["new", "mine", "--data", "."]],
)  # fmt: skip
def test_light_commands_leave_torch_out(arguments: list[str], tmp_path: Path) -> None:
    done = light(f"from windtunnel import cli\nassert cli._run({arguments!r}) == 0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout


def test_importing_the_package_leaves_everything_out() -> None:
    done = light(
        "import windtunnel as wt\nwt.__all__, wt.__version__, dir(wt)\nimport sys\nassert 'pydantic' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_reading_a_recipe_in_python_leaves_torch_out() -> None:
    done = light("import windtunnel as wt\nassert wt.load_recipe('minicpm-2.4b').target_shape().body == 2442057984")
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_shape_only_plan_leaves_torch_out(tmp_path: Path) -> None:
    if find_spec("windtunnel.pipeline") is None:
        pytest.skip("windtunnel.pipeline does not exist yet")
    call = ["plan", "minicpm-1.2b", "--no-measure", "--home", str(tmp_path)]
    done = light(f"from windtunnel import cli\nassert cli._run({call!r}) == 0")
    assert done.returncode == 0, done.stderr[-1500:]
    assert "1,247,442,432" in done.stdout


def test_help_loads_no_library_beside_the_parser() -> None:
    script = "import sys\nfrom windtunnel import cli\ncli._run(['--help'])\nheavy = {'numpy', 'pydantic', 'rich', 'scipy', 'jinja2'} & set(sys.modules)\nassert not heavy, heavy"
    done = light(script)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m windtunnel model shapes | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.stdout.startswith("tiny:")
    assert done.stderr == ""


# -- Python ---------------------------------------------------------------------------------------------------------------


def test_the_python_surface_is_frozen(calls: list[Any]) -> None:
    assert wt.__all__ == [
        "Recipe", "Run", "__version__", "clean", "compare", "forecast", "load_recipe", "new", "open", "plan", "run", "status",
    ]  # fmt: skip
    signatures = {
        name: list(inspect.signature(getattr(wt, name)).parameters) for name in wt.__all__ if name[0].islower()
    }
    assert signatures == {
        "clean": ["really", "home"],
        "compare": ["runs", "home"],
        "forecast": ["recipe", "overrides", "home", "devices"],
        "load_recipe": ["path_or_name", "overrides"],
        "new": ["name", "data", "size"],
        "open": ["run", "home"],
        "plan": ["recipe", "overrides", "home", "measure"],
        "run": ["recipe", "overrides", "home", "until", "devices"],
        "status": ["home"],
    }
    public = [name for name in vars(wt.Run) if not name.startswith("_")]
    assert public == [
        "name", "folder", "status", "config", "metrics", "scores", "forecast", "law", "model", "evaluate", "report", "export", "chat",
        "finish",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = wt.frobnicate  # pyright: ignore[reportAttributeAccessIssue]


def test_verbs_and_command_line_call_the_same(calls: list[Any]) -> None:
    wt.plan("quickstart", "seed=4", home="h", measure=False)
    wt.run(wt.load_recipe("quickstart"), home="h", until="trunk")
    wt.forecast("quickstart", home="h")
    wt.status("h")
    wt.clean(home="h")
    wt.compare("a", "b", home="h")
    assert [(name, options) for name, _, options in calls] == [
        ("plan", {"measure": False}),
        ("run", {"until": "trunk", "devices": None}),
        ("run", {"devices": None, "stop_after_forecast": True}),
        ("status", {}),
        ("clean", {"really": False}),
        ("compare", {}),
    ]
    assert calls[0][1][0].seed == 4


def test_an_opened_run_gives_arrays_scores_law_and_forecast(tmp_path: Path, calls: list[Any]) -> None:
    book = LabBook(Home(tmp_path).labbook)
    for program, run in (("a", "1"), ("b", "2"), ("a", "3")):
        book.put_run(
            run,
            program=program,
            kind="decay",
            name="same",
            status="done",
            folder=f"programs/{program}/{run}",
            config={"seed": 1},
        )
    book.put_run("4", program="a", kind="trunk", name="trunk", status="running", folder="programs/a/4", config={})
    book.put_metrics("3", [(2, "loss", 2.5), (1, "loss", 3.0), (2, "lr", 0.1), (3, "loss", None)])
    book.put_score("3", "wiki", "bits_per_byte", 1.9, "bits per byte")
    truth = NAMED["minicpm-average"]
    points = [Point(n, d, truth.predict(n, d), f"{n:g}") for n in (2e4, 5e4, 1e5) for d in (8e5, 1.6e6, 3.2e6)]
    made = forecast(points, 3e5, 6.4e6)
    book.put_fact("a", "forecast", "same-1", {"forecast": made.to_dict(), "hash": "…"})
    book.close()
    run = wt.open("a/same", tmp_path)
    assert (run.name, run.status, run.config) == ("a/same", "done", {"seed": 1}), "of two, the one recorded last"
    assert run.folder == tmp_path / "programs/a/3"
    steps, values = run.metrics()["loss"]
    assert steps.tolist() == [1, 2, 3]
    assert values[:2].tolist() == [3.0, 2.5]
    assert values[2] != values[2], "a value that was not finite is NaN"
    assert run.scores()[0]["value"] == 1.9
    assert run.law is not None
    assert run.law.predict(1e5, 1.6e6) == pytest.approx(truth.predict(1e5, 1.6e6), rel=0.02)
    assert run.forecast is not None
    assert run.forecast.value == made.value
    assert wt.open("trunk", tmp_path).name == "a/trunk"
    with pytest.raises(UserError, match="2 programs have a run 'same'; write a/same or b/same"):
        wt.open("same", tmp_path)
    with pytest.raises(UserError, match="expected a run of this home, got 'x'"):
        wt.open("x", tmp_path)
    with pytest.raises(UserError, match="a checkpoint, found none"):
        run.model()
    run.export(tmp_path / "o")
    assert calls[-1] == ("export", (tmp_path, "a/same"), {"out": tmp_path / "o", "dynamic_ntk": None})


def test_an_empty_home_is_answered_in_one_line_without_an_empty_table(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="windtunnel quickstart or run makes one"):
        forecasts(tmp_path)
    LabBook(Home(tmp_path).labbook).close()
    assert [str(part) for part in forecasts(tmp_path).parts] == [
        "no forecast has been sealed here yet; try: windtunnel forecast quickstart"
    ]
    assert forecasts(tmp_path).to_dict() == {
        "forecasts": [],
        "blind": 0,
        "inside_90": 0,
        "blind_trunks": 0,
        "blind_by_corpus": 0,
        "inside_90_by_corpus": 0,
        "adaptations": {"scored": 0, "inside_90": 0, "trunks": 0},
    }
