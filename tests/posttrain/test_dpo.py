"""Preference learning: loss, rewards and gradients as trl computes them, a reference computed once, the same loop."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from windtunnel.base.errors import DataError
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.packing import pairs_in, row_index
from windtunnel.export.folding import llama_name
from windtunnel.model.adapters import attach, set_aside
from windtunnel.model.chunked_size import is_chunked
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.posttrain.dpo import cosine, on_pairs
from windtunnel.posttrain.sft import fresh_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train import reference
from windtunnel.train.checkpoint import load_model
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.lora import Lora
from windtunnel.train.memory import micro_rows, step_memory
from windtunnel.train.metrics import read_metrics
from windtunnel.train.objectives import PairwisePreference
from windtunnel.train.preference import Preference
from windtunnel.train.stage import AdamW, Stage
from windtunnel.train.step import make_compute, train_step

ROW = 256
PLAIN = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)


def records() -> list[dict]:
    return [
        {"prompt": f"What is {i} plus {i % 9}?", "chosen": f"It is {i + i % 9}.", "rejected": f"I think that it is {i + 1 + i % 7}, or not."}
        for i in range(60)
    ]  # fmt: skip


def build(folder, tokenizer, lines, **settings):
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = {
        "heldout": 0.2,
        "clean": {"near": False},
        "minimum_characters": 8,
        "chosen": "chosen",
        "rejected": "rejected",
        **settings,
    }
    config = SourceConfig(source=("pairs.jsonl",), **settings)
    return build_corpus(config, tokenizer, folder / "pairs", name="pairs", downloads=folder, base=folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, chat_tokenizer):
    return build(tmp_path_factory.mktemp("pairs"), chat_tokenizer, records())


@pytest.fixture
def parent(pairs) -> Stage:
    setting = Setting(
        corpora=(("pairs", pairs.hash),), mixture=(("pairs", 1.0),), row=ROW, batch=4, warmup=1, seed=5,
        parametrization=Parametrization.named("standard"), optimizer=AdamW(learning_rate=0.003), score=("pairs",), score_tokens=100,
    )  # fmt: skip
    return trunk_stage("trunk", replace(PLAIN, tied=False), setting, 2)


def dpo(parent: Stage, pairs, preference: Preference = Preference(), steps: int = 6, **changes) -> Stage:
    setting = Setting(parent.corpora, (), ROW, 4, 1, 5, parent.parametrization, parent.optimizer, ())
    packed = (("pairs", row_index(pairs, ROW).hash),)
    stage = fresh_stage(
        parent, "dpo", "dpo", setting, rate=0.003, schedule=cosine(steps, 1), steps=steps, batch=4, mixture=(("pairs", 1.0),), packed=packed,
    )  # fmt: skip
    return replace(on_pairs(stage, preference), **changes)


def compared(model, rows, preference, values):
    """Our terms as means and our gradients."""
    objective = PairwisePreference(preference)
    rows = replace(rows, values=values)
    counts = objective.counts(rows)
    scale = torch.tensor(np.array(objective.weights) / counts, dtype=torch.float32)
    batch = [torch.from_numpy(part) for part in (rows.inputs, rows.targets, rows.documents)]
    extra = [torch.from_numpy(values)] if values is not None else []
    model.zero_grad()
    loss, sums = make_compute(objective, compiled=False)(model, *batch, *extra, scale)
    loss.backward()
    return dict(zip(objective.names, (sums / torch.tensor(counts)).tolist(), strict=True)), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def reference_of(model, rows) -> np.ndarray:
    batch = [torch.from_numpy(part) for part in (rows.inputs, rows.targets, rows.documents)]
    with torch.no_grad():
        return PairwisePreference(Preference()).log_likelihoods(model, *batch)[0].flatten(1).numpy()


def examples_of(rows) -> list[dict]:
    """The pairs of our rows as trl's collator wants them."""
    out = []
    for inputs, targets, documents in zip(rows.inputs, rows.targets, rows.documents, strict=True):
        answers = []
        for number in np.unique(documents[targets != IGNORED]).tolist():
            ids, labels = inputs[documents == number], targets[documents == number]
            first, last = np.flatnonzero(labels != IGNORED)[[0, -1]]
            answers.append((ids[: first + 1].tolist(), labels[first : last + 1].tolist()))
        for better, worse in zip(answers[::2], answers[1::2], strict=True):
            assert better[0] == worse[0]  # the question
            out.append({"prompt_ids": better[0], "chosen_ids": better[1], "rejected_ids": worse[1]})
    assert len(out) > len(rows)  # several pairs share a row
    return out


@pytest.fixture
def trl_trainer(trainer_arguments, plain_tokenizer):
    """A trainer of trl for one of its losses."""

    def make(loss: str, beta: float, **models):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            args=DPOConfig(**trainer_arguments, beta=beta, loss_type=loss), processing_class=plain_tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": "a", "rejected": "b"}]), **models,
        )  # fmt: skip

    return make


def asked(trainer, data: list[dict]) -> tuple[float, dict]:
    """The loss of a trainer of trl and what it records; its model's gradients are those of this loss."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(trainer.data_collator(data)))
    loss.backward()
    return loss.item(), {name: series[-1] for name, series in trainer._metrics["train"].items()}


REWARDS = {"margin": "margins", "chosen_reward": "chosen", "rejected_reward": "rejected", "accuracy": "accuracies"}
"""Our terms, and what trl calls them."""


def test_loss_rewards_margins_and_gradients_are_those_of_trl(parent, pairs, twin, trl_trainer):
    rows = Loader(dpo(parent, pairs).plan, {"pairs": pairs}).rows(0, 5)
    model, llama = twin(0)
    frozen, frozen_llama = twin(7)
    values = reference_of(frozen, rows)
    examples = examples_of(rows)
    swapped = [{**e, "chosen_ids": e["rejected_ids"], "rejected_ids": e["chosen_ids"]} for e in examples]

    def theirs(kind: str, beta: float, data):
        loss, metrics = asked(trl_trainer(kind, beta, model=llama, ref_model=frozen_llama), data)
        return loss, metrics, {n: p.grad.clone() for n, p in llama.named_parameters()}

    for kind, loss_kind, beta in (("dpo", "sigmoid", 0.3), ("dpo-normalised", "sigmoid_norm", 2.0)):
        terms, gradients = compared(model, rows, Preference(kind, beta), values)
        loss, metrics, wanted = theirs(loss_kind, beta, examples)
        assert terms["loss"] == pytest.approx(loss, abs=1e-5)
        for name, value in gradients.items():
            torch.testing.assert_close(value, wanted[llama_name(name)], rtol=0, atol=1e-5)
        if kind == "dpo":
            for ours, name in REWARDS.items():
                assert terms[ours] == pytest.approx(metrics[f"rewards/{name}"], abs=1e-5)
            # Smoothing mixes the loss of the pairs with that of the same pairs the other way round.
            other, _, other_gradients = theirs(loss_kind, beta, swapped)
            smoothed, smoothed_gradients = compared(model, rows, Preference(kind, beta, smoothing=0.2), values)
            assert smoothed["loss"] == pytest.approx(0.8 * loss + 0.2 * other, abs=1e-5)
            for name, value in smoothed_gradients.items():
                mixed = 0.8 * wanted[llama_name(name)] + 0.2 * other_gradients[llama_name(name)]
                torch.testing.assert_close(value, mixed, rtol=0, atol=1e-5)


def test_with_adapters_the_reference_is_the_model_without_them_as_trl_and_peft_have_it(
    parent, pairs, twin, trl_trainer, lora_config, share_adapters
):
    rows, lora = Loader(dpo(parent, pairs).plan, {"pairs": pairs}).rows(0, 5), Lora(4, 12.0)
    model, llama = twin(0)
    plain = reference_of(model, rows)
    attach(model, lora.rank, lora.scale)
    trainer = trl_trainer("sigmoid", 0.1, model=llama, peft_config=lora_config(lora))
    wanted = share_adapters(model, trainer.model)
    assert np.abs(reference_of(model, rows) - plain).max() > 0.1  # the adapters do something
    with set_aside(model):
        values = reference_of(model, rows)
    np.testing.assert_array_equal(values, plain)
    terms, gradients = compared(model, rows, Preference("dpo", 0.1), values)
    loss, metrics = asked(trainer, examples_of(rows))
    assert terms["loss"] == pytest.approx(loss, abs=1e-5)
    for ours, name in REWARDS.items():
        assert terms[ours] == pytest.approx(metrics[f"rewards/{name}"], abs=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, value in gradients.items():
        other = wanted[name].grad
        assert (value - other).norm() <= 1e-5 * other.norm()
        assert other.norm() > 1e-2


def test_a_run_with_adapters_moves_them_alone_and_begins_where_both_rewards_are_zero(tmp_path, eager, parent, pairs):
    workshop, corpora = Workshop(eager), {"pairs": pairs}
    run_stage(parent, tmp_path / "trunk", corpora, workshop)
    source = checkpoint_path(tmp_path / "trunk", 2)
    run_stage(dpo(parent, pairs, lora=Lora(4)), tmp_path / "dpo", corpora, workshop, parent=source)
    metrics = list(read_metrics(tmp_path / "dpo"))
    assert metrics[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[-1][1]["margin"] > 1e-3
    before, after = (load_model(path)[0] for path in (source, checkpoint_path(tmp_path / "dpo", 6)))
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {n for n, role in after.roles.items() if role is Role.HIDDEN}


def test_simpo_is_its_formula_and_needs_no_reference(parent, pairs, twin):
    rows = Loader(dpo(parent, pairs).plan, {"pairs": pairs}).rows(0, 5)
    model, _ = twin(0)
    terms, _ = compared(model, rows, Preference("simpo", beta=2.0, margin=0.8), None)
    reward = 2.0 * per_token(reference_of(model, rows), rows)
    expected = np.mean([math.log1p(math.exp(-(a - b - 0.8))) for a, b in reward])
    assert terms["loss"] == pytest.approx(expected, abs=1e-5)
    assert "drift" not in terms


def per_token(found: np.ndarray, rows) -> np.ndarray:
    """Log-likelihoods of a row's answers divided by their tokens, float [pairs, 2]."""
    counts = [((rows.documents == n) & (rows.targets != IGNORED)).sum(1) for n in range(found.shape[1])]
    lengths = np.stack(counts, 1).reshape(-1, 2)
    return (found.reshape(-1, 2) / np.maximum(lengths, 1))[lengths[:, 0] > 0]


def test_rewards_of_the_normalised_loss_are_those_of_a_token(parent, pairs, twin):
    rows = Loader(dpo(parent, pairs).plan, {"pairs": pairs}).rows(0, 5)
    model, frozen = twin(0)[0], twin(7)[0]
    values = reference_of(frozen, rows)
    terms, _ = compared(model, rows, Preference("dpo-normalised", 2.0), values)
    reward = 2.0 * per_token(reference_of(model, rows) - values, rows)
    wanted = {"chosen_reward": reward[:, 0], "rejected_reward": reward[:, 1], "margin": reward[:, 0] - reward[:, 1],
              "accuracy": reward[:, 0] > reward[:, 1]}  # fmt: skip
    for name, each in wanted.items():
        assert terms[name] == pytest.approx(float(each.mean()), abs=1e-5)


def test_loss_rewards_and_gradients_of_simpo_are_those_of_trl(parent, pairs, twin):
    cpo = pytest.importorskip("trl.experimental.cpo")
    rows = Loader(dpo(parent, pairs).plan, {"pairs": pairs}).rows(0, 3)
    model, llama = twin(0)
    trainer, beta, margin = object.__new__(cpo.CPOTrainer), 2.0, 0.8
    gather = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer.__dict__ |= {
        "loss_type": "simpo", "beta": beta, "simpo_gamma": margin, "label_smoothing": 0.1, "alpha": 0.0, "cpo_alpha": 0.0,
        "is_encoder_decoder": False, "pad_token_id": 0, "aux_loss_enabled": False, "accelerator": gather,
    }  # fmt: skip
    data: dict[str, torch.Tensor] = {}
    for which in ("chosen", "rejected"):
        ids = [torch.tensor([*e["prompt_ids"], *e[f"{which}_ids"]]) for e in examples_of(rows)]
        labels = [torch.tensor([*[-100] * len(e["prompt_ids"]), *e[f"{which}_ids"]]) for e in examples_of(rows)]
        for name, parts, padding in (("input_ids", ids, 0), ("labels", labels, -100),
                                     ("attention_mask", [torch.ones_like(part) for part in ids], 0)):  # fmt: skip
            data[f"{which}_{name}"] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)
    llama.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(llama, data)
    loss.backward()
    terms, gradients = compared(model, rows, Preference("simpo", beta, 0.1, margin), None)
    assert terms["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for ours, name in REWARDS.items():
        assert terms[ours] == pytest.approx(metrics[f"rewards/{name}"], abs=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(value, dict(llama.named_parameters())[llama_name(name)].grad, rtol=0, atol=1e-5)


def test_pairs_are_counted_and_a_batch_may_be_cut_anywhere(eager, parent, pairs):
    stage, losses = dpo(parent, pairs), []
    values = np.full((row_index(pairs, ROW).rows, 2 * pairs_in(ROW)), -9.0, np.float32)
    loader = Loader(stage.plan, {"pairs": pairs}, {"pairs": values})
    rows = loader.rows(0, 7)
    assert PairwisePreference(Preference()).counts(rows)[0] == sum(len(np.unique(d[t != IGNORED])) for d, t in
                                                                  zip(rows.documents, rows.targets, strict=True)) / 2  # fmt: skip
    for micro in (7, 1, 3):
        trainer = Workshop(eager).trainer(stage)
        trainer.micro = micro
        losses.append([train_step(trainer, loader.rows(7 * i, 7), 0.003).terms["loss"] for i in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_the_reference_is_computed_once_kept_and_computed_again_where_it_does_not_match(
    tmp_path, eager, parent, pairs, monkeypatch
):
    workshop, corpora = Workshop(eager), {"pairs": pairs}
    run_stage(replace(parent, masking="document"), tmp_path / "trunk", corpora, workshop)
    source, stage = checkpoint_path(tmp_path / "trunk", 2), dpo(parent, pairs, score=("pairs",), score_tokens=100)
    calls: list[int] = []
    real = reference._scored
    monkeypatch.setattr(reference, "_scored", lambda *a: (calls.append(1), real(*a))[1])
    whole = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=source)
    metrics = list(read_metrics(tmp_path / "whole"))
    first = metrics[0][1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # nothing has moved yet: both rewards are 0
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1][1]["margin"] > 0
    assert whole["scores"]["pairs"]["bits_per_byte"] > 0  # scored as text, in nats over tokens
    run_stage(replace(stage, steps=3), tmp_path / "cut", corpora, workshop, parent=source)
    assert len(calls) == 2
    stored = tmp_path / "cut" / "reference" / "values.safetensors"
    content = stored.read_bytes()
    stored.write_bytes(content[:-4] + b"\x07\x07\x07\x07")
    run_stage(stage, tmp_path / "cut", corpora, workshop, parent=source)
    assert len(calls) == 3
    assert stored.read_bytes() == content
    assert list(read_metrics(tmp_path / "cut")) == metrics
    run_stage(stage, tmp_path / "cut", corpora, workshop, parent=source)
    assert len(calls) == 3


@pytest.mark.parametrize("lora", [None, Lora(4, 12.0)], ids=["weights", "adapters"])
def test_a_live_reference_gives_the_numbers_of_the_precomputed_one_and_a_killed_run_goes_on_bit_for_bit(
    tmp_path, eager, parent, pairs, lora
):
    workshop, corpora = Workshop(eager), {"pairs": pairs}
    run_stage(parent, tmp_path / "trunk", corpora, workshop)
    source = checkpoint_path(tmp_path / "trunk", 2)
    stored = dpo(parent, pairs, lora=lora)
    live = dpo(parent, pairs, Preference(reference="live"), lora=lora)
    for name, stage in (("stored", stored), ("live", live)):
        run_stage(stage, tmp_path / name, corpora, workshop, parent=source)
    assert (tmp_path / "stored" / "reference").exists()
    assert not (tmp_path / "live" / "reference").exists()
    metrics = [list(read_metrics(tmp_path / name)) for name in ("stored", "live")]
    assert len(metrics[0]) == len(metrics[1]) == 6
    assert metrics[1][-1][1]["margin"] > 1e-3
    for (step, wanted), (same, found) in zip(*metrics, strict=True):
        assert step == same
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)  # terms and the gradient's norm
    weights = [load_model(checkpoint_path(tmp_path / name, 6))[0].state_dict() for name in ("stored", "live")]
    for name, wanted in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted, rtol=0, atol=1e-6)
    run_stage(replace(live, steps=3), tmp_path / "cut", corpora, workshop, parent=source)
    run_stage(live, tmp_path / "cut", corpora, workshop, parent=source)
    assert list(read_metrics(tmp_path / "cut")) == metrics[1]
    files = [sorted(checkpoint_path(tmp_path / name, 6).glob("*.safetensors")) for name in ("cut", "live")]
    assert len(files[0]) == len(files[1]) == 2 + (lora is not None)
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.slow
def test_two_processes_with_slices_have_the_losses_of_one_with_a_live_reference_and_logits_in_chunks(
    tmp_path, eager, parent, pairs
):
    large = replace(parent, shape=replace(parent.shape, vocab=16_448))  # 8 rows of 128 are more than 2^24 logits
    workshop, corpora = Workshop(eager), {"pairs": pairs}
    run_stage(large, tmp_path / "trunk", corpora, workshop)
    source = checkpoint_path(tmp_path / "trunk", 2)
    stage = dpo(large, pairs, Preference(reference="live"), steps=4, batch=15)
    assert is_chunked(micro_rows(stage, world=2) * ROW, stage.shape.padded_vocab)
    run_stage(stage, tmp_path / "one", corpora, workshop, parent=source)
    message = {
        "stage": stage.to_dict(),
        "run": str(tmp_path / "two"),
        "corpora": {"pairs": str(pairs.path)},
        "parent": str(source),
    }
    (tmp_path / "job.json").write_text(json.dumps(message), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "windtunnel.tunnel.worker",
               "--eager", "--devices", "cpu", "--threads", "1", "--job", str(tmp_path / "job.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (list(read_metrics(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)


def test_a_live_reference_is_a_second_model_in_memory_unless_adapters_stand_beside_it(parent, pairs):
    stored, live = dpo(parent, pairs), dpo(parent, pairs, Preference(reference="live"))
    more = step_memory(live).tensors - step_memory(stored).tensors
    assert more == step_memory(live).reference == step_memory(live).weights
    assert step_memory(replace(live, lora=Lora(4))).reference == 0
    assert step_memory(dpo(parent, pairs, Preference("simpo", reference="live"))).reference == 0
    assert "reference" not in stored.to_dict()["preference"]  # keys stay what they were


def test_keys_tell_preferences_apart_and_stages_read_back(parent, pairs):
    stage = dpo(parent, pairs)
    assert Stage.from_dict(stage.to_dict()) == stage
    assert "preference" not in parent.to_dict()
    others = [Preference(beta=0.2), Preference(smoothing=0.1), Preference("simpo"), Preference("dpo-normalised")]
    others.append(Preference(reference="live"))
    assert len({stage.key, *(dpo(parent, pairs, other).key for other in others)}) == 6
    live = dpo(parent, pairs, others[-1])
    assert Stage.from_dict(live.to_dict()) == live


def test_a_pair_is_two_documents_scored_on_the_last_answer_and_questions_lie_on_one_side(tmp_path, chat_tokenizer):
    lines = [{"prompt": [{"role": "user", "content": f"q {i % 20} ?"}, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "and?"}],
              "chosen": [{"role": "assistant", "content": f"good {i}"}], "rejected": f"bad {i}"} for i in range(60)]  # fmt: skip
    corpus = build(tmp_path, chat_tokenizer, lines, heldout=0.3, heldout_tokens=200)
    sides = []
    for tokens, offsets, mask in (
        (corpus.train.tokens, corpus.train.documents, corpus.train.mask),
        (corpus.heldout.tokens, corpus.heldout.offsets, corpus.heldout.mask),
    ):
        assert (len(offsets) - 1) % 2 == 0
        questions = set()
        for number, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            ids = tokens[begin:end].astype(int)
            scored = chat_tokenizer.decode(ids[mask[begin:end] == 1].tolist(), control=True)
            assert scored.startswith(("good", "bad")[number % 2])
            assert scored.endswith("<|im_end|>")
            questions.add(chat_tokenizer.decode(ids.tolist()).split("?")[0])
        sides.append(questions)
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": "It is 7."}, "expected two different answers, found the same one twice"),
        ({"rejected": " It is 7. "}, "expected two different answers"), ({"rejected": ""}, "expected text in the assistant turn"),
        ({"chosen": 3}, "expected text or turns in the field 'chosen', found a int"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "expected the role system or user, got assistant"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "expected the role assistant, got user"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_one_line_with_its_place(tmp_path, chat_tokenizer, change, words):
    lines = [*records()[:3], {"prompt": "3 + 4?", "chosen": "It is 7.", "rejected": "It is 8.", **change}]
    with pytest.raises(DataError) as caught:
        build(tmp_path, chat_tokenizer, lines)
    assert words in str(caught.value)
    assert "pairs.jsonl line 4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_that_are_not_named_are_recognised_with_the_way_out_and_too_long_ones_are_refused(
    tmp_path, chat_tokenizer
):
    with pytest.raises(DataError, match='these are pairs of answers: set chosen = "chosen" and rejected = "rejected"'):
        build(tmp_path, chat_tokenizer, records(), chosen=None, rejected=None)
    corpus = build(tmp_path, chat_tokenizer, records())
    with pytest.raises(
        DataError, match="corpus.pairs: expected a pair of answers within rows of 8 tokens, found none; raise model.row"
    ):
        row_index(corpus, 8)
