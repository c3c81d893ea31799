"""A longer context: a head of its own that begins as the embedding, other positions, longer rows, and training as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from windtunnel.pretrain.extend import extended_stage
from windtunnel.train.checkpoint import load_model
from windtunnel.train.control import Control
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, begin, run_stage
from windtunnel.train.stage import Stage


@pytest.fixture(scope="module")
def workshop(eager):
    return Workshop(eager)


@pytest.fixture
def parent(tmp_path, workshop, make_trunk, tiny_corpus):
    trunk = make_trunk(6)
    run_stage(trunk, tmp_path / "trunk", {"tiny": tiny_corpus}, workshop)
    return trunk, checkpoint_path(tmp_path / "trunk", 6)


def extended(trunk: Stage, setting, **changes) -> Stage:
    options = {"at": 6, "row": 128, "stable": 2, "decay": 2, "batch": 2, **changes}
    return extended_stage(trunk, "long", setting, **options)


def test_untying_copies_the_embedding_and_its_moments_to_the_head_and_changes_no_logit(
    tmp_path, parent, workshop, tiny_setting
):
    stage = extended(parent[0], tiny_setting)
    trainer, said = workshop.trainer(stage), []
    at = begin(stage, tmp_path / "run", parent[1], trainer, Control(say=said.append))
    assert (at.step, at.optimizer_step, at.sequences) == (6, 6, 0)
    assert "logits agree" in said[0]
    model, state = trainer.model, trainer.optimizer.state
    assert not model.shape.tied
    assert torch.equal(model.head.weight, model.embedding.weight)
    for moment in ("exp_avg", "exp_avg_sq"):
        head, embedding = state[model.head.weight][moment], state[model.embedding.weight][moment]
        assert head.abs().max() > 0
        assert torch.equal(head, embedding)
    tokens_BT = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    old, _ = load_model(parent[1])
    torch.testing.assert_close(model(tokens_BT), old(tokens_BT), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"theta": 50_000.0}, (50_000.0, "none", 1.0, 0)),
        ({"scaling": "ntk"}, (10_000.0, "ntk", 4.0, 32)),
        ({"scaling": "yarn", "factor": 8.0, "untie": False}, (10_000.0, "yarn", 8.0, 32)),
    ],
)
def test_positions_are_stretched_as_asked_and_the_branch_trains_and_resumes(
    tmp_path, parent, workshop, tiny_setting, tiny_corpus, changes, rope
):
    stage = extended(parent[0], tiny_setting, **changes)
    assert stage.shape.rope == rope
    assert stage.shape.tied == (changes.get("untie") is False)
    assert Stage.from_dict(stage.to_dict()) == stage
    corpora = {"tiny": tiny_corpus}
    said: list[str] = []
    result = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=parent[1], control=Control(say=said.append))
    assert "logits agree" in said[0]  # with the new positions in both models
    assert result["tokens"] == 4 * 2 * 128
    part = replace(stage, steps=8)
    run_stage(part, tmp_path / "cut", corpora, workshop, parent=parent[1])
    again = run_stage(stage, tmp_path / "cut", corpora, workshop, parent=parent[1])
    assert again["scores"] == result["scores"]
    model, _ = load_model(checkpoint_path(tmp_path / "whole", 10))
    assert model.shape == stage.shape
