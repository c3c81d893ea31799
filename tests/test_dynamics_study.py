"""``law dynamics`` on a real trunk and its decay: which steps it makes again, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from windtunnel import dynamics_study
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.dynamics_study import dynamics, pass_stage
from windtunnel.finishing import VERBS
from windtunnel.home import Home
from windtunnel.pipeline import run
from windtunnel.recipe import load_recipe
from windtunnel.report.page import render
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Stage

RECIPE = """
name = "tiny"
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
[trunk]
tokens = "3840"
batch = "128"
checkpoint_every = "10 steps"
dynamics = "2 steps"
[branch.same]
tokens = "20%"
"""


@pytest.fixture
def home(tmp_path, write_made_up, trained, monkeypatch) -> Path:
    write_made_up(tmp_path / "plain.jsonl", 120)
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(dynamics_study, "finishing", lambda verb, **job: VERBS[verb](job))
    run(load_recipe(tmp_path / "tiny.toml"), tmp_path / "home", until="same", quiet=True)
    return tmp_path / "home"


def test_the_decay_and_as_many_steps_before_it_are_made_again_from_the_nearest_checkpoint(home):
    view = dynamics(home, "same", every=1, window=3)
    book = LabBook(Home(home).labbook, readonly=True)
    rows = {row["name"]: row for row in book.runs()}
    fact = book.fact("tiny", "dynamics", Path(rows["same"]["folder"]).name)
    page = render(book, "tiny")
    book.close()
    assert "What happens to gradients in the decay" in page
    assert "its last quarter" in page
    data = view.data
    assert (data["first"], data["last"]) == (
        10,
        30,
    )  # 6 steps of decay from 24; the trunk has a checkpoint at 10 and 20
    assert [step["step"] for step in data["steps"]] == list(range(11, 30))
    assert set(data["phases"]) == {"before", "decay", "late"}
    assert fact["phases"] == data["phases"]
    recorded = dict(read_metrics(home / rows["same"]["folder"])) | {
        s: v for s, v in read_metrics(home / rows["trunk"]["folder"]) if s <= 24
    }
    for step in data["steps"]:
        assert step["norm"] == pytest.approx(recorded[step["step"]]["gradient_norm"], rel=1e-4)
    svg = Path(data["figure"]).read_text(encoding="utf-8")
    for words in ("gradient norm", "cos(g(t), g(t+1))", "learning rate", "the decay begins", "embedding", "query"):
        assert words in svg
    again = dynamics(home, "same", every=1, window=3)
    assert again.data == data


def test_without_an_earlier_checkpoint_the_pass_begins_at_the_seed(home):
    place = Home(home)
    book = LabBook(place.labbook, readonly=True)
    stage = Stage.from_dict(next(row for row in book.runs() if row["name"] == "same")["config"])
    book.close()
    again, parent = pass_stage(place, stage, 9)
    assert (again.first_step, parent, again.start) == (0, None, None)
    again, parent = pass_stage(place, stage, 23)
    assert again.start is not None
    trunk = next(place.runs("tiny").glob("trunk-*"))
    assert (again.start.step, parent) == (20, checkpoint_path(trunk, 20))
    assert again.steps == stage.steps


def test_what_has_no_stream_of_text_or_is_no_run_is_refused_in_one_line(home):
    with pytest.raises(UserError, match="expected a run of this home, got 'nothing'"):
        dynamics(home, "nothing")
    trunk = dynamics(home, "trunk", steps=4)
    assert list(trunk.data["phases"]) == ["before"]


def test_what_a_probe_recorded_is_shown_without_a_second_pass_and_agrees_with_one(home, monkeypatch):
    whole = dynamics(home, "same", every=1, window=1).data
    second = {step["step"]: step for step in whole["steps"]}
    moved = {move["step"]: move["largest"] for move in whole["moves_by_matrix"]}
    monkeypatch.setattr(dynamics_study, "finishing", lambda verb, **job: pytest.fail("a second pass"))
    view = dynamics(home, "same", live=True)
    data = view.data
    assert (data["first"], data["last"]) == (18, 30)  # the decay of 6 steps, and as many of the trunk before it
    assert [step["step"] for step in data["steps"]] == [20, 22, 24 + 2, 28], "the pair 24, 25 has one step on each side"
    assert set(data["phases"]) == {"before", "decay", "late"}
    for step in data["steps"]:
        for name in ("norm", "max", "cosine", "d1", "d2", "curvature"):
            assert step[name] == pytest.approx(second[step["step"]][name], rel=1e-4)
            for role, numbers in second[step["step"]]["roles"].items():
                assert step["roles"][role][name] == pytest.approx(numbers[name], rel=1e-4)
    assert [move["step"] for move in data["moves_by_matrix"]] == [step["step"] for step in data["steps"]]
    for move in data["moves_by_matrix"]:
        assert move["largest"] == pytest.approx(moved[move["step"]], rel=1e-4)
    for word in ("before", "decay"):  # no pair lies in the last quarter of so short a decay
        assert set(data["moves"][word]) == set(whole["moves"][word])
        assert set(data["roles"][word]) == set(whole["roles"][word])
    assert "learning rate" in Path(data["figure"]).read_text(encoding="utf-8")
    assert list(dynamics(home, "trunk", live=True).data["phases"]) == ["before"]


def test_a_run_without_a_probe_says_what_to_do(tmp_path, write_made_up, trained):
    write_made_up(tmp_path / "plain.jsonl", 120)
    (tmp_path / "bare.toml").write_text(RECIPE.replace('dynamics = "2 steps"', ""), encoding="utf-8")
    run(load_recipe(tmp_path / "bare.toml"), tmp_path / "home", until="trunk", quiet=True)
    with pytest.raises(UserError, match="expected numbers recorded while tiny/trunk-.* trained, found none"):
        dynamics(tmp_path / "home", "trunk", live=True)
