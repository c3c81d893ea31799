"""Fine-tuning on chats: the same loop from the parent's weights, and the loss and gradients that trl computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from windtunnel.base.artefact import read_manifest
from windtunnel.base.errors import ArtefactError, RecipeError
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.corpus.packing import row_index
from windtunnel.export.folding import llama_name
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.posttrain.sft import end_rate, fresh_stage, sft_schedule
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.checkpoint import load_model
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import AdamW, Stage
from windtunnel.train.step import train_step

ROW = 96
PLAIN = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)


@pytest.fixture
def setting(chats):
    return Setting(
        corpora=(("chats", chats.hash),), mixture=(("chats", 1.0),), row=ROW, batch=2, warmup=2, seed=5,
        parametrization=Parametrization(), optimizer=AdamW(), score=("chats",),
    )  # fmt: skip


@pytest.fixture
def decayed(setting) -> Stage:
    return decay_stage(trunk_stage("trunk", PLAIN, setting, 4), "better", setting, at=4, steps=4)


def sft(parent: Stage, setting: Setting, chats, **changes) -> Stage:
    packed = (("chats", row_index(chats, parent.plan.row).hash),)
    options = {
        "rate": end_rate(parent, "branch.chat.lr"),
        "schedule": sft_schedule(8, 2, 4),
        "steps": 8,
        "batch": 3,
        **changes,
    }
    return fresh_stage(parent, "chat", "sft", setting, mixture=(("chats", 1.0),), packed=packed, **options)


@pytest.fixture
def grown(tmp_path, eager, setting, decayed, chats):
    """A decayed parent on disk and the fine-tuning that grows from it."""
    workshop, corpora = Workshop(eager), {"chats": chats}
    trunk = trunk_stage("trunk", PLAIN, setting, 4)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    run_stage(decayed, tmp_path / "better", corpora, workshop, parent=checkpoint_path(tmp_path / "trunk", 4))
    return workshop, corpora, checkpoint_path(tmp_path / "better", 8), sft(decayed, setting, chats)


def test_loss_and_gradients_are_those_of_trl_on_the_same_chats(
    eager, setting, decayed, chats, twin, trainer_arguments, plain_tokenizer
):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, llama = twin()
    stage = replace(sft(decayed, setting, chats), shape=model.shape, parametrization=model.parametrization)
    rows = Loader(stage.plan, {"chats": chats}).rows(0, 4)
    trainer = Workshop(eager).trainer(stage)
    trainer.model.load_state_dict(model.state_dict())
    _, sums = trainer.compute(
        trainer.model, *map(torch.from_numpy, (rows.inputs, rows.targets, rows.documents)), torch.ones(1)
    )
    count = int(trainer.objective.counts(rows)[0])
    loss, _ = trainer.compute(
        trainer.model, *map(torch.from_numpy, (rows.inputs, rows.targets, rows.documents)), torch.tensor([1 / count])
    )
    loss.backward()

    examples = []  # what trl sees: each chat alone, padded
    for inputs, targets, documents in zip(rows.inputs, rows.targets, rows.documents, strict=True):
        for number in range(documents.max() + 1):
            ids, labels = inputs[documents == number].tolist(), targets[documents == number].tolist()
            if any(label != IGNORED for label in labels):
                last = labels[-1] if labels[-1] != IGNORED else 5  # the token after the last one that is read
                examples.append({"input_ids": [*ids, last], "labels": [IGNORED, *labels]})
    assert len(examples) > len(rows)
    reference = SFTTrainer(
        model=llama, args=SFTConfig(**trainer_arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2]}]), processing_class=plain_tokenizer,
    )  # fmt: skip
    llama.train()
    expected = reference.compute_loss(llama, dict(DataCollatorForLanguageModeling(pad_token_id=0)(examples)))
    expected.backward()
    assert float(sums[0]) / count == pytest.approx(expected.item(), abs=1e-5)
    theirs = dict(llama.named_parameters())
    largest = 0.0
    for name, parameter in trainer.model.named_parameters():
        wanted = theirs[llama_name(name)].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-5)
        largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-3


def test_it_begins_with_the_parents_weights_empty_moments_and_its_own_data_from_the_first_row(tmp_path, grown):
    workshop, corpora, parent, stage = grown
    hash_before = read_manifest(parent).hash
    still = replace(stage, optimizer=replace(stage.optimizer, learning_rate=1e-30))
    result = run_stage(still, tmp_path / "still", corpora, workshop, parent=parent)
    before, after = load_model(parent)[0], load_model(checkpoint_path(tmp_path / "still", 8))[0]
    for one, two in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, two)
    state = read_manifest(checkpoint_path(tmp_path / "still", 8)).config
    assert (state["step"], state["optimizer_step"], state["sequences"]) == (8, 8, 24)
    assert (result["tokens"], stage.own_steps, stage.first_step) == (24 * ROW, 8, 0)
    assert read_manifest(parent).hash == hash_before


def test_it_learns_to_answer_and_a_run_cut_off_in_the_middle_is_bit_for_bit_the_uninterrupted_one(tmp_path, grown):
    workshop, corpora, parent, stage = grown
    whole = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=parent)
    run_stage(replace(stage, steps=5), tmp_path / "cut", corpora, workshop, parent=parent)
    cut = run_stage(stage, tmp_path / "cut", corpora, workshop, parent=parent)
    assert cut["scores"] == whole["scores"]
    assert list(read_metrics(tmp_path / "cut")) == list(read_metrics(tmp_path / "whole"))
    files = [sorted(checkpoint_path(tmp_path / name, 8).glob("*.safetensors")) for name in ("cut", "whole")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    untrained = run_stage(
        replace(stage, optimizer=replace(stage.optimizer, learning_rate=1e-30)),
        tmp_path / "no",
        corpora,
        workshop,
        parent=parent,
    )
    assert whole["scores"]["chats"]["bits_per_byte"] < untrained["scores"]["chats"]["bits_per_byte"]


def test_accumulation_over_packed_chats_changes_nothing(eager, setting, decayed, chats):
    stage, losses = sft(decayed, setting, chats), []
    loader = Loader(stage.plan, {"chats": chats})
    for micro in (6, 1, 4):
        trainer = Workshop(eager).trainer(stage)
        trainer.micro = micro
        losses.append([train_step(trainer, loader.rows(6 * i, 6), 0.01).terms["loss"] for i in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_the_rate_goes_on_where_the_decay_ended_warms_up_and_falls_to_a_tenth(setting, decayed, chats):
    stage = sft(decayed, setting, chats)
    assert stage.optimizer.learning_rate == pytest.approx(0.1 * decayed.optimizer.learning_rate)
    factors = [stage.schedule.factor(step) for step in range(1, 9)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 0.1**0.25, 0.1**0.5, 0.1**0.75, 0.1])
    trunk = trunk_stage("trunk", PLAIN, setting, 4)
    low = decay_stage(trunk, "low", setting, at=4, steps=4, form="linear", floor=0.0)
    with pytest.raises(
        RecipeError,
        match="branch.chat.lr: expected a learning rate, got none; 'low' ended at 0, below 1/50 of its 0.01; write for example lr = 0.001",
    ):
        end_rate(low, "branch.chat.lr")
    assert end_rate(
        decay_stage(trunk, "edge", setting, at=4, steps=4, form="linear", floor=0.02), "x"
    ) == pytest.approx(0.0002)


def test_every_tensor_can_be_given_the_same_rate(eager, setting, decayed, chats):
    wide = replace(decayed, shape=replace(PLAIN, width=64, heads=4, kv_heads=2, ff=160))
    for by_role, expected in ((True, {1.0, 0.5}), (False, {1.0})):
        trainer = Workshop(eager).trainer(sft(wide, setting, chats, by_role=by_role))
        assert {group["lr_multiplier"] for group in trainer.optimizer.param_groups} == expected


def test_what_changes_nothing_keeps_the_keys_of_other_stages_and_what_changes_numbers_changes_this_one(
    setting, decayed, chats
):
    plain = decayed.to_dict()
    assert plain["start"] == {"stage": decayed.start.stage, "step": 4}
    assert "lr_by_role" not in plain
    stage = sft(decayed, setting, chats)
    assert Stage.from_dict(stage.to_dict()) == stage
    for other in (
        replace(stage, start=replace(stage.start, fresh=False)), replace(stage, lr_by_role=False), sft(decayed, setting, chats, rate=0.5),
        replace(stage, plan=DataPlan(5, ROW, (Segment(0, (("chats", 1.0),)),))), sft(replace(decayed, seed=6), setting, chats),
    ):  # fmt: skip
        assert other.key != stage.key


def test_a_parent_of_another_shape_or_tokenizer_is_one_line_before_anything_is_trained(tmp_path, grown):
    workshop, corpora, parent, stage = grown
    wider = replace(stage, shape=replace(stage.shape, vocab=384, layers=3))
    with pytest.raises(
        ArtefactError, match="expected a checkpoint with layers 3, vocab 384, found layers 2, vocab 320"
    ):
        run_stage(wider, tmp_path / "wider", corpora, workshop, parent=parent)
    with pytest.raises(ArtefactError, match="expected a checkpoint of the tokenizer that the corpora were built with"):
        run_stage(
            stage,
            tmp_path / "foreign",
            {"chats": replace(corpora["chats"], tokenizer_hash="f" * 64)},
            workshop,
            parent=parent,
        )
    assert not (tmp_path / "foreign" / "checkpoints").exists()
