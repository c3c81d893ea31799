"""Held-out preference accuracy: how often a model finds the better of two answers likelier, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from windtunnel.corpus.loader import empty_rows, fill_row
from windtunnel.corpus.store import Corpus, TokenStream
from windtunnel.evaluate.choice import wilson
from windtunnel.model.transformer import Transformer
from windtunnel.train.objectives import PairwisePreference
from windtunnel.train.preference import Preference

_TOKENS = 8192


@torch.no_grad()
def score_pairs(model: Transformer, corpus: Corpus) -> dict[str, Any]:
    """Share of held-out pairs whose better answer has the higher log-likelihood per token, ties half; 95 % Wilson interval.

    ``chosen`` and ``rejected`` are mean log-likelihoods in nats per token, ``chosen_sum`` and ``rejected_sum`` in nats per
    answer; ``chosen_tokens`` and ``rejected_tokens`` are mean lengths. Each answer is read alone, so that a pair counts as long
    as the model has positions for it, whatever row it was trained in; ``left_out`` counts the others.
    """
    stream = TokenStream(corpus.heldout.tokens, corpus.heldout.offsets, corpus.heldout.mask)
    windows = np.stack([stream.documents[:-1], np.diff(stream.documents) - 1], 1).reshape(-1, 2, 2)
    longest = windows[:, :, 1].max(1, initial=0)
    order = [at for at in np.argsort(longest, kind="stable").tolist() if longest[at] <= model.shape.max_positions]
    objective, device = PairwisePreference(Preference()), model.embedding.weight.device
    means: list[torch.Tensor] = []
    totals = torch.zeros(4, dtype=torch.float64)
    while order:
        row = int(longest[order[-1]])
        together = max(1, _TOKENS // (2 * row))
        group, order = order[-together:], order[:-together]
        rows = empty_rows(2 * len(group), row)
        for at, (first, count) in enumerate(windows[group].reshape(-1, 2).tolist()):
            fill_row(rows, at, stream, [(first, count)])
        batch = [torch.from_numpy(part).to(device) for part in (rows.inputs, rows.targets, rows.documents)]
        found, count = (part[:, 0, 0].view(-1, 2) for part in objective.log_likelihoods(model, *batch))
        means.append((found / count.clamp(min=1)).double().cpu())
        totals += torch.cat([found.double().sum(0), count.double().sum(0)]).cpu()
    names = ("chosen_sum", "rejected_sum", "chosen_tokens", "rejected_tokens")
    if not means:
        empty = {"accuracy": 0.5, "count": 0, "left_out": len(windows), "low": 0.0, "high": 1.0}
        return {**empty, **dict.fromkeys(("chosen", "rejected", *names), 0.0)}
    mean = torch.cat(means)
    right = float((mean[:, 0] > mean[:, 1]).sum()) + 0.5 * float((mean[:, 0] == mean[:, 1]).sum())
    low, high = wilson(right, len(mean))
    chosen, rejected = mean.mean(0).tolist()
    return {
        "accuracy": right / len(mean), "count": len(mean), "left_out": len(windows) - len(mean), "low": low, "high": high,
        "chosen": chosen, "rejected": rejected,
        **dict(zip(names, (totals / len(mean)).tolist(), strict=True)),
    }  # fmt: skip
