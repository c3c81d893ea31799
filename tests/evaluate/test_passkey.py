"""Retrieval: the key stands once, where it should, and only an answer that is right to its last token counts."""

from __future__ import annotations

import pytest
import torch

from windtunnel.base.errors import UserError
from windtunnel.corpus.tokenizer import Tokenizer, train
from windtunnel.evaluate.passkey import FILLER, TASKS, build_item, found, score_retrieval
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
