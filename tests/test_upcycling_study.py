"""``model upcycling``: both sides of a seed differ by their model alone, costs are equal where it says so, and dense may win."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from windtunnel import desk as desk_module
from windtunnel import upcycling_study as study_module
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import Stopped, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.runtime import Runtime
from windtunnel.corpus.store import open_corpus
from windtunnel.home import Home
from windtunnel.program import Program
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.page import render
from windtunnel.report.upcycling import lead_figure, loss_figure, read_upcyclings
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.stage import Stage
from windtunnel.upcycling_design import AXES, Design, moe_branch
from windtunnel.upcycling_study import upcycling

STUDIES = Path(__file__).parents[1] / "docs" / "studies"
RECIPE = """
name = "pays"
seed = 3
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[corpus.other]
source = "other.jsonl"
heldout = 0.1
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
mixture = { plain = 1 }
[branch.same]
tokens = "20%"
[branch.experts]
kind = "moe"
at = "1280"
stable = "1920"
tokens = "1280"
experts = { count = 4, top_k = 2 }
[evaluate]
tokens = "600"
"""


@pytest.fixture
def recipe(tmp_path, write_made_up, monkeypatch) -> Recipe:
    for seed, name in enumerate(("plain", "other")):
        write_made_up(tmp_path / f"{name}.jsonl", 150, seed)
    (tmp_path / "pays.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(study_module, "measure_in_turns", lambda stages, device: [[2500.0, 1000.0], [5000.0, 2000.0]])
    return load_recipe(tmp_path / "pays.toml")


@pytest.mark.parametrize("changes", [(), ("branch.experts.batch=256", "branch.experts.mixture={plain=1, other=1}")])
def test_the_sides_of_a_seed_differ_by_their_model_alone_and_equal_flops_are_equal(recipe, tmp_path, changes):
    program = Program(load_recipe(tmp_path / "pays.toml", changes))
    design = Design.of(program, "experts", (2500.0, 1000.0))
    seeds = [design.seed(program, "experts", number, ("plain",)) for number in (1, 2)]
    assert len({one.trunk.seed for one in seeds}) == 2
    assert program.recipe.seed not in {one.trunk.seed for one in seeds}
    share = design.whole.schedule.decay_steps / design.whole.own_steps
    for one in seeds:
        assert one.trunk.own_tokens == 1280
        pair = one.experts.stable, one.dense.stable
        for name in ("plan", "batch", "batch_changes", "seed", "start", "optimizer", "schedule", "corpora", "masking"):
            assert getattr(pair[0], name) == getattr(pair[1], name), name
        assert pair[0].start is not None
        assert (pair[0].start.stage, pair[0].start.step) == (one.trunk.key, one.trunk.steps)
        for side in (one.experts, one.dense):
            for n, decay in side.decays.items():
                assert decay.start is not None
                assert (decay.start.stage, decay.start.step in side.stable.keep) == (side.stable.key, True)
                assert decay.tokens - one.trunk.tokens == n * design.whole.step_tokens
                assert decay.own_steps / n == pytest.approx(share, abs=0.5 / n)
        spent = {n: _own(side, n, one.trunk.flops) for side in (one.experts,) for n in side.decays}
        rival = design.dense_steps("FLOPs", design.lengths[-1])
        step = design.whole.step_tokens * one.trunk.shape.flops_per_token(32).total
        assert _own(one.dense, rival, one.trunk.flops) == pytest.approx(spent[design.lengths[-1]], abs=step / 2)
        assert design.dense_steps("seconds", 10) == 25
    assert set(design.lengths) <= set(design.dense_lengths)
    assert design.ratios["FLOPs"] > 1


def _own(side: Any, n: int, trunk: float) -> float:
    """FLOPs of a branch since the checkpoint: its decay and the part of the stable run before it."""
    decay = side.decays[n]
    return decay.flops + replace(side.stable, steps=decay.first_step).flops


def test_which_branch_is_meant_has_to_be_clear(recipe, tmp_path):
    assert moe_branch(recipe, None) == "experts"
    with pytest.raises(UserError, match=r"--branch: expected a branch of kind 'moe' \(experts\), got 'same'"):
        moe_branch(recipe, "same")
    two = tmp_path / "two.toml"
    two.write_text(RECIPE + '[branch.more]\nkind = "moe"\n', encoding="utf-8")
    with pytest.raises(UserError, match="expected one of experts, more, got none; name the branch"):
        moe_branch(load_recipe(two), None)
    none = tmp_path / "none.toml"
    none.write_text(
        RECIPE.replace('kind = "moe"', "").replace("stable", "#").replace("experts = {", "#"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"expected a branch of kind 'moe', found none; add \[branch.experts\]"):
        moe_branch(load_recipe(none), None)
    with pytest.raises(UserError, match="expected 8 updates or more in its stable part and decay, got 4"):
        Design.of(Program(load_recipe(tmp_path / "pays.toml", ["branch.experts.stable=256", "branch.experts.tokens=256"])),
                  "experts", (1.0, 1.0))  # fmt: skip


World = dict[bool, tuple[float, float]]
"""Whether a stage has experts → (loss after 1,000 tokens of the continuation, fall for each unit of log tokens)."""


@pytest.fixture
def planted(monkeypatch):
    """Losses that follow from the tokens read after the checkpoint, with noise that seeds share and a little that they do not."""

    def plant(world: World, failed: str = "") -> list[Stage]:
        asked: list[Stage] = []

        def train(self, title, study, stages, prepared, **_: Any):
            asked.extend(stages)
            results: dict[str, Any] = {}
            for stage in stages:
                level, fall = world[stage.shape.experts > 1]
                noise = 2e-4 * (int(stage.key[:6], 16) % 7 - 3)
                loss = level - fall * math.log(max(1.0, stage.tokens - 1280) / 1000)
                nats = 1000 * (loss * (1 + 0.05 * (stage.seed // 1000)) + noise)
                scores = {name: {"nats": nats, "bytes": 1000} for name in ("plain", "other")}
                lost = failed and failed in stage.name
                results[stage.key] = {"failed": "not finite"} if lost else {"scores": scores, "seconds": {"step": 1.0}}
            return results

        monkeypatch.setattr(desk_module.Desk, "train", train)
        return asked

    return plant


def test_a_planted_break_even_is_found_on_each_axis_and_stands_in_the_report(recipe, tmp_path, planted):
    planted({False: (2.0, 0.1), True: (2.05, 0.13)})
    fact = upcycling(recipe, tmp_path / "home", quiet=True).data
    by_axis = {one["axis"]: one for one in fact["axes"]}
    assert tuple(by_axis) == AXES
    for axis in ("tokens", "FLOPs"):
        truth = 1000 * math.exp((0.05 + 0.1 * math.log(by_axis[axis]["ratio"])) / 0.03)
        turn = by_axis[axis]["break_even"]
        assert (turn["outcome"], turn["at"]) == ("overtakes", pytest.approx(truth, rel=0.2))
        assert turn["reach"] == pytest.approx(turn["at"] / 3200)
        assert by_axis[axis]["verdict"] == "dense ends lower"
    assert by_axis["seconds"]["ratio"] == 2.5
    assert by_axis["seconds"]["dense_tokens"] == pytest.approx(2.5 * 3200, abs=64)
    assert by_axis["seconds"]["break_even"]["outcome"] == "behind", "34 times the longest branch is out of reach"
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    page = render(book, "pays")
    ((kept, _),) = read_upcyclings(book, "pays")
    book.close()
    assert {name: value for name, value in json.loads(json.dumps(dict(fact))).items() if name in kept} == kept
    section = page.split('<section id="upcycling">')[1].split("</section>")[0]
    assert "At equal tokens the dense continuation ends lower than the experts" in section
    assert "the experts overtake at" in section
    assert "no break-even up to 10 times the longest length" in section
    assert section.count("<svg") == 4, "two figures, each for a page and for a phone"
    assert Path(fact["figure"]).read_text(encoding="utf-8").startswith("<svg xmlns")


def test_experts_that_lead_throughout_win_and_dense_that_leads_throughout_wins(recipe, tmp_path, planted):
    planted({False: (2.0, 0.05), True: (1.8, 0.05)})
    ahead = upcycling(recipe, tmp_path / "ahead", quiet=True).data
    assert {one["verdict"] for one in ahead["axes"]} == {"the experts end lower"}
    assert {one["break_even"]["outcome"] for one in ahead["axes"]} == {"ahead"}
    for one in ahead["axes"]:
        assert one["lead"]["high"] - one["lead"]["low"] < 0.2, "seeds differ by 5 %, their pairs by nothing like it"
    planted({False: (1.8, 0.05), True: (2.0, 0.05)})
    behind = upcycling(recipe, tmp_path / "behind", quiet=True).data
    assert {one["verdict"] for one in behind["axes"]} == {"dense ends lower"}
    assert {one["break_even"]["outcome"] for one in behind["axes"]} == {"behind"}


def test_one_seed_and_a_run_that_fails_settle_nothing(recipe, tmp_path, planted):
    planted({False: (2.0, 0.1), True: (2.05, 0.13)})
    one = upcycling(recipe, tmp_path / "one", quiet=True, seeds=1)
    assert {axis["verdict"] for axis in one.data["axes"]} == {"cannot tell from one seed"}
    planted({False: (2.0, 0.1), True: (2.05, 0.13)}, failed="experts-25-s2003")
    lost = upcycling(recipe, tmp_path / "lost", quiet=True).data
    assert {axis["verdict"] for axis in lost["axes"]} == {"cannot tell: a run failed"}
    assert [axis["break_even"] for axis in lost["axes"]] == [None] * 3
    for width in (720, 340):
        assert "nothing was measured" in lead_figure(lost, width)
        assert "<svg" in loss_figure(lost, width)


def test_a_killed_study_goes_on_where_it_was_with_the_lengths_that_it_had(recipe, tmp_path, trained, monkeypatch):
    home, fleet = tmp_path / "home", desk_module.Fleet
    whole = fleet.run  # pyright: ignore[reportFunctionMemberAccess]

    def killed(jobs: Any, watcher: Any, **more: Any) -> Any:
        whole(jobs[:8], watcher, **more)
        raise Stopped("stopped on request")

    monkeypatch.setattr(fleet, "run", killed)
    with pytest.raises(Stopped):
        upcycling(recipe, home, seeds=2, quiet=True)
    before = list(trained)
    assert len(before) == 8
    monkeypatch.setattr(fleet, "run", whole)
    monkeypatch.setattr(study_module, "measure_in_turns", lambda stages, device: [[9000.0, 1000.0]])
    trained.clear()
    fact = upcycling(recipe, home, seeds=2, quiet=True).data
    assert not set(before) & set(trained), "nothing is trained twice"
    assert fact["speeds"]["dense"] / fact["speeds"]["experts"] == 2.5, "the speeds of the first call"
    assert len(before) + len(trained) == fact["cost"]["runs"]
    trained.clear()
    assert upcycling(recipe, home, seeds=2, quiet=True).data == fact
    assert trained == []
    assert len(fact["loads"]) == 2
    _check_load(home, fact)
    _check_that_the_longest_branch_is_one_run(home, fact, tmp_path)


def _check_load(home: Path, fact: dict[str, Any]) -> None:
    """The load stands over the whole branch, stable part and decay, without a step counted twice."""
    book = LabBook(Home(home).labbook, readonly=True)
    ((_, loads),) = read_upcyclings(book, "pays")
    assert [tokens for tokens, _ in loads[0].uneven] == [128 * i for i in range(1, 26)]
    assert sum(curve[-1][1] for curve in loads[0].experts) == pytest.approx(4)
    section = render(book, "pays").split('<section id="upcycling">')[1].split("</section>")[0]
    assert section.count("<svg") == 6
    book.close()


def _check_that_the_longest_branch_is_one_run(home: Path, fact: dict[str, Any], folder: Path) -> None:
    """Stable part and decay give the scores of the recipe's branch trained in one go."""
    book = LabBook(Home(home).labbook, readonly=True)
    stable, decay = (book.run(name) for name in fact["chains"][0])
    trunk = book.run(stable["parent"]) if stable else None
    book.close()
    assert stable is not None
    assert decay is not None
    assert trunk is not None
    first = Stage.from_dict(stable["config"])
    one = replace(Stage.from_dict(decay["config"]), start=first.start, surgery=first.surgery)
    known = read_json(Home(home).program("pays") / "prepared.json")["corpora"]
    corpora = {name: open_corpus(home / corpus["folder"]) for name, corpus in known.items()}
    parent = checkpoint_path(home / trunk["folder"], first.first_step)
    result = run_stage(one, folder / "whole", corpora, Workshop(Runtime(compiled=False)), parent=parent)
    assert result["scores"] == read_json(home / decay["folder"] / "result.json")["scores"]


def test_the_study_in_the_documentation_is_valid_and_says_its_command_time_and_expectation() -> None:
    recipe = load_recipe(STUDIES / "upcycling.toml")
    head = (STUDIES / "upcycling.toml").read_text(encoding="utf-8").splitlines()[:3]
    assert head[0] == "# windtunnel model upcycling docs/studies/upcycling.toml"
    assert "minutes" in head[1]
    assert "Expect" in head[1]
    design = Design.of(Program(recipe), moe_branch(recipe, None), (2.0, 1.0))
    assert len(design.lengths) == 3
