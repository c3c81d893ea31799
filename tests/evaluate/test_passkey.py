"""Retrieval: the key stands once, where it should, and only an answer that is right to its last token counts."""

from __future__ import annotations

import pytest
import torch

from windtunnel.base.errors import UserError
from windtunnel.corpus.tokenizer import Tokenizer, train
from windtunnel.evaluate.passkey import FILLER, TASKS, build_item, found, over_depths, score_retrieval
from windtunnel.evaluate.positions import keys_found
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([*FILLER, "The pass key is 12345. Remember it.", "What is the value of 0123?"] * 20, 300)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_stands_at_its_depth_and_the_context_has_its_length(task, depth, tokenizer):
    item = build_item(task, tokenizer, 400, depth, 3)
    assert 370 < len(item.ids) <= 400
    text = tokenizer.decode(list(item.ids))
    answer = tokenizer.decode(list(item.ids[-item.answer :])).strip()
    assert answer.isdigit()
    assert text.count(answer) == 2  # where it is hidden, and where it is asked for
    assert text.index(answer) / text.rindex("\n") == pytest.approx(depth, abs=0.12)
    assert build_item(task, tokenizer, 400, depth, 3) == item
    assert build_item(task, tokenizer, 400, depth, 4) != item


class Oracle(torch.nn.Module):
    """Knows an item and says its ids, but for one position that may be wrong."""

    def __init__(self, ids, wrong: int | None) -> None:
        super().__init__()
        self.ids, self.wrong = torch.tensor([ids[1:]]), wrong
        self.embedding = torch.nn.Embedding(1, 1)

    def hidden(self, tokens):
        says = self.ids[:, : tokens.shape[1]].clone()
        if self.wrong is not None:
            says[0, self.wrong] += 1
        return torch.nn.functional.one_hot(says, 400).float()

    def logits(self, h):
        return h


def test_an_answer_counts_only_if_every_one_of_its_tokens_is_right(tokenizer):
    item = build_item("number", tokenizer, 200, 0.5, 0)
    assert item.answer > 2
    assert found(Oracle(item.ids, None), item)
    for place in range(1, item.answer + 1):
        assert not found(Oracle(item.ids, -place), item)
    assert found(Oracle(item.ids, -item.answer - 1), item)  # what comes before the answer is not asked


def test_an_untrained_model_finds_nothing_and_what_cannot_be_asked_is_refused(tokenizer):
    model = Transformer(Shape(32, 1, 2, 2, 16, 48, tokenizer.vocab_size, 32, max_positions=128), Parametrization())
    model.init_weights(0)
    cells = score_retrieval(model, tokenizer, [100, 128], depths=(0.0, 1.0), count=2)
    assert len(cells) == 3 * 2 * 2
    assert {cell["found"] for cell in cells} == {0.0}
    assert all(cell["low"] == 0 < cell["high"] for cell in cells)
    with pytest.raises(UserError, match="128 positions, got 129"):
        score_retrieval(model, tokenizer, [129])
    with pytest.raises(UserError, match="expected at least"):
        build_item("passkey", tokenizer, 8, 0.5, 0)
    with pytest.raises(UserError, match="passkey, number, key-value"):
        build_item("poem", tokenizer, 80, 0.5, 0)


def test_depths_are_pooled_and_the_worst_is_told():
    cells = [{"task": "passkey", "length": 64, "found": share, "count": 10} for share in (1.0, 0.5)]
    (pooled,) = over_depths([*cells])
    assert (pooled["found"], pooled["count"], pooled["worst"]) == (0.75, 20, 0.5)
    assert pooled["low"] < 0.75 < pooled["high"]


def test_a_checkpoint_is_asked_up_to_its_row_and_a_fifth_as_much_at_twice_that(tokenizer):
    model = Transformer(Shape(32, 1, 2, 2, 16, 48, tokenizer.vocab_size, 32, max_positions=512), Parametrization())
    model.init_weights(0)
    cells = keys_found(model, tokenizer, 256, 3)
    counts = {cell["length"]: cell["count"] for cell in cells}
    assert max(counts) == 512
    assert {length: count for length, count in counts.items() if length >= 256} == {256: 3, 512: 1}
    assert keys_found(model, tokenizer, 256, 0) == []
