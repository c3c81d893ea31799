"""Answers of chat models: computed questions held out by construction, answers that end, and how far a model has moved."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from windtunnel.base.errors import DataError
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.chat import render, stop_ids
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.exact import TASKS, is_held_out, made_file, questions
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate import before_after
from windtunnel.evaluate.answers import Answer, answers, heldout_prompts, stops
from windtunnel.evaluate.divergence import divergence
from windtunnel.evaluate.exact import score_exact
from windtunnel.evaluate.preference import score_pairs
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.sample import generate
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

SHAPE = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32, max_positions=96)


def model_of(seed: int, std: float = 0.3) -> Transformer:
    model = Transformer(SHAPE, Parametrization.named("standard"))
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 9))
    return model.eval()


def test_what_is_asked_in_training_is_never_asked_in_evaluation_however_it_is_worded() -> None:
    held = [q for seed in (0, 1) for q in questions(100, seed, held_out=True)]
    taught = [q for seed in (0, 5) for q in questions(2500, seed, held_out=False)]
    assert not {q.key for q in held} & {q.key for q in taught}
    assert not {q.text for q in held} & {q.text for q in taught}
    assert {q.task for q in held} == set(TASKS)
    # Order of a sum, and of a list to sort or to count in, is wording: the key does not know it.
    sums: dict[frozenset[str], set[str]] = {}
    for q in taught:
        if q.task == "addition":
            sums.setdefault(frozenset(re.findall(r"\d+", q.text)), set()).add(q.key)
    assert all(len(keys) == 1 for keys in sums.values())
    share = sum(is_held_out(f"add {a} {b}") for a in range(1, 100) for b in range(a, 100)) / 4950
    assert share == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_right_replies_are_accepted_and_wrong_ones_are_not(task: str) -> None:
    for q in questions(200, 3, held_out=False, tasks=(task,)):
        assert q.accepts(q.right)
        assert not q.accepts(q.wrong)
        assert not q.accepts("I do not know.")
    if task == "addition":
        q = next(questions(1, 3, held_out=True, tasks=(task,)))
        a, b = (int(part) for part in q.key.split()[1:])
        assert q.answer == (a + b,)
        assert q.accepts(f"It is {a + b}")


def test_the_made_source_is_the_same_every_time_and_refuses_what_it_cannot_make() -> None:
    lines = made_file("made:exact/37").opener().read().splitlines()
    assert len(lines) == 37
    assert lines == made_file("made:exact/37").opener().read().splitlines()
    assert lines != made_file("made:exact/37/2").opener().read().splitlines()
    assert all(not is_held_out(json.loads(line)["key"]) for line in lines)
    for wrong in ("made:exact", "made:exact/0", "made:exact/9999999", "made:poems/3"):
        with pytest.raises(DataError, match="expected made:exact/COUNT with at most 1,000,000; write for example"):
            made_file(wrong)


def test_made_questions_are_a_corpus_of_chats_and_one_of_pairs(tmp_path, chat_tokenizer: Tokenizer) -> None:
    options = {"downloads": tmp_path, "base": tmp_path}
    chats = SourceConfig(source=("made:exact/300",), messages="messages", heldout=0.1, minimum_characters=8)
    built = build_corpus(chats, chat_tokenizer, tmp_path / "chats", name="chats", **options)
    assert built.stats["documents"]["kept"] > 200
    by_key = chats.model_copy(update={"heldout": 0.05, "heldout_by": "key"})
    split = build_corpus(by_key, chat_tokenizer, tmp_path / "by-key", name="by-key", **options)
    assert 3 < split.stats["documents"]["heldout"] < 40
    pairs = SourceConfig(
        source=("made:exact/300",), chosen="chosen", rejected="rejected", heldout=0.1, minimum_characters=8
    )
    built = build_corpus(pairs, chat_tokenizer, tmp_path / "pairs", name="pairs", **options)
    assert built.pairs
    prompts = heldout_prompts(built, 5)
    assert len(prompts) == 5
    held = built.heldout
    for number, prompt in enumerate(prompts):  # the better answer of each pair, up to where the assistant speaks
        begin = int(held.offsets[2 * number])
        assert held.tokens[begin : begin + len(prompt)].tolist() == prompt
        assert chat_tokenizer.decode(prompt, control=True).endswith("<|im_start|>assistant\n")


def test_answers_side_by_side_are_those_of_each_prompt_alone() -> None:
    model, draw = model_of(0), np.random.default_rng(0)
    prompts = [draw.integers(5, 320, size=n).tolist() for n in (3, 19, 3, 1, 40, 90, 96)]
    stop = {int(t) for t in draw.integers(5, 320, size=60)}
    given = answers(model, prompts, stop=stop, max_new=12)
    for prompt, answer in zip(prompts, given, strict=True):
        alone = list(generate(model, prompt, max_new=12, stop=stop))
        ended = bool(alone) and alone[-1] in stop
        assert answer == Answer(tuple(prompt), tuple(alone[: len(alone) - ended]), ended)
    assert 0 < stops(given)["ended"] < 1
    assert given[-1].ids == ()
    assert answers(model, prompts, stop=stop, max_new=12, temperature=1.0, seed=1) != given


def test_what_has_ended_is_set_aside_and_changes_no_answer(monkeypatch) -> None:
    model, draw, widths = model_of(3), np.random.default_rng(1), []
    prompts = [draw.integers(5, 320, size=int(n)).tolist() for n in draw.integers(2, 12, size=24)]
    stop = {int(t) for t in draw.integers(5, 320, size=40)}
    plain = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, new, **k: widths.append(len(new)) or plain(self, new, **k))
    given = answers(model, prompts, stop=stop, max_new=60)
    assert widths[0] == 24
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 24
    monkeypatch.undo()
    for prompt, answer in zip(prompts, given, strict=True):
        alone = list(generate(model, prompt, max_new=60, stop=stop))
        assert answer.ids == tuple(alone[: len(alone) - answer.ended])


def test_where_all_of_the_prompts_end_the_interval_begins_above_ninety_nine_percent() -> None:
    assert stops([Answer((1,), (7,), True)] * before_after.PROMPTS)["low"] > 0.99


def test_an_answer_may_take_several_rows_and_both_ways_of_decoding_are_told(
    tmp_path, chats, chat_tokenizer, monkeypatch
):
    asked = []

    def told(_, prompts, *, stop, max_new, temperature=0.0, seed=0):
        asked.append((len(prompts), max_new, temperature))
        return [Answer(tuple(p), (7,), temperature == 0) for p in prompts]

    monkeypatch.setattr(before_after, "answers", told)
    monkeypatch.setattr(before_after, "load_model", lambda _: (model_of(1), None))
    found = before_after.answering(
        model_of(0), chat_tokenizer, 48, template="chatml", corpora={"chats": str(chats.path)}, parent="", pairs=False
    )
    count = len(heldout_prompts(chats, before_after.PROMPTS))
    fewer = min(count, before_after._BEFORE)
    assert asked == [(n, 96, temperature) for temperature in (0.0, 1.0) for n in (fewer, count)]
    assert found["stops"]["chats"]["after"]["ended"] == 1
    assert found["sampled_stops"]["chats"]["after"]["ended"] == 0


def test_the_stop_rate_counts_answers_that_end_by_themselves() -> None:
    given = [Answer((1,), (7,) * 4, True)] * 99 + [Answer((1,), (7,) * 104, False)]
    found = stops(given)
    assert found["ended"] == pytest.approx(0.99)
    assert found["low"] < 0.99 < found["high"]
    assert found["tokens"] == pytest.approx(5)


def test_exact_answers_and_the_end_of_turn_are_learnt_by_a_model_that_is_told_them(chat_tokenizer, monkeypatch) -> None:
    right = {}
    for q in questions(20, 0, held_out=True):
        ids, _ = render([{"role": "user", "content": q.text}], chat_tokenizer, add_generation_prompt=True)
        right[tuple(ids)] = q
    replies = {"right": lambda q: q.right, "wrong": lambda q: q.wrong}
    for kind, reply in replies.items():

        def told(_, prompts, *, stop, max_new, reply=reply):
            assert stop == stop_ids(chat_tokenizer)
            return [Answer(tuple(p), tuple(chat_tokenizer.encode(reply(right[tuple(p)]))), True) for p in prompts]

        monkeypatch.setattr("windtunnel.evaluate.exact.answers", told)
        found = score_exact(model_of(0), chat_tokenizer, count=20)
        assert found["all"]["accuracy"] == (kind == "right")
        assert found["all"]["count"] == 80
        assert found["stops"]["ended"] == 1
        assert set(found["tasks"]) == set(TASKS)


def test_the_divergence_is_that_of_the_whole_distributions_over_the_models_own_answers() -> None:
    model, reference = model_of(0), model_of(1)
    prompts = [[5, 6, 7], [8, 9]]
    assert divergence(model, model, prompts, stop=(3,), max_new=6)["per_answer"] == pytest.approx(0, abs=1e-6)
    found = divergence(model, reference, prompts, stop=set(range(5, 40)), max_new=6, seed=4)
    expected, tokens = [], 0
    for answer in answers(model, prompts, stop=set(range(5, 40)), max_new=6, temperature=1.0, seed=4):
        total, ids = 0.0, list(answer.prompt)
        for token in (*answer.ids, *([None] if answer.ended else [])):
            with torch.no_grad():
                p, q = (torch.softmax(m(torch.tensor([ids]))[0, -1, :320].double(), -1) for m in (model, reference))
            total += float((p * (p / q).log()).sum())
            tokens += 1
            if token is not None:
                ids.append(token)
        expected.append(total)
    assert found["per_answer"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert found["per_token"] == pytest.approx(sum(expected) / tokens, rel=1e-4)
    assert found["low"] < found["per_answer"] < found["high"]
    assert found["count"] == 2
    # Its mean is that of the log-ratios of the drawn tokens, which it replaces with less noise.
    many = [[5, 6, 7]] * 200
    ratios = []
    for answer in answers(model, many, stop=(), max_new=3, temperature=1.0, seed=2):
        ids = torch.tensor([[*answer.prompt, *answer.ids]])
        with torch.no_grad():
            p, q = (m(ids)[0, 2:5, :320].log_softmax(-1) for m in (model, reference))
        drawn = torch.tensor(answer.ids)[:, None]
        ratios.append(float((p.gather(1, drawn) - q.gather(1, drawn)).sum()))
    exact = divergence(model, reference, many, stop=(), max_new=3, seed=2)["per_answer"]
    assert abs(exact - np.mean(ratios)) < 4 * np.std(ratios) / math.sqrt(len(ratios))


def test_accuracy_on_pairs_also_tells_lengths_and_log_likelihoods_of_answers(tmp_path, chat_tokenizer) -> None:
    pairs = SourceConfig(
        source=("made:exact/120",), chosen="chosen", rejected="rejected", heldout=0.3, minimum_characters=8
    )
    corpus = build_corpus(pairs, chat_tokenizer, tmp_path / "p", name="p", downloads=tmp_path, base=tmp_path)
    found = score_pairs(model_of(0), corpus)
    wide = corpus.heldout
    fits = (np.diff(wide.offsets).reshape(-1, 2) - 1 <= SHAPE.max_positions).all(1)
    assert found["left_out"] == (~fits).sum() > 0
    alone = []
    for begin, end in np.stack([wide.offsets[:-1], wide.offsets[1:]], 1)[np.repeat(fits, 2)].tolist():
        ids = torch.from_numpy(wide.tokens[begin:end].astype(np.int64))
        with torch.no_grad():
            own = model_of(0)(ids[None, :-1])[0, :, :320].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        alone.append(float(own[torch.from_numpy(wide.mask[begin + 1 : end] == 1)].mean()))
    assert found["chosen"] == pytest.approx(np.mean(alone[::2]), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(np.array(alone[::2]) > np.array(alone[1::2])))
    assert found["chosen_sum"] < found["chosen"] < 0
    lengths = np.diff(corpus.heldout.offsets)
    assert lengths.mean() > found["chosen_tokens"] > 3
    assert found["rejected_tokens"] > 3
