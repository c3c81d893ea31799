"""Cross-entropy of the head without ever holding all logits: a chunk of positions at a time, its gradients made on the way.

Whole, the logits of N positions are N·V numbers, several times over with their gradients: at 131,072 positions and 4,096 entries
2 GiB each. Here a chunk's logits, its loss and what they send back to the stream and to the head are made together, and then
dropped; the backward pass only multiplies by the loss's own gradient. The head is multiplied three times for each position, as
often as without chunks. Shapes: N positions, D width, V rows of the head that are real.
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
        back = logits.sub_(sums).exp_().scatter_add_(1, own, torch.full_like(sums, -1.0))
        back = back.masked_fill_(ignored[:, None], 0.0).to(h.dtype)
        if to_h:
            torch.mm(back, real, out=grad_h[begin : begin + chunk])
        if to_head:
            grad_head[:vocab] += back.T @ x
    return total, grad_h, grad_head.to(head.dtype)


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
