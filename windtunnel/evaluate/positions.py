"""Loss over the position in a document, and hidden keys found at many lengths: what a longer context is good for, and whether the
short one has suffered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from windtunnel.corpus.evaluation_rows import scoring_rows
from windtunnel.corpus.loader import IGNORED
from windtunnel.corpus.store import HeldOut
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate.passkey import least_length, score_retrieval
from windtunnel.model.transformer import Transformer


def with_positions(model: Transformer, positions: int) -> Transformer:
    """The same weights with tables for at least so many positions, for lengths beyond those that the shape allows."""
    if positions <= model.shape.max_positions:
        return model
    original = model.shape.rope_original or model.shape.max_positions
    stretched = model.shape.rope_scaling != "none"
    return model.placed(replace(model.shape, max_positions=positions, rope_original=original if stretched else 0))


@torch.no_grad()
def loss_by_position(
    model: Transformer, heldout: HeldOut, row: int, limit_tokens: int | None = None, first: int = 64
) -> list[dict[str, Any]]:
    """Mean loss (nats a token) of held-out tokens by their position in a document, in windows of ``row`` tokens.

    The parts are 0 … first, and from there on each twice as far as the one before. Documents longer than ``row`` begin anew
    at each window, so that a position is always the number of tokens that the model could see.
    """
    ends = [first]
    while ends[-1] < row:
        ends.append(2 * ends[-1])
    nats, counts = torch.zeros(len(ends), dtype=torch.float64), torch.zeros(len(ends), dtype=torch.float64)
    edges, device = torch.tensor(ends), model.embedding.weight.device
    for rows in scoring_rows(heldout, row, limit_tokens, batch=max(1, 4096 // row)):
        tokens_BT, targets_BT = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)
        documents_BT = torch.from_numpy(rows.documents)
        logits_BTV = model(tokens_BT.to(device), documents_BT.to(device))
        own_BT = logits_BTV.gather(2, targets_BT.clamp(min=0)[..., None].to(device))[..., 0]
        loss_BT = (logits_BTV.logsumexp(-1) - own_BT).double().cpu()
        place_BT = torch.arange(row)[None] - torch.searchsorted(documents_BT.contiguous(), documents_BT.contiguous())
        scored_BT = targets_BT != IGNORED
        part = torch.bucketize(place_BT[scored_BT], edges, right=True)
        nats.index_add_(0, part, loss_BT[scored_BT])
        counts += torch.bincount(part, minlength=len(ends))
    starts = [0, *ends[:-1]]
    return [
        {"from": start, "to": min(end, row), "loss": float(total / count), "tokens": int(count)}
        for start, end, total, count in zip(starts, ends, nats, counts, strict=True)
        if count and math.isfinite(total)
    ]


def keys_found(model: Transformer, tokenizer: Tokenizer, row: int, items: int) -> list[dict[str, Any]]:
    """Hidden keys found at lengths up to the trained row; at twice that, which takes longest, a fifth as many are asked for."""
    least, found = least_length(tokenizer), []
    for lengths, count in (((row // 8, row // 4, row // 2, row), items), ((2 * row,), -(-items // 5))):
        long_enough = [length for length in lengths if length >= least]
        if count and long_enough:
            found += score_retrieval(with_positions(model, long_enough[-1]), tokenizer, long_enough, count=count)
    return found
