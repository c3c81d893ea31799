"""Answers to many prompts at once, and whether they end by themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from windtunnel.corpus.store import Corpus
from windtunnel.evaluate.choice import wilson
from windtunnel.model.transformer import KeyValueCache, Transformer

_FEWEST, _MOST = 8, 128
_NUMBERS = 1 << 26
"""Keys and values that are held for prompts side by side, unless so few prompts are."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt: its ids without the stop, and whether a stop ended it."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool


def answers(
    model: Transformer, prompts: Sequence[Sequence[int]], *, stop: Collection[int], max_new: int, temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:  # fmt: skip
    """One answer to each prompt, in their order: the likeliest token each time, or draws at a temperature above 0.

    Prompts of similar length are decoded side by side: a row whose prompt goes on is given its next token instead of choosing
    one, so that no padding is ever seen and the answers are those of one prompt alone (up to rounding). What has ended is set
    aside, so that long answers cost only themselves. Prompts that leave no position free get an empty answer that did not end.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    generator = torch.Generator().manual_seed(seed)
    side_by_side = _side_by_side(model, max(map(len, prompts), default=0) + max_new)
    for begin in range(0, len(order), side_by_side):
        members = order[begin : begin + side_by_side]
        group = _decode(model, [list(prompts[i]) for i in members], frozenset(stop), max_new, temperature, generator)
        found |= dict(zip(members, group, strict=True))
    return [found[i] for i in range(len(prompts))]


def _side_by_side(model: Transformer, length: int) -> int:
    """How many prompts are decoded together: many short ones, few long ones."""
    shape = model.shape
    each = 2 * shape.layers * shape.kv_heads * shape.head_dim * min(shape.max_positions, length)
    return max(_FEWEST, min(_MOST, _NUMBERS // max(1, each)))


@torch.inference_mode()
def _decode(
    model: Transformer, prompts: list[list[int]], stop: frozenset[int], max_new: int, temperature: float,
    generator: torch.Generator,
) -> list[Answer]:  # fmt: skip
    limit = min(model.shape.max_positions, max(map(len, prompts)) + max_new)
    rows, ended = [list(prompt) for prompt in prompts], [len(prompt) >= limit for prompt in prompts]
    stopped = [False] * len(prompts)
    device = model.embedding.weight.device
    cache = KeyValueCache(model, limit, len(prompts))
    at, held = min(len(prompt) for prompt in prompts), list(range(len(prompts)))
    new = torch.tensor([row[:at] for row in rows], device=device)
    while at < limit and not all(ended):
        h_BTD = model.hidden(new, cache=cache)
        logits_BV = model.logits(h_BTD[:, -1])[:, : model.shape.vocab].float().cpu()
        for i, chosen in zip(held, _choose(logits_BV, temperature, generator), strict=True):
            if len(rows[i]) > at or ended[i]:
                continue  # its prompt goes on, or it has ended
            rows[i].append(chosen)
            stopped[i] = chosen in stop
            ended[i] = stopped[i] or len(rows[i]) - len(prompts[i]) >= max_new
        at += 1
        going = [place for place, i in enumerate(held) if not ended[i]]
        if 0 < len(going) <= len(held) / 2:
            cache.keep(torch.tensor(going, device=device))
            held = [held[place] for place in going]
        new = torch.tensor([[rows[i][at - 1] if len(rows[i]) >= at else 0] for i in held], device=device)
    return [
        Answer(tuple(prompt), tuple(row[len(prompt) : len(row) - over]), over)
        for prompt, row, over in zip(prompts, rows, stopped, strict=True)
    ]


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()


def heldout_prompts(corpus: Corpus, most: int) -> list[list[int]]:
    """The ids before the first scored token of the first held-out chats; of a pair once. Empty where all tokens are scored."""
    held, out = corpus.heldout, []
    if held.mask is None or corpus.config.get("loss") == "all":
        return []
    for document in range(0, len(held.offsets) - 1, 2 if corpus.pairs else 1):
        begin, end = int(held.offsets[document]), int(held.offsets[document + 1])
        scored = np.flatnonzero(held.mask[begin:end])
        if len(scored) and len(out) < most:
            out.append(held.tokens[begin : begin + int(scored[0])].astype(int).tolist())
    return out


def stops(given: Sequence[Answer]) -> dict[str, Any]:
    """Share of answers that ended by themselves, with its 95 % Wilson interval, and their mean length in tokens."""
    ended = sum(answer.ended for answer in given)
    low, high = wilson(ended, len(given)) if given else (0.0, 1.0)
    tokens = sum(len(answer.ids) for answer in given) / max(1, len(given))
    return {"ended": ended / max(1, len(given)), "count": len(given), "low": low, "high": high, "tokens": tokens}
