"""A recipe grows a mixture of experts and a longer context from its trunk, through the same pipeline as any other branch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.manage import chat, export
from windtunnel.pipeline import run
from windtunnel.planning import load_program, plan
from windtunnel.program import Program
from windtunnel.recipe import load_recipe
from windtunnel.report.programme import read_limbs, target_runs
from windtunnel.train.stage import Stage

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
        16 + 3 + 5,
    )  # its own steps, of twice the trunk's tokens
    assert (stage.schedule.stable_end, stage.schedule.decay_steps) == (19, 5)
    assert stage.schedule.factor(19) == 1.0 > stage.schedule.factor(20)
    assert stage.balance is not None
    assert (stage.balance.loss, stage.balance.z) == (0.01, 0.001)
    assert 16 in trunk.keep
    assert type(stage).from_dict(json.loads(json.dumps(stage.to_dict()))) == stage
    assert program.recipe.forecast_branch == "same"


def test_a_branch_has_a_batch_schedule_of_its_own_counted_from_its_beginning_to_which_its_lengths_hold(folder):
    def stage_of(*changes: str) -> Stage:
        return Program(load_recipe(folder / "grown.toml", [f"branch.mixture.{change}" for change in changes])).branch(
            "mixture"
        )

    plain = stage_of("tokens=2304", "stable=1536")
    assert (plain.batch_changes, plain.own_steps, plain.schedule.stable_end) == ((), 6 + 9, 16 + 6)
    steps = 'batch_schedule=[{ after = "2 steps", batch = "512" }, { after = "7 steps", batch = "128" }]'
    tokens = 'batch_schedule=[{ after = 512, batch = "512" }, { after = 3072, batch = "128" }]'
    for schedule in (steps, tokens):
        stage = stage_of("tokens=2304", "stable=1536", schedule)
        assert (stage.batch, stage.batch_changes) == (8, ((18, 16), (23, 4)))
        own = [stage.batches.at(step) for step in range(17, stage.steps + 1)]
        assert own[:2] == [8] * 2
        assert own[2:7] == [16] * 5
        assert set(own[7:]) == {4}
        assert sum(own[: stage.schedule.stable_end - 16]) * 32 == 1536
        assert sum(own) * 32 == stage.own_tokens == 1536 + 2304
        assert Stage.from_dict(json.loads(json.dumps(stage.to_dict()))) == stage
        assert stage.key != plain.key
    counted = stage_of(steps)
    assert (counted.schedule.stable_end, counted.own_steps) == (16 + 3, 3 + 5)  # lengths in steps are steps
    with pytest.raises(
        RecipeError, match=r"branch\.mixture\.batch_schedule: expected changes before its last step, 8, got"
    ):
        stage_of('batch_schedule=[{ after = "8 steps", batch = "512" }]')


CHATS = """
[corpus.exact]
source = "made:exact/200"
messages = "messages"
[branch.chat]
kind = "sft"
parent = "mixture"
at = "3 steps"
mixture = { exact = 1 }
[branch.more]
kind = "sft"
parent = "chat"
at = "40 steps"
mixture = { exact = 1 }
"""


def test_a_step_of_another_branch_is_counted_from_its_beginning_and_has_the_batch_of_that_step(folder, tmp_path):
    text = RECIPE.replace(
        'tokens = "5 steps"', 'tokens = "5 steps"\nbatch_schedule = [{ after = "4 steps", batch = "512" }]'
    )
    text = text.replace('warmup = "4 steps"', 'warmup = "4 steps"\nmixture = { plain = 1 }')
    (tmp_path / "chats.toml").write_text(text + CHATS, encoding="utf-8")

    def stages(*changes: str, end: int | None = None) -> tuple[Stage, Stage, Stage]:
        program = Program(load_recipe(tmp_path / "chats.toml", list(changes)))
        return program.trunk(end), program.branch("mixture", end), program.branch("chat", end)

    for changes, end, first in (((), None, 16), (("trunk.tokens=5120",), None, 32), ((), 8, 8)):
        _, parent, chat = stages(*changes, end=end)
        assert chat.start is not None
        assert (chat.start.stage, chat.start.step, parent.keep) == (parent.key, first + 3, (first + 3,))
        assert chat.batch * 32 == 256, "that of the step, not the last one's"
    _, _, late = stages("branch.chat.at=5 steps")
    assert late.batch * 32 == 512
    with pytest.raises(
        RecipeError, match=r"branch\.chat\.at: expected 1 to 8 steps of 'mixture', got 9 steps; leave it out"
    ):
        stages("branch.chat.at=9 steps")
    # How many steps chats are is not known before they are read: no reason to refuse a plan.
    more = Program(load_recipe(tmp_path / "chats.toml")).branch("more")
    assert more.start is not None
    assert more.start.step == 40


def test_an_inner_width_that_a_gpu_cannot_group_is_refused_before_anything_is_read(folder):
    text = RECIPE.replace('size = "0.02M"', "shape = { width = 32, layers = 2, ff = 100 }")
    (folder / "odd.toml").write_text(text, encoding="utf-8")
    with pytest.raises(
        RecipeError, match="expected a multiple of 8 for the experts of branch.mixture, got 100; write 104"
    ):
        load_recipe(folder / "odd.toml")
    (folder / "odd.toml").write_text(text.replace("100", "104").replace("count = 4", "count = 3"), encoding="utf-8")
    assert Program(load_recipe(folder / "odd.toml")).branch("mixture").shape.experts == 3


@pytest.mark.slow
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
    page = (home.program("grown") / "report.html").read_text(encoding="utf-8")
    assert "Which experts the tokens went to" in page
    assert "“mixture” has 4 experts in each layer" in page


LONGER = (
    RECIPE.replace('name = "grown"', 'name = "longer"').partition("[branch.mixture]")[0]
    + """
[branch.stretch]
kind = "long"
at = "80%"
stable = "2 steps"
context = { row = 64, theta = 50000, items = 0 }

[branch.long]
kind = "long"
parent = "stretch"
tokens = "4 steps"
batch = "512"
context = { row = 256, scaling = "ntk", items = 2 }
"""
)


def test_a_longer_context_is_a_chain_of_stages_that_ends_in_a_decay(folder):
    (folder / "longer.toml").write_text(LONGER, encoding="utf-8")
    program = Program(load_recipe(folder / "longer.toml"))
    trunk, stretch, long = program.trunk(), program.branch("stretch"), program.branch("long")
    assert stretch.start is not None
    assert (stretch.start.stage, stretch.start.step, stretch.steps) == (trunk.key, 16, 18)
    assert (stretch.plan.row, stretch.batch) == (64, 2)  # as many tokens in a step as the trunk
    assert stretch.schedule == trunk.schedule  # it does not decay
    assert stretch.shape.rope == (50_000.0, "none", 1.0, 0)
    assert not stretch.shape.tied
    assert long.start is not None
    assert (long.start.stage, long.start.step, long.steps) == (stretch.key, 18, 22)
    assert (long.plan.row, long.batch) == (256, 2)
    assert long.shape.rope == (50_000.0, "ntk", 4.0, 64)
    assert (long.schedule.stable_end, long.schedule.decay_steps) == (18, 4)
    assert program.recipe.from_trunk == ("same", "stretch")
    assert program.recipe.forecast_branch == "same"
    assert trunk.keep == (16,)


@pytest.mark.slow
def test_a_longer_context_is_trained_measured_exported_and_shown(folder, monkeypatch):
    monkeypatch.setattr(desk_module, "has_compiler", lambda: False)
    (folder / "longer.toml").write_text(LONGER, encoding="utf-8")
    recipe, home = load_recipe(folder / "longer.toml"), Home(folder / "home")
    run(recipe, home.root, quiet=True)
    view = plan(recipe, home.root, measure=False)
    assert {line["name"]: line["state"] for line in view.data["stages"]}["long"] == "done"
    program = load_program(recipe, home)
    stage = program.branch("long")
    with LabBook(home.labbook, readonly=True) as book:
        found = book.fact("longer", "model", stage.folder_name)["context"]
        limbs = {limb.name: limb for limb in read_limbs(book, target_runs(book, "longer"))}
    assert (found["row"], found["short_row"]) == (256, 32)
    assert 0 < found["short"]["plain"]["after"] < 20
    assert found["positions"]["plain"][0]["from"] == 0
    assert found["positions"]["plain"][0]["tokens"] > 0
    assert all(0 < part["before"] < 20 and part["before"] != part["loss"] for part in found["positions"]["plain"])
    cells = [(cell["task"], cell["length"], cell["depth"]) for cell in found["retrieval"]]
    lengths = {cell["length"] for cell in found["retrieval"]}
    assert len(cells) == len(set(cells)) == 3 * len(lengths) * 5
    assert {
        256,
        512,
    } <= lengths  # as long as its rows, and beyond; a question needs over a hundred tokens of this vocabulary
    assert (limbs["stretch"].start, limbs["stretch"].end) == (16 * 128, 18 * 128)
    assert (limbs["long"].start, limbs["long"].end) == (18 * 128, 18 * 128 + 4 * 512)
    config = json.loads((home.program("longer") / "exports" / stage.folder_name / "config.json").read_text())
    assert config["rope_theta"] == pytest.approx(50_000 * 4 ** (stage.shape.head_dim / (stage.shape.head_dim - 2)))
    assert not config["tie_word_embeddings"]
    before = {path: path.stat().st_mtime for path in home.runs("longer").rglob("*.safetensors")}
    run(load_recipe(folder / "longer.toml", ["branch.long.context.dynamic_ntk=4@128"]), home.root, quiet=True)
    assert {path: path.stat().st_mtime for path in home.runs("longer").rglob("*.safetensors")} == before
    config = json.loads((home.program("longer") / "exports" / stage.folder_name / "config.json").read_text())
    served = {"rope_type": "dynamic", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    assert config["rope_scaling"] == config["rope_parameters"] == served
    assert config["max_position_embeddings"] == 128
    assert export(home.root, "longer/long", out=folder / "plain", dynamic_ntk="none").data["dynamic_ntk"] is None
    assert "rope_scaling" not in json.loads((folder / "plain" / "config.json").read_text())
    with pytest.raises(UserError, match="--dynamic-ntk: expected FACTOR or FACTOR@TOKENS"):
        chat(home.root, "longer/long", prompt="Hello", dynamic_ntk="far")
    chat(home.root, "longer/long", prompt="Hello", max_tokens=4, dynamic_ntk="2@64")
    page = (home.program("longer") / "report.html").read_text(encoding="utf-8")
    assert "What the longer context brought" in page
    assert "Share of hidden keys found" in page
