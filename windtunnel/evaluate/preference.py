"""Held-out preference accuracy: how often a model finds the better of two answers likelier, token for token."""

from __future__ import annotations

from typing import Any

import torch

from windtunnel.corpus.loader import empty_rows, fill_row
from windtunnel.corpus.packing import pack_pairs
from windtunnel.corpus.store import Corpus, TokenStream
from windtunnel.evaluate.choice import wilson
from windtunnel.model.transformer import Transformer
from windtunnel.train.objectives import PairwisePreference
from windtunnel.train.preference import Preference

_ROWS = 8


@torch.no_grad()
def score_pairs(model: Transformer, corpus: Corpus, row: int) -> dict[str, Any]:
    """Share of held-out pairs whose better answer has the higher log-likelihood per token, ties half; 95 % Wilson interval.

    ``chosen`` and ``rejected`` are mean log-likelihoods in nats per token, ``chosen_sum`` and ``rejected_sum`` in nats per
    answer; ``chosen_tokens`` and ``rejected_tokens`` are mean lengths. Pairs that do not fit into a row do not count.
    """
    stream = TokenStream(corpus.heldout.tokens, corpus.heldout.offsets, corpus.heldout.mask)
    index, objective = pack_pairs(stream, row), PairwisePreference(Preference())
    device = model.embedding.weight.device
    means: list[torch.Tensor] = []
    totals = torch.zeros(4, dtype=torch.float64)
    for begin in range(0, index.rows, _ROWS):
        rows = empty_rows(min(_ROWS, index.rows - begin), row)
        for at in range(len(rows)):
            fill_row(rows, at, stream, index.of(begin + at))
        batch = [torch.from_numpy(part).to(device) for part in (rows.inputs, rows.targets, rows.documents)]
        found, count = objective.log_likelihoods(model, *batch)
        means.append((found / count.clamp(min=1)).double().cpu())
        totals += torch.cat([found.double().sum(0), count.double().sum(0)]).cpu()
    names = ("chosen_sum", "rejected_sum", "chosen_tokens", "rejected_tokens")
    if not means:
        empty = {"accuracy": 0.5, "count": 0, "low": 0.0, "high": 1.0, "chosen": 0.0, "rejected": 0.0}
        return {**empty, **dict.fromkeys(names, 0.0)}
    mean = torch.cat(means)
    right = float((mean[:, 0] > mean[:, 1]).sum()) + 0.5 * float((mean[:, 0] == mean[:, 1]).sum())
    low, high = wilson(right, len(mean))
    chosen, rejected = mean.mean(0).tolist()
    return {
        "accuracy": right / len(mean), "count": len(mean), "low": low, "high": high, "chosen": chosen, "rejected": rejected,
        **dict(zip(names, (totals / len(mean)).tolist(), strict=True)),
    }  # fmt: skip
