"""Sampling from a model, one token after another, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from windtunnel.base.errors import RecipeError
from windtunnel.model.transformer import KeyValueCache, Transformer


def generate(
    model: Transformer,
    ids: Sequence[int],
    *,
    max_new: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt; yields each token id as soon as it is chosen, a stop id included.

    Ends after a stop id, after ``max_new`` tokens, or where the model's positions end. The same arguments on the same numeric
    class give the same tokens. Arguments are checked at once, before the first token is asked for.

    Args:
        model: weights must be loaded.
        ids: the prompt, at least one token.
        max_new: most tokens to add.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens whose probability reaches this (arXiv 1904.09751, section 3.1).
        stop: ids at which to end.
        seed: of the draws.

    Raises:
        RecipeError: an argument is out of range, or the prompt does not fit the model's positions.
    """
    prompt, limit = list(ids), model.shape.max_positions
    if not prompt or min(prompt) < 0 or max(prompt) >= model.shape.vocab:
        raise RecipeError("prompt", f"expected token ids from 0 to {model.shape.vocab - 1}, got {prompt[:8] or 'none'}")
    if len(prompt) > limit:
        raise RecipeError(
            "prompt", f"expected at most {limit} tokens (the model's positions), got {len(prompt)}", "shorten it"
        )
    if not 0 <= temperature < float("inf"):
        raise RecipeError(
            "temperature", f"expected a number from 0 on, got {temperature}", "use 0 for the likeliest token"
        )
    if not 0 < top_p <= 1:
        raise RecipeError("top_p", f"expected a number above 0 and up to 1, got {top_p}", "use 1 for all tokens")
    length = min(len(prompt) + max(max_new, 0), limit)
    return _tokens(model, prompt, length, temperature, top_p, frozenset(stop), seed)


def _tokens(
    model: Transformer,
    prompt: list[int],
    length: int,
    temperature: float,
    top_p: float,
    stop: frozenset[int],
    seed: int,
) -> Iterator[int]:
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache, new = KeyValueCache(model, length), prompt
    for _ in range(length - len(prompt)):
        with torch.inference_mode():
            h_1TD = model.hidden(torch.tensor([new], device=device), cache=cache)
            logits_V = model.logits(h_1TD[:, -1])[0, : model.shape.vocab].float().cpu()
            token = choose(logits_V, temperature, top_p, generator)
        yield token
        if token in stop:
            return
        new = [token]


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits: the likeliest, or a draw from the tempered and truncated distribution."""
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest logit becomes 0 before the division, so that a tiny temperature cannot overflow.
    probability_V = ((logits_V - logits_V.max()) / temperature).softmax(-1)
    if top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        probability_V = torch.zeros_like(probability_V).scatter(0, order_V, sorted_V.where(before_V < top_p, 0.0))
    return int(torch.multinomial(probability_V, 1, generator=generator))
