"""Causal attention over packed rows, with no token seeing another document.

Shapes in names: B rows, T positions, S keys, H heads, K head dimension.

One meaning, three ways to compute it, which agree to 1e-5:

- ``dense``: one boolean mask for the row, one call. Best for short rows.
- ``documents``: one causal call for each document. Linear memory in the row, no work across documents; for long rows on a
  CPU, where FlexAttention has no backward pass.
- ``flex``: FlexAttention with a block mask, on CUDA.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Backend = Literal["dense", "documents", "flex"]
LONGEST_DENSE_ROW = 128
"""Above this row length attending across documents and masking it costs more than the calls it saves. Measured on one thread
with documents of 60 and 300 tokens: ``documents`` takes 1.2× the time of ``dense`` at 128 tokens, 0.76–0.9× at 256, 0.37–0.58×
at 512."""


def attention_backend(device: torch.device | str, row: int) -> Backend:
    """The way to mask documents on a device for rows of that length."""
    if torch.device(device).type == "cuda":
        return "flex"
    return "dense" if row <= LONGEST_DENSE_ROW else "documents"


def document_mask(documents_BT: Tensor, backend: Backend) -> Any:
    """What ``attend`` needs to know of the documents, prepared once for all layers.

    Args:
        documents_BT: number of the document that each position belongs to, ascending within a row.
        backend: see the module.
    """
    if backend == "documents":
        return documents_BT
    if backend == "dense":
        row = documents_BT.shape[1]
        position = torch.arange(row, device=documents_BT.device)
        causal = position[:, None] >= position[None, :]
        return ((documents_BT[:, :, None] == documents_BT[:, None, :]) & causal)[:, None]

    def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    rows, row = documents_BT.shape
    return create_block_mask(same_document, rows, None, row, row, device=documents_BT.device)


def attend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Any = None, backend: Backend = "dense") -> Tensor:
    """Attention with scale 1/√K. Keys and values may have fewer heads (grouped queries).

    Args:
        mask: from ``document_mask`` for the same backend; None means plain causal attention of T = S positions; a boolean
            tensor (…, T, S) is used as it is.
    """
    grouped = q_BHTK.shape[1] != k_BHSK.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True, enable_gqa=grouped)
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHTK, k_BHSK, v_BHSK, block_mask=mask, enable_gqa=grouped)  # type: ignore[return-value]
    if backend == "documents":
        return _attend_by_document(q_BHTK, k_BHSK, v_BHSK, mask)[0]
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, enable_gqa=grouped)


def _spans(documents_BT: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    rows, row = documents_BT.shape
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first.flatten().nonzero().flatten().tolist()
    return [(s // row, s % row, e - s + s % row) for s, e in zip(starts, [*starts[1:], rows * row], strict=True)]


# A custom operator, because the number of calls depends on the data: the compiler sees one opaque node with static shapes.
@torch.library.custom_op("windtunnel::attend_by_document", mutates_args=())
def _attend_by_document(q: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    out, norms = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for b, s, e in _spans(documents_BT):
        part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[b : b + 1, :, s:e], k[b : b + 1, :, s:e], v[b : b + 1, :, s:e], 0.0, True
        )
        out[b : b + 1, :, s:e], norms[b : b + 1, :, s:e] = part
    return out, norms


@_attend_by_document.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("windtunnel::attend_by_document_backward", mutates_args=())
def _attend_by_document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor, documents_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for b, s, e in _spans(documents_BT):
        g, *parts = (x[b : b + 1, :, s:e] for x in (grad, q, k, v, out, norms))
        done = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g, *parts, 0.0, True)
        for whole, part in zip(grads, done, strict=True):
            whole[b : b + 1, :, s:e] = part
    return grads


@_attend_by_document_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor, documents_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents_BT = inputs
    ctx.save_for_backward(q, k, v, *output, documents_BT)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, norms, documents_BT = ctx.saved_tensors
    return *_attend_by_document_backward(grad, q, k, v, out, norms, documents_BT), None


_attend_by_document.register_autograd(_backward, setup_context=_save)
