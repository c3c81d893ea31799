"""Low-rank adapters: peft's loss and gradients, the parent's function at first, merged weights for whoever reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from windtunnel.base.artefact import read_manifest
from windtunnel.base.errors import UserError
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import Cleaning, SourceConfig
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.packing import row_index
from windtunnel.export.folding import llama_name
from windtunnel.model.adapters import Adapted, attach, merged_weights
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.posttrain.sft import fresh_stage, sft_schedule
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.checkpoint import load_model
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.lora import Lora
from windtunnel.train.metrics import read_metrics
from windtunnel.train.optimizer import build_optimizer
from windtunnel.train.stage import AdamW, Muon, Stage, check_ranks

ROW = 96
PLAIN = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)
LORA = Lora(rank=4, alpha=12.0)


@pytest.fixture
def setting(chats):
    return Setting(
        corpora=(("chats", chats.hash),), mixture=(("chats", 1.0),), row=ROW, batch=2, warmup=2, seed=5,
        parametrization=Parametrization(), optimizer=AdamW(), score=("chats",),
    )  # fmt: skip


@pytest.fixture
def trunk(setting) -> Stage:
    return trunk_stage("trunk", PLAIN, setting, 4)


def tuned(trunk: Stage, setting: Setting, chats, **changes) -> Stage:
    packed = (("chats", row_index(chats, ROW).hash),)
    stage = fresh_stage(
        trunk, "chat", "sft", setting, rate=0.02, schedule=sft_schedule(8, 2, 4), steps=8, batch=3,
        mixture=(("chats", 1.0),), packed=packed,
    )  # fmt: skip
    return replace(stage, lora=LORA, **changes)


def test_loss_and_gradients_are_those_of_peft_on_the_same_batch(
    twin, trunk, setting, chats, lora_config, share_adapters
):
    from peft import get_peft_model

    model, llama = twin(0)
    attach(model, LORA.rank, LORA.scale)
    theirs = get_peft_model(llama, lora_config(LORA))
    wanted = share_adapters(model, theirs)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = Loader(tuned(trunk, setting, chats).plan, {"chats": chats}).rows(0, 2)
    tokens, targets = torch.from_numpy(rows.inputs[:, :30]), torch.from_numpy(rows.targets[:, :30])
    scored = targets != IGNORED
    assert scored.sum() > 10
    losses = []
    for logits in (model(tokens)[..., : PLAIN.vocab], theirs(input_ids=tokens).logits):
        losses.append(torch.nn.functional.cross_entropy(logits[scored], targets[scored]))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    largest = 0.0
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0, atol=1e-5)
        largest = max(largest, float(parameter.grad.abs().max()))
    assert largest > 1e-2
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    merged = theirs.merge_and_unload().state_dict()
    for name, value in merged_weights(model).items():
        if llama_name(name) in merged:
            torch.testing.assert_close(value, merged[llama_name(name)], rtol=0, atol=1e-6)


def test_only_adapters_train_from_the_parents_function_and_whoever_reads_the_checkpoint_sees_merged_weights(
    tmp_path, eager, trunk, setting, chats
):
    workshop, corpora, stage = Workshop(eager), {"chats": chats}, tuned(trunk, setting, chats)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    parent = checkpoint_path(tmp_path / "trunk", 4)
    before = load_model(parent)[0]
    whole = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=parent)
    after, manifest = load_model(checkpoint_path(tmp_path / "whole", 8))
    assert Stage.from_dict(manifest.config["stage"]) == stage
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {n for n, role in after.roles.items() if role is Role.HIDDEN}
    for name in moved:
        change = (after.get_parameter(name) - before.get_parameter(name)).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= LORA.rank
    assert not any(isinstance(module, Adapted) for module in after.modules())
    # The score that training took with its adapters is that of the merged weights.
    plain = replace(stage, lora=None, steps=1, optimizer=replace(stage.optimizer, learning_rate=1e-30), keep=())
    merged = replace(plain, start=replace(stage.start, stage=stage.key, step=8))
    again = run_stage(merged, tmp_path / "again", corpora, workshop, parent=checkpoint_path(tmp_path / "whole", 8))
    assert again["scores"]["chats"]["nats"] == pytest.approx(whole["scores"]["chats"]["nats"], rel=1e-5)
    # A run that was cut off goes on bit for bit.
    run_stage(replace(stage, steps=5), tmp_path / "cut", corpora, workshop, parent=parent)
    cut = run_stage(stage, tmp_path / "cut", corpora, workshop, parent=parent)
    assert cut["scores"] == whole["scores"]
    assert list(read_metrics(tmp_path / "cut")) == list(read_metrics(tmp_path / "whole"))
    files = [sorted(checkpoint_path(tmp_path / name, 8).glob("*.safetensors")) for name in ("cut", "whole")]
    assert [f.name for f in files[0]] == ["adapters.safetensors", "optimizer.safetensors", "weights.safetensors"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert read_manifest(parent)  # untouched


def test_text_is_adapted_to_with_adapters_alone(tmp_path, eager, trunk, setting, chats, chat_tokenizer):
    lines = [f'{{"text": "{a} plus {a % 7} is {a + a % 7}, said the teacher of village {a}."}}' for a in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = SourceConfig(source=("text.jsonl",), heldout=0.1, clean=Cleaning(near=False), minimum_characters=8)
    text = build_corpus(config, chat_tokenizer, tmp_path / "text", name="text", downloads=tmp_path, base=tmp_path)
    workshop, corpora = Workshop(eager), {"chats": chats, "text": text}
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    parent = checkpoint_path(tmp_path / "trunk", 4)
    both = replace(setting, corpora=(*setting.corpora, ("text", text.hash)), score=("text",))
    stage = replace(
        fresh_stage(
            trunk, "adapted", "adapt", both, rate=0.02, schedule=sft_schedule(20, 2, 10), steps=20, batch=4,
            mixture=(("text", 1.0),), packed=(("text", row_index(text, ROW).hash),),
        ),
        lora=LORA,
    )  # fmt: skip
    still = replace(stage, steps=1, optimizer=replace(stage.optimizer, learning_rate=1e-30))
    before = run_stage(still, tmp_path / "still", corpora, workshop, parent=parent)
    after = run_stage(stage, tmp_path / "adapted", corpora, workshop, parent=parent)
    assert after["scores"]["text"]["bits_per_byte"] < 0.98 * before["scores"]["text"]["bits_per_byte"]
    one, two = load_model(parent)[0], load_model(checkpoint_path(tmp_path / "adapted", 20))[0]
    moved = {n for n, p in two.named_parameters() if not torch.equal(p, one.get_parameter(n))}
    assert moved == {n for n, role in two.roles.items() if role is Role.HIDDEN}


def test_it_begins_as_the_parent_and_costs_what_it_trains(trunk, setting, chats, eager):
    stage = tuned(trunk, setting, chats)
    trainer = Workshop(eager).trainer(stage)
    plain = Transformer(PLAIN, Parametrization())
    plain.init_weights(stage.seed)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(trainer.model(tokens), plain(tokens), rtol=0, atol=0)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == LORA.parameters(PLAIN)
    full = replace(stage, lora=None)
    assert stage.flops == pytest.approx(
        full.flops
        - stage.steps * stage.step_tokens * (2 * PLAIN.matrices + 2 * PLAIN.vocab * PLAIN.width - 6 * trained)
    )
    assert stage.key != full.key != replace(stage, lora=Lora(4, 8.0)).key != stage.key
    assert "lora" not in full.to_dict()


def test_the_rate_of_the_matrix_from_the_stream_falls_with_the_width_and_the_others_does_not(trunk, setting, chats):
    wide = replace(PLAIN, width=128, heads=8, kv_heads=4, ff=320)
    for parametrization in (Parametrization(), Parametrization.named("completep")):
        rules = {role: parametrization.rule(role, wide) for role in (Role.ADAPTER_DOWN, Role.ADAPTER_UP, Role.HIDDEN)}
        assert rules[Role.ADAPTER_DOWN] == rules[Role.HIDDEN]
        assert rules[Role.ADAPTER_UP].lr_multiplier == 1.0
        assert (rules[Role.ADAPTER_UP].init_mean, rules[Role.ADAPTER_UP].init_std) == (0.0, 0.0)
    model = Transformer(PLAIN, Parametrization())
    attach(model, 4, 1.0)
    assert isinstance(build_optimizer(model, Muon()), torch.optim.AdamW)
    with pytest.raises(UserError, match="expected one process for adapters, got 2 with slices of the weights"):
        check_ranks(AdamW(), 2, LORA)
