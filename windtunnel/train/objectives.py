"""Objectives: what a stage minimises, as terms (sum, count, weight).

An objective returns sums. Each is divided by its own count over all micro-batches and ranks of the step (tokens for
language modelling), so that gradient accumulation 1×8 equals 8×1. Shapes: B rows, T tokens, V vocabulary, P pairs.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.corpus.packing import pairs_in
from windtunnel.model.chunked_size import is_chunked
from windtunnel.model.transformer import Transformer
from windtunnel.train.preference import Preference
from windtunnel.train.stage import Stage


class Objective(Protocol):
    """One way to turn a batch into a loss. ``names`` and ``weights`` have one entry for each term."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def counts(self, rows: Rows) -> np.ndarray:
        """What each term's sum is divided by, for these rows: float64 [terms]."""
        ...

    def sums(self, model: Transformer, *batch: Tensor | None) -> Tensor:
        """The sum of each term over a batch (tokens, targets, documents, and values where rows have some): float32 [terms]."""
        ...


class LanguageModel:
    """Next-token cross-entropy in nats, summed over the targets that are scored; above a number of logits made in chunks."""

    names: tuple[str, ...] = ("loss",)
    weights: tuple[float, ...] = (1.0,)

    def counts(self, rows: Rows) -> np.ndarray:
        return np.array([(rows.targets != IGNORED).sum()], dtype=np.float64)

    def sums(self, model: Transformer, *batch: Tensor | None) -> Tensor:
        tokens_BT, targets_BT, documents_BT = batch
        assert tokens_BT is not None
        assert targets_BT is not None
        if is_chunked(targets_BT.numel(), model.shape.padded_vocab):
            return model.summed_loss(tokens_BT, targets_BT, documents_BT)[0][None]
        logits_NV = model(tokens_BT, documents_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        # Written out rather than F.cross_entropy: the compiler fuses it better, 5 to 10 % of a tiny model's step (lab log).
        own_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
        loss_N = torch.where(targets_N == IGNORED, 0.0, logits_NV.logsumexp(-1) - own_N)
        return loss_N.sum()[None]


class PairwisePreference:
    """The better answer against the worse one (``Preference``), each term summed over pairs; only the first has a weight.

    A row holds pairs as documents 2i, the better, and 2i + 1, the worse answer after the same question, and its values are the
    reference's log-likelihoods of each. ``drift`` is how far the better answer's log-likelihood has moved from there.
    """

    def __init__(self, preference: Preference) -> None:
        self.preference = preference
        self.names: tuple[str, ...] = (
            "loss",
            "margin",
            "accuracy",
            "chosen_reward",
            "rejected_reward",
            "chosen",
            "rejected",
        )
        if preference.has_reference:
            self.names += ("drift",)
        self.weights: tuple[float, ...] = (1.0, *[0.0] * (len(self.names) - 1))

    def counts(self, rows: Rows) -> np.ndarray:
        at, place = np.nonzero((rows.targets != IGNORED) & (rows.documents % 2 == 0))
        better = np.unique(np.stack([at, rows.documents[at, place]]), axis=1)
        return np.full(len(self.names), float(better.shape[1]))

    def log_likelihoods(
        self, model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of the two answers of each pair of each row, and their numbers of tokens: float32 [B, P, 2] each, 0
        where a row has fewer pairs.

        Above a number of logits made in chunks.
        """
        if is_chunked(targets_BT.numel(), model.shape.padded_vocab):
            own_BT = model.log_likelihoods(tokens_BT, targets_BT, documents_BT)
        else:
            logits_BTV = model(tokens_BT, documents_BT)
            own_BT = logits_BTV.gather(2, targets_BT.clamp(min=0)[..., None])[..., 0] - logits_BTV.logsumexp(-1)
        scored_BT = targets_BT != IGNORED
        # Summed by place and not by a mask for each answer, which would grow with the square of the row.
        empty_BD = own_BT.new_zeros(len(own_BT), 2 * pairs_in(tokens_BT.shape[1]))
        place_BT = documents_BT.clamp(0, empty_BD.shape[1] - 1).long()
        found_BD = empty_BD.scatter_add(1, place_BT, torch.where(scored_BT, own_BT, 0.0))
        count_BD = empty_BD.scatter_add(1, place_BT, scored_BT.to(own_BT.dtype))
        return found_BD.unflatten(1, (-1, 2)), count_BD.unflatten(1, (-1, 2))

    def sums(self, model: Transformer, *batch: Tensor | None) -> Tensor:
        tokens_BT, targets_BT, documents_BT, *values = batch
        assert tokens_BT is not None
        assert targets_BT is not None
        assert documents_BT is not None
        found_BP2, count_BP2 = self.log_likelihoods(model, tokens_BT, targets_BT, documents_BT)
        gained_BP2 = found_BP2
        if self.preference.has_reference and values[0] is not None:
            gained_BP2 = found_BP2 - values[0].unflatten(1, (-1, 2))
        per_BP2 = count_BP2.clamp(min=1) if self.preference.normalised else 1.0
        reward_BP2 = self.preference.beta * gained_BP2 / per_BP2
        margin_BP = reward_BP2[..., 0] - reward_BP2[..., 1]
        h_BP, smoothing = margin_BP - self.preference.margin, self.preference.smoothing
        loss_BP = -(1 - smoothing) * F.logsigmoid(h_BP) - smoothing * F.logsigmoid(-h_BP)
        right_BP = (margin_BP > 0).to(loss_BP.dtype)
        terms = [loss_BP, margin_BP, right_BP, *reward_BP2.unbind(2), *found_BP2.unbind(2)]
        if self.preference.has_reference:
            terms.append(gained_BP2[..., 0])
        real_BP = count_BP2[..., 0] > 0
        return torch.where(real_BP, torch.stack(terms), 0.0).sum((1, 2))


def objective_of(stage: Stage) -> Objective:
    """What a stage minimises."""
    return PairwisePreference(stage.preference) if stage.preference is not None else OBJECTIVES[stage.objective]


OBJECTIVES: dict[str, Objective] = {"lm": LanguageModel()}
