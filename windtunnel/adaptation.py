"""``windtunnel adapt``: a finished model goes on with new text; gain and loss are forecast from short branches. Needs no torch.

Short branches: the adapted trunk itself, as far as a quarter of its length, with a whole decay after a sixteenth, an eighth
and a quarter of it, for several seeds. ``laws/gain.py`` extrapolates from them; the forecast is sealed in the program's ledger.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.adaptation_recipe import BRANCH, NEW, adaptation_recipe
from windtunnel.base.artefact import content_hash, read_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import minus, parse_count, si
from windtunnel.blindness import kind_of_adaptation
from windtunnel.comparison import find_run
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.laws.gain import Gain, gain
from windtunnel.laws.sealed import ADAPTATION, read_seal, seal
from windtunnel.pipeline import finishing, run
from windtunnel.pretrain.branch import decay_stage
from windtunnel.program import Program
from windtunnel.recipe import Recipe, load_recipe, parse_recipe
from windtunnel.recipe_schema import Origin
from windtunnel.report.cost import cost_line, cost_of_studies
from windtunnel.sealing import keep
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.views import View, line, table

STUDY = "adapt"
PARTS = (1 / 16, 1 / 8, 1 / 4)
"""Lengths of the short branches, as shares of the whole."""
_SEED_STEP = 1000
_SHARE, _EPOCHS = 0.25, 2.0
"""Without stated tokens: a quarter of what the model was trained on, or the new text twice if that is less."""


@dataclass(frozen=True)
class Wish:
    """What is asked for beside the model and the text."""

    name: str
    data: tuple[str, ...]
    chats: tuple[str, ...] = ()
    tokens: str | None = None
    replay: float = 0.25
    lr: float | None = None
    seeds: int = 3


def adapt(
    home: Path, model: str, wish: Wish, *, out: Path | None = None, plan: bool = False, devices: str | None = None,
    quiet: bool = False,
) -> View:  # fmt: skip
    """Writes the recipe, forecasts gain and loss, and runs it.

    Args:
        model: a finished run of this home.
        out: the recipe's file; without it, NAME.toml here.
        plan: stop after the forecast.

    Raises:
        UserError: there is no such model, it is not finished, or the file exists with another content.
        Stopped: a stop was asked for; the same command continues.
    """
    target = out or Path(f"{wish.name}.toml")
    row, stage, old, base = _parent(home, model)
    _check_name(home, wish.name)
    recipe = _write(home, target, wish, row, stage, old, base, devices, quiet)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        said = _forecast(desk, program, row, wish.seeds)
        cost = cost_of_studies(desk.book, recipe.name, [STUDY])
    parts = [line(f"wrote {target}; {row['id']} goes on for {si(program.total_tokens)} tokens"), *_said(said)]
    parts.append(line(f"the short branches beside the trunk: {cost_line(cost)}"))
    data: dict[str, Any] = {"recipe": str(target), "program": recipe.name, "forecast": said, "cost": cost}
    if plan:
        return View(data, (*parts, line(f"to go on: windtunnel run {target}, or the same command without --plan")))
    done = run(recipe, home, devices=devices, quiet=quiet)
    with Desk(Home(home), recipe.name, quiet=True) as desk:
        outcome = _outcome(desk, said)
    return View({**data, "outcome": outcome}, (*_scored(said, outcome), *done.parts))


def _parent(home: Path, model: str) -> tuple[dict[str, Any], Stage, dict[str, Any], Path]:
    """The model's row, its stage, its program's resolved recipe and the folder to which that recipe's paths are relative."""
    book = LabBook(Home(home).labbook, readonly=True)
    try:
        row = find_run(book, model)
        old, base = (book.fact(row["program"], "recipe", name) for name in ("resolved", "base"))
    finally:
        book.close()
    if row["kind"] != "decay" or row["status"] != "done":
        fix = "choose a decay that windtunnel status shows as done; a branch of kind 'adapt' goes on from the others"
        raise UserError(
            "adapt", f"expected a finished model, got the {row['kind']} '{row['name']}', {row['status']}", fix
        )
    return row, Stage.from_dict(row["config"]), old, Path(base or ".")


def _check_name(home: Path, name: str) -> None:
    """A program of that name that is no adaptation keeps its runs to itself."""
    book = LabBook(Home(home).labbook, readonly=True)
    try:
        known = book.fact(name, "recipe", "resolved")
    finally:
        book.close()
    if known is not None and BRANCH not in known["branch"]:
        raise UserError("--name", f"expected a name of its own, this home has a program '{name}'", "choose another")


def _write(
    home: Path, target: Path, wish: Wish, row: Mapping[str, Any], stage: Stage, old: Mapping[str, Any], base: Path,
    devices: str | None, quiet: bool,
) -> Recipe:  # fmt: skip
    """The recipe, written unless it is there already."""

    def text(tokens: int) -> str:
        return adaptation_recipe(
            wish.name, f"{row['program']}/{row['name']}", stage, old, data=wish.data, chats=wish.chats,
            tokenizer=home / read_json(Home(home).program(row["program"]) / "prepared.json")["tokenizer"], base=base,
            folder=target.parent, tokens=tokens, replay=wish.replay, lr=wish.lr,
        )  # fmt: skip

    most = max(64 * stage.step_tokens, round(_SHARE * stage.tokens))
    tokens = parse_count(wish.tokens, "--tokens") if wish.tokens else most
    known = target.read_text(encoding="utf-8") if target.is_file() else None
    if known is None:
        if not wish.tokens:
            draft = parse_recipe(tomllib.loads(text(tokens)), (), Origin(str(target), target.parent.absolute()))
            with Desk(Home(home), wish.name, devices=devices, quiet=quiet) as desk:
                prepared = open_program(desk, draft).prepared
            assert prepared is not None
            twice = round(_EPOCHS * prepared.corpora[NEW]["tokens"] / max(0.05, 1 - wish.replay))
            tokens = max(64 * stage.step_tokens, min(tokens, twice))
        _create(target, text(tokens))
    elif _asked(known, wish) != _asked(text(tokens), wish):
        fix = f"windtunnel run {target} uses it as it is; choose another with --out"
        raise UserError(str(target), "expected no file there, or the same recipe, found another", fix)
    return load_recipe(target)


def _asked(text: str, wish: Wish) -> str:
    """A recipe's text without what was derived: its tokens, where none are stated."""
    return text if wish.tokens else re.sub(r'(?m)^tokens = "[^%"]*"$', "", text)


def _create(target: Path, text: str) -> None:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileNotFoundError:
        raise UserError(str(target), "expected an existing folder, found none", "create it first") from None


# -- the forecast ----------------------------------------------------------------------------------------------------------


def short_branches(program: Program, seeds: int) -> tuple[list[Stage], list[list[Stage]]]:
    """Trunks as far as the last short branch needs them, and branches[seed][length]. The first trunk begins the real one."""
    recipe, whole = program.recipe, program.trunk()
    setting, config = program.setting(), recipe.branch[BRANCH]
    share = program.decay_steps(BRANCH) / program.steps
    lengths = [max(4, round(part * program.steps)) for part in PARTS]
    splits = [(length - max(1, round(share * length)), max(1, round(share * length))) for length in lengths]
    mixture = tuple(sorted(config.mixture.items())) if config.mixture else None
    trunks: list[Stage] = []
    branches: list[list[Stage]] = []
    for i in range(seeds):
        seed = recipe.seed + _SEED_STEP * i
        trunk = replace(whole, steps=splits[-1][0], keep=tuple(at for at, _ in splits), save_every=None)
        if i:
            trunk = replace(trunk, name=f"adapt-trunk-s{seed}", seed=seed, plan=replace(trunk.plan, seed=seed))
        trunks.append(trunk)
        branches.append([
            decay_stage(trunk, f"adapt-{at + steps}-s{seed}", setting, at=at, steps=steps, form=config.form, mixture=mixture)
            for at, steps in splits
        ])  # fmt: skip
    return trunks, branches


def _forecast(desk: Desk, program: Program, row: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Gain and loss by corpus, sealed before the real run; once for the same short branches. Returns the file's content.

    Raises:
        ArtefactError: the file is there and no longer what was sealed.
    """
    trunks, branches = short_branches(program, seeds)
    target = program.branch(BRANCH)
    key = content_hash([target.key, [[stage.key for stage in part] for part in branches]])
    file = desk.home.program(program.name) / "forecasts" / f"{BRANCH}-{key[:12]}.json"
    if not file.is_file():
        gains = _gains(desk, program, row, trunks, branches)
        seal(
            file,
            _facts(desk, program, row, trunks, branches),
            {"gains": {name: g.to_dict() for name, g in gains.items()}},
        )
    content = read_seal(file)
    with desk.book as book:
        keep(book, program.name, ADAPTATION, target.folder_name, content)
    return content


def _gains(
    desk: Desk, program: Program, row: Mapping[str, Any], trunks: list[Stage], branches: list[list[Stage]]
) -> dict[str, Gain]:
    """Trains the short branches and extrapolates from them."""
    assert program.prepared is not None
    every = [stage for part in branches for stage in part]
    results = desk.train("adapt: the first short trunk", "", trunks[:1], program.prepared)
    results |= desk.train(f"adapt: {len(every)} short branches", STUDY, [*trunks[1:], *every], program.prepared)
    desk.need_all([*trunks, *every], results)
    before = _before(desk, program, row)
    return {
        name: gain(
            before[name]["bits_per_byte"],
            [[results[stage.key]["scores"][name]["bits_per_byte"] for stage in part] for part in branches],
        )
        for name in program.branch(BRANCH).score
    }


def _facts(
    desk: Desk, program: Program, row: Mapping[str, Any], trunks: list[Stage], branches: list[list[Stage]]
) -> dict[str, Any]:
    """What the forecast file says beside the numbers."""
    target = program.branch(BRANCH)
    assert target.start is not None
    read = [*trunks, *(stage for part in branches for stage in part)]
    kind = kind_of_adaptation(desk.book, target, Stage.from_dict(row["config"]), read)
    return {
        "program": program.name, "branch": BRANCH, "target": target.key, "trunk": target.start.stage,
        "kind": kind, "parent": row["id"], "corpus": dict(target.corpora),
        "parameters": target.shape.body, "tokens": target.tokens, "batch": target.step_tokens,
        "base_lr": target.optimizer.learning_rate, "unit": "bits per UTF-8 byte", "limit": target.score_tokens,
        "seeds": len(branches), "lengths": [stage.tokens for stage in branches[0]],
        "runs": sorted(stage.key for part in branches for stage in part),
    }  # fmt: skip


def _before(desk: Desk, program: Program, row: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own held-out loss on every corpus of the recipe."""
    assert program.prepared is not None
    folders = {name: str(desk.home.root / corpus["folder"]) for name, corpus in program.prepared.corpora.items()}
    stage = Stage.from_dict(row["config"])
    return finishing(
        "evaluate", checkpoint=str(checkpoint_path(desk.home.root / row["folder"], stage.steps)),
        tokenizer=str(desk.home.root / program.prepared.tokenizer), corpora=folders,
        tokens=program.recipe.evaluate.tokens, tasks={},
    )["scores"]  # fmt: skip


def _outcome(desk: Desk, said: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte of the finished model by corpus."""
    run_id = f"{desk.program}/{BRANCH}-{said['facts']['target'][:10]}"
    return {s["corpus"]: s["value"] for s in desk.book.scores(run_id) if s["name"] == "bits_per_byte"}


def _said(said: Mapping[str, Any]) -> Iterator[RenderableType]:
    facts, gains = said["facts"], _read(said)
    rows = [(name, f"{g.before:.4f}", *_words(g)) for name, g in gains.items()]
    columns = ("corpus", "now", "forecast, 90 %", "change")
    lengths = ", ".join(si(length) for length in facts["lengths"])
    title = f"held-out bits per byte, from branches of {lengths} tokens, {facts['seeds']} seeds"
    yield table(columns, rows, title=f"{title} ({facts['kind']}, sealed {said['hash'][:12]})", right=(1,))


def _read(said: Mapping[str, Any]) -> dict[str, Gain]:
    return {name: Gain.from_dict(part) for name, part in said["gains"].items()}


def _words(one: Gain) -> tuple[str, str]:
    e, (value, low, high) = one.expected, (100 * share for share in one.share)
    return f"{e.value:.4f} [{e.low90:.4f}, {e.high90:.4f}]", minus(f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]")


def _scored(said: Mapping[str, Any], outcome: Mapping[str, float]) -> Iterator[RenderableType]:
    rows: list[tuple[str, ...]] = []
    for name, one in _read(said).items():
        got = outcome.get(name)
        inside = "" if got is None else "yes" if one.expected.low90 <= got <= one.expected.high90 else "MISS"
        change = "" if got is None else minus(f"{100 * (got / one.before - 1):+.1f} %")
        shown = "" if got is None else f"{got:.4f}"
        rows.append((name, f"{one.before:.4f}", _words(one)[0], shown, change, inside))
    columns = ("corpus", "before", "forecast, 90 %", "after", "change", "inside")
    yield table(columns, rows, title="adapted, held-out bits per byte", right=(1, 3, 4))
