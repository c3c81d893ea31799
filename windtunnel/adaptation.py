"""``windtunnel adapt``: a finished model goes on with new text; gain and loss are forecast from short branches. Needs no torch.

Short branches: the adapted trunk itself, as far as a quarter of its length, with a whole decay after a sixteenth, an eighth
and a quarter of it, for several seeds. With y the logarithm of a corpus' loss over what it was before, and d its change from
an eighth to a quarter, two more doublings bring y + 2d if every doubling brings as much, and y + .75·d if each brings half of
the one before; the forecast is the middle, and its interval adds half the distance of the two to the noise over seeds.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.adaptation_recipe import BRANCH, NEW, adaptation_recipe
from windtunnel.base.artefact import content_hash, read_json, write_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import parse_count, si
from windtunnel.comparison import find_run
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.pipeline import finishing, run
from windtunnel.pretrain.branch import decay_stage
from windtunnel.program import Program
from windtunnel.recipe import Recipe, load_recipe, parse_recipe
from windtunnel.recipe_schema import Origin
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.audit import Estimate
from windtunnel.views import View, line, table

STUDY = "adapt"
PARTS = (1 / 16, 1 / 8, 1 / 4)
"""Lengths of the short branches, as shares of the whole."""
LN2 = math.log(2)
_SEED_STEP = 1000
_SHARE, _EPOCHS = 0.25, 2.0
"""Without stated tokens: a quarter of what the model was trained on, or the new text twice if that is less."""
_ALIKE, _HALVED = 2.0, 0.75


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
    recipe = _write(home, target, wish, row, stage, old, base, devices, quiet)
    with Desk(Home(home), recipe.name, devices=devices, quiet=quiet) as desk:
        program = open_program(desk, recipe)
        said = _forecast(desk, program, row, wish.seeds)
    parts = [line(f"wrote {target}; {row['id']} goes on for {si(program.total_tokens)} tokens"), *_said(said)]
    data: dict[str, Any] = {"recipe": str(target), "program": recipe.name, "forecast": said}
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
        fix = "choose a decay that windtunnel status shows as done"
        raise UserError(
            "adapt", f"expected a finished model, got the {row['kind']} '{row['name']}', {row['status']}", fix
        )
    return row, Stage.from_dict(row["config"]), old, Path(base or ".")


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


def extrapolate(changes: Sequence[Sequence[float]]) -> dict[str, float]:
    """The change of log loss after the whole length, from changes[seed][length], with its 90 % interval."""
    middles = [y[-1] + (_ALIKE + _HALVED) / 2 * (y[-1] - y[-2]) for y in changes]
    found = Estimate.of(middles)
    # The interval is for one run, not for the mean of many: √(n + 1) times that of the mean.
    noise = 0.0 if found.high is None else (found.high - found.value) * math.sqrt(len(middles) + 1)
    steps = [abs(y[-1] - y[-2]) for y in changes]
    half = math.hypot(noise, (_ALIKE - _HALVED) / 2 * sum(steps) / len(steps))
    return {"value": found.value, "low": found.value - half, "high": found.value + half}


def _forecast(desk: Desk, program: Program, row: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Gain and loss by corpus in bits per byte, frozen as a file before the real run; once for the same short branches."""
    trunks, branches = short_branches(program, seeds)
    target = program.branch(BRANCH)
    key = content_hash([target.key, [[stage.key for stage in part] for part in branches]])
    file = desk.home.program(program.name) / "forecasts" / f"adapt-{key[:12]}.json"
    try:
        return read_json(file)
    except ArtefactError:
        pass
    assert program.prepared is not None
    every = [stage for part in branches for stage in part]
    results = desk.train("adapt: the first short trunk", "", trunks[:1], program.prepared)
    results |= desk.train(f"adapt: {len(every)} short branches", STUDY, [*trunks[1:], *every], program.prepared)
    desk.need_all([*trunks, *every], results)
    before = _before(desk, program, row)
    corpora: dict[str, Any] = {}
    for name in target.score:
        now = before[name]["bits_per_byte"]
        changes = [[math.log(results[s.key]["scores"][name]["bits_per_byte"] / now) for s in part] for part in branches]
        said = extrapolate(changes)
        corpora[name] = {
            "before": now,
            **{word: now * math.exp(value) for word, value in said.items()},
            "changes": changes,
        }
    content = {
        "target": target.folder_name, "parent": row["id"], "tokens": target.tokens, "seeds": seeds, "corpora": corpora,
        "lengths": [stage.tokens for stage in branches[0]], "unit": "bits per UTF-8 byte",
    }  # fmt: skip
    content["hash"] = content_hash(content)
    write_json(file, content)
    with desk.book as book:
        book.put_fact(program.name, STUDY, "forecast", content)
    return content


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
    """Bits per byte of the finished model by corpus, written beside the forecast."""
    run_id = f"{desk.program}/{said['target']}"
    found = {s["corpus"]: s["value"] for s in desk.book.scores(run_id) if s["name"] == "bits_per_byte"}
    with desk.book as book:
        book.put_fact(desk.program, STUDY, "outcome", {"forecast": said["hash"], "bits_per_byte": found})
    return found


def _said(said: Mapping[str, Any]) -> Iterator[RenderableType]:
    rows = [(name, f"{c['before']:.4f}", *_words(c)) for name, c in said["corpora"].items()]
    columns = ("corpus", "now", "forecast, 90 %", "change")
    lengths = ", ".join(si(length) for length in said["lengths"])
    title = (
        f"held-out bits per byte, from branches of {lengths} tokens, {said['seeds']} seeds (sealed {said['hash'][:12]})"
    )
    yield table(columns, rows, title=title, right=(1,))


def _words(corpus: Mapping[str, Any]) -> tuple[str, str]:
    change = [100 * (corpus[word] / corpus["before"] - 1) for word in ("value", "low", "high")]
    said = f"{corpus['value']:.4f} [{corpus['low']:.4f}, {corpus['high']:.4f}]"
    return said, f"{change[0]:+.1f} % [{change[1]:+.1f}, {change[2]:+.1f}]".replace("-", "−")


def _scored(said: Mapping[str, Any], outcome: Mapping[str, float]) -> Iterator[RenderableType]:
    rows: list[tuple[str, ...]] = []
    for name, corpus in said["corpora"].items():
        got = outcome.get(name)
        inside = "" if got is None else "yes" if corpus["low"] <= got <= corpus["high"] else "NO"
        change = "" if got is None else f"{100 * (got / corpus['before'] - 1):+.1f} %".replace("-", "−")
        shown = "" if got is None else f"{got:.4f}"
        rows.append((name, f"{corpus['before']:.4f}", _words(corpus)[0], shown, change, inside))
    columns = ("corpus", "before", "forecast, 90 %", "after", "change", "inside")
    yield table(columns, rows, title="adapted, held-out bits per byte", right=(1, 3, 4))
