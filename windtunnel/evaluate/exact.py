"""Exact answers: computed questions that no training question asks, answered by a chat model without sampling."""

from __future__ import annotations

from typing import Any

from windtunnel.corpus.chat import render, stop_ids
from windtunnel.corpus.exact import TASKS, questions
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate.answers import answers, stops
from windtunnel.evaluate.choice import wilson
from windtunnel.model.transformer import Transformer

_MAX_NEW = 48
"""Tokens of an answer: a right one takes at most about 20 with any vocabulary."""


def score_exact(
    model: Transformer, tokenizer: Tokenizer, template: str = "chatml", *, count: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Accuracy on held-out questions by task with 95 % Wilson intervals, over all tasks, and how many answers ended.

    Args:
        template: how turns are marked, as in the chats that the model learnt from.
        count: questions of each task; the same for every model.
    """
    asked = list(questions(count, seed, held_out=True))
    prompts = [
        render([{"role": "user", "content": q.text}], tokenizer, template, add_generation_prompt=True)[0] for q in asked
    ]
    given = answers(model, prompts, stop=stop_ids(tokenizer, template), max_new=_MAX_NEW)
    right = [q.accepts(tokenizer.decode(answer.ids)) for q, answer in zip(asked, given, strict=True)]
    tasks = {task: _share([ok for q, ok in zip(asked, right, strict=True) if q.task == task]) for task in TASKS}
    return {"tasks": tasks, "all": _share(right), "stops": stops(given)}


def _share(right: list[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "count": len(right), "low": low, "high": high}
