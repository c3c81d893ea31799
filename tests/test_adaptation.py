"""Adapting a finished model: the recipe it writes, the forecast before, the run after, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from windtunnel import adaptation, cli
from windtunnel.adaptation import PARTS, Wish, adapt
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.finishing import VERBS
from windtunnel.home import Home
from windtunnel.laws.gain import gain
from windtunnel.ledger import entries, forecasts
from windtunnel.pipeline import run
from windtunnel.recipe import load_recipe
from windtunnel.train.stage import Stage

RECIPE = """
name = "old"
seed = 3
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.02M"
row = 32
scale_emb = 8.0
[optimizer]
lr = 0.011
beta2 = 0.96
[trunk]
tokens = "7680"
batch = "128"
[branch.same]
tokens = "20%"
[evaluate]
tokens = "2k"
"""


@pytest.fixture
def folder(tmp_path, write_made_up, trained, monkeypatch) -> Path:
    """A finished model in ``home`` and new text of another kind."""
    write_made_up(tmp_path / "plain.jsonl", 150)
    (tmp_path / "old.toml").write_text(RECIPE, encoding="utf-8")
    draw = random.Random(1)
    lines = [json.dumps({"text": " ".join(str(draw.randint(100, 999)) for _ in range(30))}) for _ in range(150)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What follows {i}?"},
                {"role": "assistant", "content": json.loads(text)["text"]},
            ]
        }
        for i, text in enumerate(reversed(lines))
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n", encoding="utf-8")
    monkeypatch.setattr(adaptation, "finishing", lambda verb, **job: VERBS[verb](job))
    run(load_recipe(tmp_path / "old.toml"), tmp_path / "home", until="same", quiet=True)
    trained.clear()
    return tmp_path


def wish(folder: Path, **changes) -> Wish:
    return Wish(**{"name": "maths", "data": (str(folder / "numbers.jsonl"),), "tokens": "8192", "seeds": 2, **changes})


def stages(folder: Path) -> dict[str, Stage]:
    book = LabBook(Home(folder / "home").labbook, readonly=True)
    found = {row["name"]: Stage.from_dict(row["config"]) for row in book.runs(program="maths")}
    book.close()
    return found


@pytest.mark.slow
def test_the_model_is_forecast_then_adapted_with_its_own_tokenizer_shape_and_constants(folder, trained):
    view = adapt(folder / "home", "old/same", wish(folder), out=folder / "maths.toml", quiet=True)
    recipe = load_recipe(folder / "maths.toml")
    assert recipe.mixture == pytest.approx({"new": 0.75, "plain": 0.25})
    assert (recipe.optimizer.lr, recipe.optimizer.beta2, recipe.model.scale_emb) == (0.011, 0.96, 8.0)
    found = stages(folder)
    trunk, branch = found["trunk"], found["adapted"]
    book = LabBook(Home(folder / "home").labbook, readonly=True)
    rows = {row["id"]: row for row in book.runs()}
    old = next(row for row in rows.values() if row["program"] == "old" and row["name"] == "same")
    assert trunk.start is not None
    assert (trunk.start.stage, trunk.start.step, trunk.start.fresh) == (Stage.from_dict(old["config"]).key, 60, True)
    assert (
        next(row for row in rows.values() if row["program"] == "maths" and row["name"] == "trunk")["parent"]
        == old["id"]
    )
    assert trunk.shape == branch.shape == Stage.from_dict(old["config"]).shape
    assert (
        read_json(Home(folder / "home").program("maths") / "prepared.json")["tokenizer_hash"]
        == (read_json(Home(folder / "home").program("old") / "prepared.json")["tokenizer_hash"])
    )
    said, outcome = view.data["forecast"], view.data["outcome"]
    book.close()
    own = {row["name"]: row["forecast"] for row in rows.values() if row["program"] == "maths" and not row["study"]}
    assert own == {"trunk": "", "adapted": said["hash"]}, "the trunk began as a short one, before the forecast"
    assert set(said["gains"]) == {"new", "plain"} == set(outcome)
    new = said["gains"]["new"]
    assert outcome["new"] < 0.8 * new["before"]
    assert new["expected"]["low90"] < new["expected"]["value"] < new["expected"]["high90"]
    ledger = {entry.corpus: entry for entry in entries(folder / "home")}
    assert {name: entry.outcome for name, entry in ledger.items()} == pytest.approx(outcome), "the ledger scores it"
    assert {entry.hash for entry in ledger.values()} == {said["hash"]}
    assert all(
        entry.kind == "blind" and entry.before and set(entry.scores) == {"forecast", "largest", "line"}
        for entry in ledger.values()
    )
    assert trained.index("adapted") > max(i for i, name in enumerate(trained) if name.startswith("adapt-")), (
        "forecast first"
    )


def test_short_branches_lie_on_the_real_trunk_and_a_second_call_trains_nothing(folder, trained):
    asked = wish(folder, seeds=1)
    plan = adapt(folder / "home", "same", asked, out=folder / "maths.toml", plan=True, quiet=True)
    assert "adapted" not in stages(folder)
    assert [length / 8192 for length in plan.data["forecast"]["facts"]["lengths"]] == pytest.approx(PARTS, abs=0.02)
    short = stages(folder)["trunk"]
    trained.clear()
    view = adapt(folder / "home", "same", asked, out=folder / "maths.toml", quiet=True)
    assert set(trained) == {"trunk", "adapted"}, "only the rest of the trunk and the branch"
    assert stages(folder)["trunk"].key == short.key
    assert view.data["forecast"] == plan.data["forecast"]
    trained.clear()
    again = adapt(folder / "home", "same", asked, out=folder / "maths.toml", quiet=True)
    assert trained == []
    assert again.data["outcome"] == view.data["outcome"]


def test_chats_join_the_decay_and_without_stated_tokens_the_text_is_read_twice_at_most(folder):
    asked = wish(folder, tokens=None, chats=(str(folder / "chats.jsonl"),), replay=0.5, seeds=1)
    adapt(folder / "home", "same", asked, out=folder / "maths.toml", plan=True, quiet=True)
    recipe = load_recipe(folder / "maths.toml")
    assert recipe.branch["adapted"].mixture == pytest.approx({"new": 0.4, "plain": 0.4, "chats": 0.2})
    assert recipe.trunk.tokens is not None
    assert recipe.trunk.tokens.value == pytest.approx(64 * 128, rel=0.02), "as short as it may be: the text is small"
    text = (folder / "maths.toml").read_text(encoding="utf-8")
    adapt(folder / "home", "same", asked, out=folder / "maths.toml", plan=True, quiet=True)
    assert (folder / "maths.toml").read_text(encoding="utf-8") == text
    with pytest.raises(UserError, match="expected no file there, or the same recipe"):
        adapt(folder / "home", "same", replace(asked, replay=0.1), out=folder / "maths.toml", plan=True, quiet=True)


def test_a_forecast_is_listed_as_an_adaptation_and_an_edited_one_is_refused(folder, capsys):
    asked = wish(folder, seeds=1)
    said = adapt(folder / "home", "same", asked, out=folder / "maths.toml", plan=True, quiet=True).data["forecast"]
    assert cli._run(["forecast", "--list", "--home", str(folder / "home")]) == 0
    out = capsys.readouterr().out
    assert "forecasts of adaptations" in out
    assert f"sealed {said['hash'][:12]}" in out
    assert "changed after it was frozen" not in out
    assert forecasts(folder / "home").data["adaptations"] == {"scored": 0, "inside_90": 0, "trunks": 0}
    (file,) = (Home(folder / "home").program("maths") / "forecasts").glob("*.json")
    file.write_bytes(file.read_bytes().replace(b'"kind":"blind"', b'"kind":"blinD"'))
    with pytest.raises(ArtefactError, match="this forecast was changed after it was frozen: expected hash"):
        adapt(folder / "home", "same", asked, out=folder / "maths.toml", plan=True, quiet=True)
    assert [entry.kind for entry in entries(folder / "home")] == ["changed"]


def test_a_planted_power_law_lies_inside_the_forecast_and_noise_widens_it():
    losses = [[2 * (0.6 + 0.4 * (1 + length) ** -0.7) for length in (1, 2, 4)]] * 3
    said = gain(2.0, losses).expected
    assert said.low90 < 2 * (0.6 + 0.4 * 17**-0.7) < said.high90
    noisy = gain(2.0, [[loss * math.exp(0.05 * seed) for loss in row] for seed, row in enumerate(losses)]).expected
    assert noisy.half_width > 2 * said.half_width


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("old/trunk", {}, "adapt: expected a finished model, got the trunk 'trunk'"),
        ("nothing", {}, "run: expected a run of this home, got 'nothing'"),
        ("same", {"data": ("absent.txt",)}, "--data: expected an existing file or folder, got 'absent.txt'"),
        ("same", {"tokens": "many"}, "--tokens: expected a count"),
        ("same", {"name": "old"}, "--name: expected a name of its own, this home has a program 'old'"),
    ],
)
def test_what_cannot_be_is_one_line(folder, model, changes, words):
    with pytest.raises(UserError) as error:
        adapt(folder / "home", model, wish(folder, **changes), out=folder / "maths.toml", quiet=True)
    assert words in str(error.value)
    assert not (folder / "maths.toml").exists()


def test_another_recipe_of_that_name_or_a_wrong_start_is_refused(folder):
    target = folder / "maths.toml"
    target.write_text("# mine\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected no file there, or the same recipe"):
        adapt(folder / "home", "same", wish(folder), out=target, quiet=True)
    text = (folder / "old.toml").read_text(encoding="utf-8").replace('name = "old"', 'name = "wide"')
    (folder / "wide.toml").write_text(text.replace("[trunk]", '[trunk]\nstart = "old/same"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"trunk.start: expected the shape of old/same"):
        run(load_recipe(folder / "wide.toml", ["model.size=0.05M"]), folder / "home", quiet=True)
    with pytest.raises(UserError, match=r"trunk.start: expected a run of this home, got 'old/zame'"):
        run(load_recipe(folder / "wide.toml", ["trunk.start=old/zame"]), folder / "home", quiet=True)
    with pytest.raises(
        UserError, match=r"trunk.start: expected the tokenizer of old/same.*, got another of as many tokens"
    ):
        run(load_recipe(folder / "wide.toml", ["corpus.plain.source=numbers.jsonl"]), folder / "home", quiet=True)
    with pytest.raises(UserError, match=r"trunk.start: expected a finished model, got the trunk"):
        run(load_recipe(folder / "wide.toml", ["trunk.start=old/trunk"]), folder / "home", quiet=True)
