"""Keeping the experts of a mixture equally busy: the Switch loss, the router's z-loss, and a bias that follows the load.

The Switch loss multiplies each expert's mean probability by its share of the *whole step's* choices, so that cutting a batch
into micro-batches or over ranks changes nothing. Those shares are needed before the first gradient. Where a step has one
micro-batch, they are counted in it. Where it has several, or several ranks, a pass without gradients counts them first: that
costs a third of the step again, which is why a step of experts is cut as little as memory allows. Shapes: L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.model.moe import Experts, Routing, expert_counts
from windtunnel.model.transformer import Transformer
from windtunnel.train.growth import Balance
from windtunnel.train.objectives import Objective
from windtunnel.train.parallel import sum_over_ranks


class Balanced:
    """An objective with the balancing terms of a mixture of experts beside its own.

    The terms are means over scored tokens: those that fill up a batch, or that nothing is asked of, do not count.
    """

    def __init__(self, base: Objective, balance: Balance) -> None:
        self.base, self.balance = base, balance
        self.names: tuple[str, ...] = (*base.names, "balance", "router_z")
        self.weights: tuple[float, ...] = (*base.weights, balance.loss, balance.z)

    def counts(self, rows: Rows) -> np.ndarray:
        scored = float((rows.targets != IGNORED).sum())
        return np.append(self.base.counts(rows), [scored, scored])

    def sums(self, model: Transformer, *batch: Tensor | None) -> Tensor:
        listener, targets_BT = _Listener(model), batch[1]
        assert targets_BT is not None
        own = self.base.sums(listener, *batch)  # type: ignore[arg-type]
        real_N = (targets_BT != IGNORED).flatten()
        load_LE = loads(listener.routing, real_N, model.load.dtype)
        model.load.add_(load_LE)
        share_LE = torch.where(model.shares >= 0, model.shares, load_LE / load_LE.sum(1, keepdim=True).clamp(min=1))
        balance = z = torch.zeros((), device=own.device)
        for (logits_NE, _), share_E in zip(listener.routing, share_LE, strict=True):
            probability_E = torch.where(real_N[:, None], logits_NE.softmax(-1), 0.0).sum(0)
            balance = balance + logits_NE.shape[1] * (probability_E * share_E).sum()
            z = z + torch.where(real_N, logits_NE.logsumexp(-1).square(), 0.0).sum()
        return torch.cat((own, torch.stack((balance, z)) / len(share_LE)))


class _Listener:
    """A model as objectives call it, that keeps what the routers decide."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.shape = model, model.shape
        self.routing: Routing = []

    def __call__(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        logits_BTV, routing = self.model.routed(tokens_BT, documents_BT)
        self.routing += routing
        return logits_BTV

    def summed_loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        loss, routing = self.model.summed_loss(tokens_BT, targets_BT, documents_BT)
        self.routing += routing
        return loss, routing


def loads(routing: Routing, real_N: Tensor, dtype: torch.dtype) -> Tensor:
    """How many choices of real tokens fell on each expert: [L, E]."""
    return torch.stack([expert_counts(chosen, logits.shape[1], real_N) for logits, chosen in routing]).to(dtype)


def balanced(objective: Objective, balance: Balance | None) -> Objective:
    """The objective, with balancing terms where a stage asks for them."""
    return objective if balance is None else Balanced(objective, balance)


def begin_step(trainer: Any, micro_batches: list[tuple[Tensor | None, ...]]) -> None:
    """Before a step: forgets the last step's load, and counts the whole step's shares where one micro-batch does not hold it."""
    model, balance = trainer.model, trainer.objective.balance
    model.load.zero_()
    model.shares.fill_(-1.0)
    if not balance.loss or (len(micro_batches) == 1 and trainer.runtime.world == 1):
        return
    counted = torch.zeros_like(model.load)
    with torch.no_grad():
        for tokens, targets, documents, *_ in micro_batches:
            assert tokens is not None
            assert targets is not None
            counted += loads(model.routed(tokens, documents)[1], (targets != IGNORED).flatten(), counted.dtype)
    whole = torch.from_numpy(sum_over_ranks(counted.double().cpu().numpy(), trainer.runtime)).to(counted)
    model.shares.copy_(whole / whole.sum(1, keepdim=True).clamp(min=1))


def end_step(trainer: Any, applied: bool) -> dict[str, float]:
    """After a step: moves the bias, and reports the load: each expert's share times E, and how uneven a layer is on average.

    ``load_cv`` is the standard deviation over experts of their load, relative to the mean, averaged over layers.
    """
    model, rate = trainer.model, trainer.objective.balance.bias
    load_LE = sum_over_ranks(model.load.double().cpu().numpy(), trainer.runtime)
    relative_LE = load_LE / np.maximum(load_LE.mean(1, keepdims=True), 1)
    if applied and rate:
        for layer, relative_E in zip(model.layers, relative_LE, strict=True):
            if isinstance(layer.mlp, Experts):
                layer.mlp.bias += rate * torch.from_numpy(np.sign(1 - relative_E)).to(layer.mlp.bias)
    facts = {f"load_{e}": float(value) for e, value in enumerate(relative_LE.mean(0))}
    return {**facts, "load_cv": float(relative_LE.std(1).mean()), "load_max": float(relative_LE.max())}
