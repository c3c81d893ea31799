"""A recipe grows a mixture of experts from its trunk, through the same pipeline as any other branch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from windtunnel import desk as desk_module
from windtunnel.home import Home
from windtunnel.pipeline import run
from windtunnel.planning import load_program, plan
from windtunnel.program import Program
from windtunnel.recipe import load_recipe

RECIPE = """
name = "grown"

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
tokens = "2560"
batch = "128"
warmup = "4 steps"

[branch.same]
tokens = "20%"

[branch.mixture]
kind = "moe"
at = "80%"
tokens = "5 steps"
stable = "3 steps"
batch = "256"
experts = { count = 4, top_k = 2, bias = 0.0, z = 0.001 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up) -> Path:
    made = tmp_path_factory.mktemp("growth")
    write_made_up(made / "plain.jsonl", 300)
    (made / "grown.toml").write_text(RECIPE, encoding="utf-8")
    return made


def test_a_mixture_branch_is_the_stage_that_its_table_says(folder):
    program = Program(load_recipe(folder / "grown.toml"))
    stage, trunk = program.branch("mixture"), program.trunk()
    assert (stage.kind, stage.shape.experts, stage.shape.top_k, stage.batch) == ("moe", 4, 2, 8)
    assert stage.start is not None
    assert (stage.start.stage, stage.start.step, stage.steps) == (
        trunk.key,
        16,
        16 + 2 + 2,
    )  # 5 and 3 steps of the trunk's
    assert (stage.schedule.stable_end, stage.schedule.decay_steps) == (18, 2)
    assert stage.schedule.factor(18) == 1.0 > stage.schedule.factor(19)
    assert stage.balance is not None
    assert (stage.balance.loss, stage.balance.z) == (0.01, 0.001)
    assert 16 in trunk.keep
    assert type(stage).from_dict(json.loads(json.dumps(stage.to_dict()))) == stage
    assert program.recipe.forecast_branch == "same"


def test_a_mixture_is_trained_scored_sampled_and_exported_like_any_branch(folder, monkeypatch):
    monkeypatch.setattr(desk_module, "has_compiler", lambda: False)
    recipe = load_recipe(folder / "grown.toml")
    run(recipe, folder / "home", quiet=True)
    home = Home(folder / "home")
    states = {line["name"]: line["state"] for line in plan(recipe, folder / "home", measure=False).data["stages"]}
    assert states["mixture"] == "done"
    program = load_program(recipe, home)
    stage = program.branch("mixture")
    result = json.loads((home.runs("grown") / stage.folder_name / "result.json").read_text())
    assert 0 < result["scores"]["plain"]["bits_per_byte"] < 20
    config = json.loads((home.program("grown") / "exports" / stage.folder_name / "config.json").read_text())
    assert config["model_type"] == "mixtral"
