"""Retrieval from long contexts: a key hidden at a depth of a text of filler, and asked for at its end.

Three tasks after InfiniteBench (arXiv 2402.13718): ``passkey``, five digits; ``number``, ten digits; ``key-value``, the value
of one key among many pairs, where the filler looks like what is asked for. An item counts if the likeliest token is the right
one at every position of the answer, which is what greedy decoding needs. Keys are drawn from a seed: the items of a length and
depth are always the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from windtunnel.base.errors import UserError
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate.choice import wilson
from windtunnel.model.transformer import Transformer

TASKS = ("passkey", "number", "key-value")
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class Item:
    """Token ids of a whole context with its question and answer; the last ``answer`` ids are the answer."""

    ids: tuple[int, ...]
    answer: int


def build_item(
    task: str, tokenizer: Tokenizer, length: int, depth: float, seed: int, filler: Sequence[str] = FILLER
) -> Item:
    """A context of at most ``length`` tokens, as near to it as whole sentences allow, its key at a share ``depth`` of the filler.

    Raises:
        UserError: an unknown task, or a length that does not hold even the key and its question.
    """
    if task not in TASKS:
        raise UserError("task", f"expected one of {', '.join(TASKS)}, got {task!r}")
    draw = random.Random(f"{task}:{length}:{depth}:{seed}")
    needle, question, answer = _needle(task, draw)
    fixed = [tokenizer.encode(part) for part in (needle, question, answer)]
    room = length - 1 - sum(map(len, fixed))
    if room < 0:
        raise UserError("length", f"expected at least {length - room} tokens for {task}, got {length}", "ask for more")
    sentences: list[list[int]] = []
    while True:
        text = _pair(draw)[0] if task == "key-value" else " " + filler[len(sentences) % len(filler)]
        ids = tokenizer.encode(text)
        room -= len(ids)
        if room < 0:
            break
        sentences.append(ids)
    place = round(depth * len(sentences))
    parts = [*sentences[:place], fixed[0], *sentences[place:], fixed[1], fixed[2]]
    return Item((tokenizer.bos_id, *(i for part in parts for i in part)), len(fixed[2]))


def least_length(tokenizer: Tokenizer, tasks: Sequence[str] = TASKS) -> int:
    """Tokens that hold key, question and answer of any item: the most of a hundred draws, and ten for digits that split worse."""
    draws = (_needle(task, random.Random(f"{task}:{seed}")) for task in tasks for seed in range(100))
    return 1 + 10 + max(sum(len(tokenizer.encode(part)) for part in parts) for parts in draws)


def _needle(task: str, draw: random.Random) -> tuple[str, str, str]:
    """What is hidden, what is asked, and what has to come."""
    if task == "key-value":
        text, key, value = _pair(draw)
        return text, f"\nThe value of {key} is", f" {value}"
    digits = "".join(str(draw.randrange(10)) for _ in range(5 if task == "passkey" else 10))
    words = "pass key" if task == "passkey" else "sequence of digits"
    return f" The {words} is {digits}. Remember it.", f"\nWhat is the {words}? The {words} is", f" {digits}"


def _pair(draw: random.Random) -> tuple[str, str, str]:
    key, value = (f"{draw.randrange(10**4):04d}" for _ in range(2))
    return f" {key}: {value},", key, value


@torch.no_grad()
def found(model: Transformer, item: Item) -> bool:
    """Whether greedy decoding would give the whole answer."""
    tokens_BT = torch.tensor([item.ids[:-1]], device=model.embedding.weight.device)
    h_BTD = model.hidden(tokens_BT)[:, -item.answer :]
    return model.logits(h_BTD).argmax(-1)[0].tolist() == list(item.ids[-item.answer :])


def over_depths(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The share of items found for each task and length, all depths together, with its 95 % Wilson interval."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["length"]), []).append(cell)
    out = []
    for (task, length), own in groups.items():
        count = sum(cell["count"] for cell in own)
        right = sum(cell["found"] * cell["count"] for cell in own)
        low, high = wilson(right, count)
        out.append(
            {"task": task, "length": length, "found": right / count, "count": count, "low": low, "high": high,
             "worst": min(cell["found"] for cell in own)}
        )  # fmt: skip
    return out


def score_retrieval(
    model: Transformer, tokenizer: Tokenizer, lengths: Sequence[int], *, tasks: Sequence[str] = TASKS,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), count: int = 10, seed: int = 0, filler: Sequence[str] = FILLER,
) -> list[dict[str, Any]]:  # fmt: skip
    """The share of items found for each task, length and depth, with its 95 % Wilson interval: the cells of a heat map.

    Raises:
        UserError: a length beyond the model's positions, or too short for a task.
    """
    if too_long := [length for length in lengths if length > model.shape.max_positions]:
        raise UserError(
            "length", f"expected at most the model's {model.shape.max_positions} positions, got {too_long[0]}"
        )
    cells = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                items = [build_item(task, tokenizer, length, depth, seed + i, filler) for i in range(count)]
                right = sum(found(model, item) for item in items)
                low, high = wilson(right, count)
                cells.append(
                    {"task": task, "length": length, "depth": depth, "found": right / count, "count": count, "low": low,
                     "high": high}
                )  # fmt: skip
    return cells
