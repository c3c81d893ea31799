"""A mixture of experts: E SwiGLU MLPs in the place of one, of which each token passes through k (arXiv 2404.06395, section 7.3).

The router is a matrix; its logits, in fp32 at least, pick the k experts of each token, whose outputs are added with the softmax
over those k logits as weights. That equals the softmax over all E, cut to the k largest and renormalised. No expert has a
capacity: no token is dropped.

Tokens are sorted by expert, each expert multiplies its contiguous slice, and the results are sorted back: nothing loops over
tokens. Shapes in names: N tokens, K choices of a token, D width, E experts, F inner width of an expert, M = N·K sorted rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windtunnel.model.parametrization import Role, tag
from windtunnel.model.shape import Shape

Routing = list[tuple[Tensor, Tensor]]
"""What the routers of one forward pass decided, a pair for each layer: logits_NE and the chosen experts_NK."""


class Decisions:
    """Receives what the routers of one forward pass decide. An object of its own: sharding hands layers copies of plain lists."""

    def __init__(self) -> None:
        self.routing: Routing = []


class Router(nn.Module):
    """One logit for each expert, in fp32 at least. A module of its own, so that sharding can leave it in fp32."""

    def __init__(self, experts: int, width: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(experts, width, device=device)), Role.ROUTER)

    def forward(self, x_ND: Tensor) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        return F.linear(x_ND.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """E experts of one shape and their router.

    ``bias`` shifts the router's logits where experts are chosen, and not where they are weighted (arXiv 2408.15664). It is
    moved by the load, not by a gradient, and stays zero unless a stage asks for that.
    """

    bias: Tensor

    def __init__(self, shape: Shape, device: torch.device | str | None) -> None:
        super().__init__()
        e, d, f = shape.experts, shape.width, shape.ff
        self.top_k = shape.top_k
        self.router = Router(e, d, device)
        self.gate = tag(nn.Parameter(torch.empty(e, f, d, device=device)), Role.HIDDEN)
        self.up = tag(nn.Parameter(torch.empty(e, f, d, device=device)), Role.HIDDEN)
        self.down = tag(nn.Parameter(torch.empty(e, d, f, device=device)), Role.HIDDEN)
        self.register_buffer("bias", torch.zeros(e, device=device))

    def forward(self, x_BTD: Tensor, decisions: Decisions | None = None) -> Tensor:
        """Args:
        x_BTD: normalised stream.
        decisions: receives this layer's.
        """
        x_ND = x_BTD.flatten(0, -2)
        logits_NE = self.router(x_ND)
        chosen_NK = (logits_NE + self.bias).topk(self.top_k, dim=-1).indices
        weights_NK = logits_NE.gather(1, chosen_NK).softmax(-1).to(x_ND.dtype)
        if decisions is not None:
            decisions.routing.append((logits_NE, chosen_NK))
        order_M = chosen_NK.flatten().argsort(stable=True)
        back_M = order_M.argsort()
        ends_E = expert_counts(chosen_NK, len(self.bias)).cumsum(0).to(torch.int32)
        copies_MD = x_ND[:, None].expand(-1, self.top_k, -1).reshape(-1, x_ND.shape[1])
        x_MD = _Reorder.apply(copies_MD, order_M, back_M)
        gate, up, down = (weight.to(x_ND.dtype) for weight in (self.gate, self.up, self.down))
        inner_MF = F.silu(grouped_product(x_MD, gate, ends_E)) * grouped_product(x_MD, up, ends_E)
        y_MD = _Reorder.apply(grouped_product(inner_MF, down, ends_E), back_M, order_M)
        return (y_MD.unflatten(0, (-1, self.top_k)) * weights_NK[..., None]).sum(1).view(x_BTD.shape)


def expert_counts(chosen_NK: Tensor, experts: int, real_N: Tensor | None = None) -> Tensor:
    """How many choices fell on each expert [E], over all tokens or those that ``real_N`` marks. Needs no atomic additions."""
    hit_NKE = chosen_NK[..., None] == torch.arange(experts, device=chosen_NK.device)
    if real_N is not None:
        hit_NKE = hit_NKE & real_N[:, None, None]
    return hit_NKE.sum((0, 1))


class _Reorder(torch.autograd.Function):
    """Rows in another order. The gradient is gathered by the inverse order, where indexing would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def grouped_product(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ``ends[e−1] … ends[e]`` of x times expert e's matrix transposed: [M, F]."""
    return _grouped_product(x_MD, weight_EFD, ends_E)


def _fast(x: Tensor) -> bool:
    """Whether torch's grouped kernel takes these rows: bf16 on CUDA. It has no compiled fp32 form on any device."""
    return x.is_cuda and x.dtype == torch.bfloat16


# Custom operators, because the lengths of the slices depend on the data: the compiler sees opaque nodes with static shapes.
@torch.library.custom_op("windtunnel::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _fast(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, (begin, end) in enumerate(_slices(ends)):
        torch.mm(x[begin:end], weight[expert].T, out=out[begin:end])
    return out


@_grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("windtunnel::grouped_product_backward", mutates_args=())
def _grouped_product_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    if _fast(x):
        return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.T, x, offs=ends)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    for expert, (begin, end) in enumerate(_slices(ends)):
        torch.mm(grad[begin:end], weight[expert], out=grad_x[begin:end])
        torch.mm(grad[begin:end].T, x[begin:end], out=grad_weight[expert])
    return grad_x, grad_weight


@_grouped_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _slices(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_product_backward(grad, *ctx.saved_tensors), None


_grouped_product.register_autograd(_backward, setup_context=_save)
