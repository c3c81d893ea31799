"""The shape of the house: which way the arrows go, what stays light, and what nobody may do."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "windtunnel"
ROOMS = [
    "base", "home", "corpus", "model", "train", "laws", "evaluate", "pretrain", "posttrain", "tunnel", "export", "serve", "report",
    "recipe", "pipeline", "api", "cli", "__main__",
]  # fmt: skip
"""In import order: a room may import those before it. ``recipe_checks.py`` belongs to the room ``recipe``."""
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "ray",
    "wandb",
    "trackio",
    "tensorboard",
    "altair",
    "vl_convert",
    "optuna",
    "lm_eval",
}
LIGHT = [
    "windtunnel", "windtunnel.cli", "windtunnel.recipe", "windtunnel.recipe_new", "windtunnel.base.artefact", "windtunnel.base.labbook",
    "windtunnel.model.shape", "windtunnel.model.family", "windtunnel.model.parametrization", "windtunnel.train.schedule",
    "windtunnel.train.stage", "windtunnel.laws.loss", "windtunnel.corpus.build", "windtunnel.corpus.sources",
    "windtunnel.corpus.loader", "windtunnel.corpus.mixture", "windtunnel.tunnel.audit", "windtunnel.tunnel.transfer",
    "windtunnel.tunnel.claims", "windtunnel.tunnel.replica", "windtunnel.laws.data_axis",
    "windtunnel.measures", "windtunnel.chats", "windtunnel.corpus.chat_template",
    "windtunnel.cli_tunnel", "windtunnel.train.batches", "windtunnel.train.noise", "windtunnel.laws.batch_terms", "windtunnel.tunnel.batch",
    "windtunnel.laws.mixture", "windtunnel.tunnel.mixtures",
]  # fmt: skip
"""Modules that never load torch, however far one follows their imports."""


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def source_of(name: str) -> Path:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def room_of(module: str) -> str:
    """The room of a module; those beside the rooms that carry out a program are one room, ``pipeline``."""
    part = module.split(".")[1] if "." in module else ""
    if part in ROOMS or (PACKAGE / part).is_dir():
        return part
    return part.split("_")[0] if part.split("_")[0] in ROOMS else "pipeline"


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """Every imported module with its statement, except those for type checkers only."""
    hidden = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for n in ast.walk(block)
    }
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((node, full if full in modules() else node.module or ""))
    return found


def test_every_module_has_a_room_and_imports_only_rooms_before_its_own() -> None:
    wrong = []
    for name, tree in modules().items():
        if name == "windtunnel":
            continue
        assert room_of(name) in ROOMS, f"{name} has no room: add it to ROOMS"
        for node, target in imports(tree):
            inner = target in modules() and target != "windtunnel"
            if inner and ROOMS.index(room_of(target)) > ROOMS.index(room_of(name)):
                wrong.append(f"{name}:{node.lineno} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_training_never_knows_laws_or_the_tunnel() -> None:
    wrong = [
        f"{name}:{node.lineno} imports {target}"
        for name, tree in modules().items()
        for node, target in imports(tree)
        if room_of(name) in ("train", "pretrain", "posttrain") and target.startswith("windtunnel.") and room_of(target) in ("laws", "tunnel")
        and not target.endswith(".config")
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {t for _, t in imports(tree) if t in modules() and t != name} for name, tree in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_command_line_imports_inside_a_function() -> None:
    wrong = []
    for name, tree in modules().items():
        top = {id(node) for node in tree.body}
        if room_of(name) != "cli":
            wrong += [
                f"{name}:{n.lineno} imports {t}"
                for n, t in imports(tree)
                if id(n) not in top and t.startswith("windtunnel")
            ]
    assert not wrong, "\n".join(wrong)


def test_room_inits_are_empty() -> None:
    inits = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert inits
    assert not [str(path) for path in inits if ast.parse(path.read_text(encoding="utf-8")).body]


@pytest.mark.parametrize("start", LIGHT)
def test_light_modules_never_reach_a_heavy_library(start: str) -> None:
    if start not in modules():
        pytest.skip(f"{start} does not exist yet")
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        seen.add(name)
        # The command line may import anything, but only when a command runs.
        top = {id(node) for node in modules()[name].body}
        for node, target in imports(modules()[name]):
            if id(node) not in top:
                continue
            assert target.split(".")[0] not in HEAVY, f"{start} reaches {target} through {name}:{node.lineno}"
            if target in modules() and target not in seen:
                todo.append(target)


def test_nothing_is_unpickled_or_evaluated() -> None:
    banned_imports = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = []
    for name, tree in modules().items():
        wrong += [f"{name}:{n.lineno} imports {t}" for n, t in imports(tree) if t.split(".")[0] in banned_imports]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call in {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}:
                wrong.append(f"{name}:{node.lineno} calls {call}")
            if any(
                k.arg in ("shell", "trust_remote_code", "allow_pickle") and ast.unparse(k.value) == "True"
                for k in node.keywords
            ):
                wrong.append(f"{name}:{node.lineno} passes {ast.unparse(node)[:60]}")
    assert not wrong, "\n".join(wrong)


def test_importing_does_no_work() -> None:
    wrong = []
    for name, tree in modules().items():
        if name in ("windtunnel.cli", "windtunnel.__main__"):
            continue
        for node in tree.body:
            declares = isinstance(node, ast.Expr) and ".register_" in ast.unparse(node)  # an operator, to torch
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant) and not declares:
                wrong.append(f"{name}:{node.lineno} calls {ast.unparse(node)[:60]}")
            if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                wrong.append(f"{name}:{node.lineno} runs a {type(node).__name__.lower()}")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_named_after_nothing() -> None:
    assert not [
        name for name in modules() if name.split(".")[-1] in ("utils", "util", "helpers", "helper", "common", "misc")
    ]


def test_no_module_hides_a_verb_of_the_package() -> None:
    # Importing windtunnel.x sets the attribute x of the package: a verb of that name would turn into a module.
    verbs = {"new", "plan", "run", "forecast", "status", "compare", "clean", "open", "Run", "Recipe", "load_recipe"}
    assert not verbs & {name.split(".")[1] for name in modules() if "." in name}


def test_width_and_depth_ratios_stand_only_in_the_parametrization() -> None:
    wrong = []
    for name, tree in modules().items():
        if name == "windtunnel.model.parametrization":
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, ast.Div | ast.Mult)
                and any(base in ast.unparse(node) for base in ("base_width", "base_layers"))
            ):
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    wrong = []
    for name, tree in modules().items():
        lines = len(source_of(name).read_text(encoding="utf-8").splitlines())
        if lines > 500:
            wrong.append(f"{name} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                wrong.append(f"{name}:{node.lineno} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines")
    assert not wrong, "\n".join(wrong)


def test_public_functions_of_some_length_say_what_they_do() -> None:
    wrong = []
    for name, tree in modules().items():
        if name.endswith("__init__") or not tree.body:
            continue
        if ast.get_docstring(tree) is None:
            wrong.append(name)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "main"
            if public and (node.end_lineno or 0) - node.lineno > 6 and ast.get_docstring(node) is None:
                wrong.append(f"{name}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)
