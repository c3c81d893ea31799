"""Cross-entropy of the head without ever holding all logits: a chunk of positions at a time, its gradients made on the way.

Whole, the logits of N positions are N·V numbers, several times over with their gradients: at 131,072 positions and 4,096 entries
2 GiB each. Here a chunk's logits, its loss and what they send back to the stream and to the head are made together, and then
dropped; the backward pass only multiplies by the loss's own gradient. The head is multiplied three times for each position, as
often as without chunks.

Where positions do not count alike, and how much is known only when all are there (a preference between two answers), each
position's log-likelihood is made and its normaliser kept; the backward pass makes the logits of a chunk again, a fourth product.

Shapes: N positions, D width, V rows of the head that are real.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from windtunnel.corpus.loader import IGNORED
from windtunnel.model.chunked_size import chunk_positions


def summed_cross_entropy(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab: int) -> Tensor:
    """Cross-entropy in nats (fp32 at least, 0-d), summed over the targets that are not −100.

    Args:
        h_ND: what the head multiplies, in the compute dtype.
        head_VD: the head's weight, whose rows from ``vocab`` on are padding and are never predicted.
        targets_N: token ids, −100 where nothing is scored.
    """
    tracked = torch.is_grad_enabled()
    chunk = chunk_positions(vocab, h_ND.device.type)
    wanted = (tracked and h_ND.requires_grad, tracked and head_VD.requires_grad)
    return _summed(h_ND, head_VD, targets_N, vocab, chunk, *wanted)[0]


# A custom operator, so that the compiler sees one node and not one for each chunk.
@torch.library.custom_op("windtunnel::summed_cross_entropy", mutates_args=())
def _summed(
    h: Tensor, head: Tensor, targets: Tensor, vocab: int, chunk: int, to_h: bool, to_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    real = head[:vocab].to(h.dtype)
    total = h.new_zeros((), dtype=wide)
    grad_h = torch.empty_like(h) if to_h else h.new_empty(0)
    grad_head = torch.zeros_like(head, dtype=wide) if to_head else h.new_empty(0, dtype=wide)
    for begin in range(0, len(h), chunk):
        x, wanted = h[begin : begin + chunk], targets[begin : begin + chunk]
        ignored, own = wanted == IGNORED, wanted.clamp(min=0)[:, None]
        logits = F.linear(x, real).to(wide)
        sums = logits.logsumexp(-1, keepdim=True)
        total += (sums - logits.gather(1, own)).masked_fill_(ignored[:, None], 0.0).sum()
        if not (to_h or to_head):
            continue
        back = _less_own(logits, sums, own).masked_fill_(ignored[:, None], 0.0).to(h.dtype)
        if to_h:
            torch.mm(back, real, out=grad_h[begin : begin + chunk])
        if to_head:
            grad_head[:vocab] += back.T @ x
    return total, grad_h, grad_head.to(head.dtype)


def _less_own(logits: Tensor, sums: Tensor, own: Tensor) -> Tensor:
    """Probabilities, less one at the target: how a position's loss changes with its logits, whose memory it takes."""
    return logits.sub_(sums).exp_().scatter_add_(1, own, torch.full_like(sums, -1.0))


@_summed.register_fake
def _(
    h: Tensor, head: Tensor, targets: Tensor, vocab: int, chunk: int, to_h: bool, to_head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = h.new_empty((), dtype=torch.promote_types(h.dtype, torch.float32))
    grad_head = torch.empty_like(head) if to_head else head.new_empty(0)
    return total, torch.empty_like(h) if to_h else h.new_empty(0), grad_head


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.to_h, ctx.to_head = inputs[5:]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_h, grad_head = ctx.saved_tensors
    to_h = grad_h * gradient.to(grad_h.dtype) if ctx.to_h else None
    to_head = grad_head * gradient.to(grad_head.dtype) if ctx.to_head else None
    return to_h, to_head, None, None, None, None, None


_summed.register_autograd(_backward, setup_context=_save)


def log_likelihoods(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, vocab: int) -> Tensor:
    """Log-likelihood in nats of each target (fp32 at least, [N]); 0 where it is −100. Arguments as ``summed_cross_entropy``."""
    return _each(h_ND, head_VD, targets_N, vocab, chunk_positions(vocab, h_ND.device.type))[0]


@torch.library.custom_op("windtunnel::log_likelihoods", mutates_args=())
def _each(h: Tensor, head: Tensor, targets: Tensor, vocab: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Log-likelihoods and normalisers, [N] each."""
    wide = torch.promote_types(h.dtype, torch.float32)
    real = head[:vocab].to(h.dtype)
    found, sums = (h.new_empty(len(h), dtype=wide) for _ in range(2))
    for begin in range(0, len(h), chunk):
        here = slice(begin, begin + chunk)
        logits = F.linear(h[here], real).to(wide)
        sums[here] = logits.logsumexp(-1)
        found[here] = logits.gather(1, targets[here].clamp(min=0)[:, None])[:, 0] - sums[here]
    return found.masked_fill_(targets == IGNORED, 0.0), sums


@_each.register_fake
def _(h: Tensor, head: Tensor, targets: Tensor, vocab: int, chunk: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    return h.new_empty(len(h), dtype=wide), h.new_empty(len(h), dtype=wide)


@torch.library.custom_op("windtunnel::log_likelihoods_backward", mutates_args=())
def _each_backward(
    gradient: Tensor,
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    sums: Tensor,
    vocab: int,
    chunk: int,
    to_h: bool,
    to_head: bool,
) -> tuple[Tensor, Tensor]:
    real = head[:vocab].to(h.dtype)
    grad_h = torch.empty_like(h) if to_h else h.new_empty(0)
    grad_head = torch.zeros_like(head, dtype=sums.dtype) if to_head else h.new_empty(0, dtype=sums.dtype)
    weights = gradient.masked_fill(targets == IGNORED, 0.0).neg_()[:, None]
    for begin in range(0, len(h), chunk):
        here = slice(begin, begin + chunk)
        x, own = h[here], targets[here].clamp(min=0)[:, None]
        back = _less_own(F.linear(x, real).to(sums.dtype), sums[here, None], own).mul_(weights[here]).to(h.dtype)
        if to_h:
            torch.mm(back, real, out=grad_h[here])
        if to_head:
            grad_head[:vocab] += back.T @ x
    return grad_h, grad_head.to(head.dtype)


@_each_backward.register_fake
def _(
    gradient: Tensor,
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    sums: Tensor,
    vocab: int,
    chunk: int,
    to_h: bool,
    to_head: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h) if to_h else h.new_empty(0), torch.empty_like(head) if to_head else head.new_empty(0)


def _save_each(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.vocab, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward_each(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    to_h, to_head = ctx.needs_input_grad[:2]
    grad_h, grad_head = _each_backward(gradient, *ctx.saved_tensors, ctx.vocab, ctx.chunk, to_h, to_head)
    return grad_h if to_h else None, grad_head if to_head else None, None, None, None


_each.register_autograd(_backward_each, setup_context=_save_each)
