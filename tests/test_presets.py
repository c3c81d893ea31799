"""The presets of the paper's family: every stage's tokens, batch and rates as published (arXiv 2404.06395), planned without data.

The 1.2B begins with half of the batch, so that its steps are more and its tokens the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from windtunnel.export.huggingface import rope_parameters
from windtunnel.home import Home
from windtunnel.model.serving import DynamicNtk
from windtunnel.planning import Speed, expected_seconds, load_program, plan, plan_lines
from windtunnel.program import Program
from windtunnel.recipe import load_recipe

SIZES = {"minicpm-1.2b": 1_247_442_432, "minicpm-2.4b": 2_442_057_984}
BATCH = 3_932_160
FIRST = {"minicpm-1.2b": BATCH // 2, "minicpm-2.4b": BATCH}
STABLE = {"minicpm-1.2b": 261_000 + 50_863 // 2, "minicpm-2.4b": 261_000}
"""Steps of the trunk: the 1.2B reads the first 100B tokens, 50,863 steps, with half of the batch."""


@pytest.fixture(scope="module", params=SIZES)
def planned(request, tmp_path_factory) -> tuple[str, dict[str, dict[str, Any]]]:
    home: Path = tmp_path_factory.mktemp("presets")
    view = plan(load_recipe(request.param), home, measure=False)
    assert (view.data["body"], view.data["batch_tokens"]) == (SIZES[request.param], FIRST[request.param])
    return request.param, {stage["name"]: stage for stage in view.data["stages"]}


def spans(stage: dict[str, Any]) -> tuple[int, int]:
    return stage["from_step"], stage["to_step"]


def test_the_trunk_is_stable_for_261000_steps_of_4m_and_decays_18500_steps_with_a_half_life_of_5000(planned):
    which, stages = planned
    stable = STABLE[which]
    assert spans(stages["trunk"]) == (0, stable)
    assert stages["trunk"]["rate"] == [0.01, 0.01]
    assert stages["trunk"]["tokens"] == pytest.approx(261_000 * BATCH, abs=BATCH) == pytest.approx(1.026e12, rel=1e-3)
    for name in ("same", "better"):
        assert spans(stages[name]) == (stable, stable + 18_500)
        assert (
            stages[name]["rate"][1] == pytest.approx(0.01 * 0.5 ** (18_500 / 5_000)) == pytest.approx(7.7e-4, rel=1e-2)
        )
        assert stages[name]["tokens"] == pytest.approx(73e9, rel=1e-2)


def test_the_batch_of_the_smaller_one_grows_from_2m_to_4m_tokens_as_the_papers_did(planned, tmp_path):
    which, stages = planned
    trunk = load_program(load_recipe(which), Home(tmp_path)).trunk()
    assert trunk.batch * trunk.plan.row == FIRST[which]
    changes = [(step, batch * trunk.plan.row) for step, batch in trunk.batch_changes]
    assert changes == ([(round(100e9 / 1_966_080), BATCH)] if which == "minicpm-1.2b" else [])
    assert {stages[name]["batch_tokens"] for name in ("trunk", "same", "better", "moe")} == {BATCH}


def test_sft_takes_6b_tokens_from_1e_3_to_1e_4_and_dpo_follows_a_cosine_from_1e_5_without_the_roles(planned):
    name, stages = planned
    for chat in ("chat", "moe-chat"):
        assert stages[chat]["tokens"] == pytest.approx(6e9, rel=1e-3)
        assert stages[chat]["rate"] == pytest.approx([1e-3, 1e-4], rel=1e-9)
        assert stages[chat]["batch_tokens"] == BATCH // 2
    assert stages["aligned"]["rate"][0] == pytest.approx(1e-5, rel=0.01)
    recipe = load_recipe(name)
    assert (recipe.branch["aligned"].preset, recipe.branch["aligned"].parent) == ("paper", "chat")
    assert {recipe.corpus[c].template for c in recipe.branch["chat"].mixture or ()} == {"minicpm"}


def test_experts_go_on_for_130000_steps_of_4m_tokens_and_have_the_papers_size(planned):
    name, stages = planned
    moe = stages["moe"]
    assert spans(moe) == (STABLE[name], STABLE[name] + 130_000)
    assert moe["batch_tokens"] == BATCH
    assert moe["tokens"] == pytest.approx(0.51e12, rel=0.01)
    if name == "minicpm-2.4b":
        attention, mlp, router, gains = 40 * 2 * 2304 * 72 * 64, 40 * 3 * 2304 * 5760, 40 * 8 * 2304, 81 * 2304
        assert moe["parameters"] == attention + 8 * mlp + router + gains == pytest.approx(13.6e9, rel=1e-3)
        assert moe["active"] == attention + 2 * mlp + router + gains == pytest.approx(4.03e9, rel=2e-3)


def test_contexts_grow_from_the_last_stable_checkpoint_to_128k_on_44_percent_long_text(planned):
    name, stages = planned
    chain = [stages[f"long-{k}k"] for k in (32, 64, 128)]
    assert [stage["row"] for stage in chain] == [32_768, 65_536, 131_072]
    assert {stage["batch_tokens"] for stage in chain} == {BATCH}
    assert chain[0]["from_step"] == STABLE[name]
    assert [b["from_step"] for b in chain[1:]] == [a["to_step"] for a in chain[:-1]]
    assert [stage["rate"][1] for stage in chain] == pytest.approx([0.01, 0.01, 0.001])
    recipe = load_recipe(name)
    contexts = [context for k in (32, 64, 128) if (context := recipe.branch[f"long-{k}k"].context)]
    assert [context.scaling for context in contexts] == [None, "ntk", "ntk"]
    assert [context.dynamic_ntk for context in contexts] == [None, None, "4@65536"]
    served = DynamicNtk.parse(contexts[2].dynamic_ntk).of(Program(recipe).branch("long-128k").shape)
    rope = rope_parameters(served)  # the released config.json of MiniCPM-2B-128k
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("dynamic", 4.0, 1e6)
    assert rope["original_max_position_embeddings"] == 65_536
    assert contexts[0].theta == 1e6
    assert all(context.untie for context in contexts)
    for k in (32, 64, 128):
        mixture = recipe.branch[f"long-{k}k"].mixture or {}
        assert sum(mixture.values()) == 100
        assert sum(mixture[c] for c in ("books", "long_questions", "arxiv", "pes2o", "wikipedia")) == 44
        assert contexts[0].long_share == contexts[1].long_share == contexts[2].long_share == 0.44


def test_the_tiny_family_has_every_kind_of_branch_and_fits_an_hour_of_two_slow_cores(tmp_path):
    recipe = load_recipe("family-tiny")
    assert {branch.kind for branch in recipe.branch.values()} == {"decay", "soup", "moe", "long", "sft", "dpo"}
    stages = {stage["name"]: stage for stage in plan(recipe, tmp_path, measure=False).data["stages"]}
    points = {stages[name]["from_step"] for name in ("same", "better", "experts", "long")}
    assert points == {stages["trunk"]["to_step"]}, (
        "one branch point for all, so that the trunk goes no further for one of them"
    )
    # A core of the slow machine in docs/lab-log.md reaches 38 GFLOP/s in training. Chats and pairs are counted as three million tokens
    # each, since their rows are not known before the corpora are read.
    program = load_program(recipe, Home(tmp_path))
    speed, longer = Speed(38e9, "assumed", 2), ("chat", "aligned", "gentle")
    lines = [
        replace(item, seconds=item.seconds * 3e6 / item.stages[0].own_tokens)
        if item.seconds and item.name in longer
        else item
        for item in plan_lines(program, Home(tmp_path), speed)
    ]
    apart = sum(item.seconds or 0.0 for item in lines)
    assert expected_seconds(program, lines, speed) < min(3600, 0.85 * apart), (
        "branches of one checkpoint train side by side"
    )
    assert expected_seconds(program, lines, replace(speed, workers=1)) == pytest.approx(apart)
