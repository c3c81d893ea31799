"""Objectives: what a stage minimises, as terms (sum, count, weight).

An objective returns sums. Each is divided by its own count over all micro-batches and ranks of the step (tokens for
language modelling), so that gradient accumulation 1×8 equals 8×1. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.model.transformer import Transformer


class Objective(Protocol):
    """One way to turn a batch into a loss. ``names`` and ``weights`` have one entry for each term."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def counts(self, rows: Rows) -> np.ndarray:
        """What each term's sum is divided by, for these rows: float64 [terms]."""
        ...

    def sums(self, model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        """The sum of each term over these rows: float32 [terms]."""
        ...


class LanguageModel:
    """Next-token cross-entropy in nats, summed over the targets that are scored."""

    names: tuple[str, ...] = ("loss",)
    weights: tuple[float, ...] = (1.0,)

    def counts(self, rows: Rows) -> np.ndarray:
        return np.array([(rows.targets != IGNORED).sum()], dtype=np.float64)

    def sums(self, model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        logits_NV = model(tokens_BT, documents_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        # Written out rather than F.cross_entropy: the compiler fuses it better, 5 to 10 % of a tiny model's step (lab log).
        own_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
        loss_N = torch.where(targets_N == IGNORED, 0.0, logits_NV.logsumexp(-1) - own_N)
        return loss_N.sum()[None]


OBJECTIVES: dict[str, Objective] = {"lm": LanguageModel()}
