"""``law mixture`` as a command: planted worlds, fresh paired seeds, the cap of the target, the report, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.mixture_study import study_mixture
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.page import render
from windtunnel.train.stage import Stage

NAMES = ("coarse", "fine", "chats", "noise")
BEST = {"coarse": 0.2, "fine": 0.4, "chats": 0.35, "noise": 0.05}
RECIPE = """
name = "mix"
seed = 3
{corpora}
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.02M"
row = 32
[optimizer]
lr = 0.0125
[trunk]
tokens = "7680"
batch = "128"
mixture = {{ coarse = 1 }}
[branch.same]
tokens = "50%"
[branch.better]
tokens = "50%"
mixture = {{ coarse = 0.4, fine = 0.2, chats = 0.2, noise = 0.2 }}
"""


@pytest.fixture
def recipe(tmp_path, write_made_up) -> Recipe:
    for i, name in enumerate(NAMES):
        write_made_up(tmp_path / f"{name}.jsonl", 40 if name == "chats" else 200, i)
    corpora = "".join(f'[corpus.{name}]\nsource = "{name}.jsonl"\nheldout = 0.1\n' for name in NAMES)
    (tmp_path / "mix.toml").write_text(RECIPE.format(corpora=corpora), encoding="utf-8")
    return load_recipe(tmp_path / "mix.toml")


World = Callable[[dict[str, float]], float]


def bowl(shares: dict[str, float]) -> float:
    return 1.0 + 0.3 * sum((shares.get(name, 0.0) - BEST[name]) ** 2 for name in NAMES)


@pytest.fixture
def planted(monkeypatch) -> Callable[[World], list[Stage]]:
    """Losses follow from the shares of a stage's last mixture, and a little from its seed and mixture."""

    def plant(world: World) -> list[Stage]:
        asked: list[Stage] = []

        def train(self, title, study, stages, prepared, **_: Any):
            asked.extend(stages)
            results = {}
            for stage in stages:
                shares = dict(stage.plan.segments[-1].mixture)
                # Noise without a pattern that seeds would share.
                noise = 1e-4 * (int(stage.key[:6], 16) % 7 - 3) + 0.02 * ((stage.seed // 1000) % 3)
                level = world({name: share / sum(shares.values()) for name, share in shares.items()}) + noise
                scores = {name: {"nats": 1000 * level, "bytes": 1000} for name in NAMES}
                results[stage.key] = {"scores": scores, "seconds": {"step": 1.0}}
            return results

        monkeypatch.setattr(desk_module.Desk, "train", train)
        return asked

    return plant


@pytest.mark.parametrize("stage", ["decay", "trunk"])
def test_a_planted_optimum_is_found_and_beats_the_stratified_mixture(recipe, tmp_path, planted, stage):
    asked = planted(bowl)
    view = study_mixture(recipe, tmp_path / "home", corpora=NAMES, stage=stage, mixtures=30, cap=50, quiet=True)
    fact = view.data
    assert fact["law"]["form"] in ("quadratic", "smooth")
    assert fact["mixtures_tried"]["optimum"] == pytest.approx(BEST, abs=0.06)
    assert fact["against"]["stratified"]["verdict"] == "beats the stratified mixture"
    assert fact["against"]["recipe"]["verdict"] == "beats the recipe's own mixture"
    assert fact["predicted"] == pytest.approx(fact["against"]["stratified"]["gain"]["value"], abs=0.3)
    assert fact["rank"] > 0.9
    drawn = [s for s in asked if s.seed == 3 and s.kind != "trunk"]
    tried = [s for s in asked if s.seed != 3 and s.kind != "trunk"]
    assert len(drawn) == 30
    assert len(tried) == 3 * len(fact["mixtures_tried"])
    assert {s.seed for s in tried} == {1003, 2003, 3003}, "the pick is judged on seeds that did not choose it"
    if stage == "decay":
        assert len({s.key for s in asked if s.kind == "trunk"}) == 4
        assert {s.start.stage for s in drawn if s.start} == {s.key for s in asked if s.kind == "trunk" and s.seed == 3}
    else:
        assert all(s.start is None and len(s.plan.segments) == 1 for s in drawn)
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    (kept,) = book.facts("mix", "mixture").values()
    page = render(book, "mix")
    book.close()
    assert {name: value for name, value in json.loads(json.dumps(dict(fact))).items() if name in kept} == kept
    assert "beats the stratified mixture" in page
    assert Path(fact["figure"]).read_text(encoding="utf-8").startswith("<svg xmlns")


def test_in_a_flat_world_the_optimum_does_not_win(recipe, tmp_path, planted):
    planted(lambda shares: 1.0)
    fact = study_mixture(recipe, tmp_path / "home", mixtures=20, cap=50, quiet=True).data
    assert "beats" not in fact["against"]["stratified"]["verdict"].replace("does not beat", "")


def test_no_corpus_is_read_more_often_than_the_cap_by_the_target(recipe, tmp_path, planted):
    planted(bowl)
    free = study_mixture(recipe, tmp_path / "a", mixtures=30, cap=50, quiet=True).data
    capped = study_mixture(recipe, tmp_path / "b", mixtures=30, cap=0.2, quiet=True).data
    assert free["epochs"]["optimum"]["chats"] > 0.25
    assert max(capped["epochs"]["optimum"].values()) <= 0.205
    for run in capped["runs"]:
        assert all(share <= capped["limits"][name] + 1e-3 for name, share in run["shares"].items())


def test_a_second_call_asks_for_the_same_runs_and_says_the_same(recipe, tmp_path, planted):
    asked = planted(bowl)
    first = study_mixture(recipe, tmp_path / "home", cap=50, quiet=True)
    keys = [stage.key for stage in asked]
    asked.clear()
    assert study_mixture(recipe, tmp_path / "home", cap=50, quiet=True).data == first.data
    assert [stage.key for stage in asked] == keys


def test_runs_that_fail_are_left_out_until_too_few_are_left(recipe, tmp_path, planted, monkeypatch):
    planted(bowl)
    before = desk_module.Desk.train

    def failing(share: float) -> Any:
        def train(self, title, study, stages, prepared, **more: Any):
            results = before(self, title, study, stages, prepared, **more)
            rows = [s for s in stages if s.seed == 3 and s.kind != "trunk"]
            return results | {s.key: {"failed": "not finite"} for s in rows[: round(share * len(rows))]}

        return train

    monkeypatch.setattr(desk_module.Desk, "train", failing(0.25))
    fact = study_mixture(recipe, tmp_path / "a", mixtures=24, cap=50, quiet=True).data
    assert sum(run["loss"] is None for run in fact["runs"]) == 6
    monkeypatch.setattr(desk_module.Desk, "train", failing(0.9))
    with pytest.raises(WindtunnelError, match="2 of 24 runs ended with a finite loss"):
        study_mixture(recipe, tmp_path / "b", mixtures=24, cap=50, quiet=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": "sft"}, "--stage: expected decay or trunk, got 'sft'"),
        ({"corpora": ["fine"]}, "--corpus: expected two different corpora or more, got fine"),
        ({"corpora": ["fine", "fin"]}, "--corpus: expected some of coarse, fine, chats, noise, got 'fin'"),
        ({"on": ["x"]}, "--on: expected some of coarse"),
        ({"mixtures": 5}, "--mixtures: expected 6 or more for 4 corpora, got 5"),
        ({"tokens": "long"}, "--tokens: expected a count"),
        ({"cap": 0.01}, "--cap: expected corpora that fill the stage at 0.01 times each"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, tmp_path, planted, options, words):
    planted(bowl)
    with pytest.raises(UserError) as error:
        study_mixture(recipe, tmp_path / "home", quiet=True, **options)
    assert words in str(error.value)
