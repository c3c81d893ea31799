"""Low-rank adapters: small trained matrices beside frozen ones, merged into them whenever weights are written.

A checkpoint of a stage with adapters holds merged weights under their usual names, so that whatever reads it (a branch, an
export, a chat) sees a plain model; the adapters lie beside them, for the stage itself to go on from.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windtunnel.model.parametrization import Role, named_roles, tag
from windtunnel.model.transformer import Matrix, Transformer


class Adapted(nn.Module):
    """W·x + scale·up·(down·x), with W frozen."""

    def __init__(self, weight: nn.Parameter, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.weight, self.scale = weight, scale
        self.down = tag(nn.Parameter(torch.empty(rank, columns, device=weight.device)), Role.ADAPTER_DOWN)
        self.up = tag(nn.Parameter(torch.empty(rows, rank, device=weight.device)), Role.ADAPTER_UP)

    def forward(self, x: Tensor) -> Tensor:
        beside = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype)) + self.scale * beside

    def merged(self) -> Tensor:
        """W + scale·up·down, in at least fp32."""
        return self.weight + self.scale * (self.up @ self.down)


def attach(model: Transformer, rank: int, scale: float) -> None:
    """Puts adapters beside every hidden matrix of a model and freezes everything else, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, Matrix) and model.roles[f"{name}.weight"] is Role.HIDDEN:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, Adapted(module.weight, rank, scale))
    model.roles = named_roles(model)


@contextmanager
def set_aside(model: Transformer) -> Generator[None]:
    """A model as it is without its adapters, which add nothing until the end of the block; without any, the model as it is."""
    found = [(module, module.scale) for _, module in _adapted(model)]
    try:
        for module, _ in found:
            module.scale = 0.0
        yield
    finally:
        for module, scale in found:
            module.scale = scale


def is_adapter(model: Transformer, name: str) -> bool:
    """Whether a tensor of a model belongs to an adapter."""
    return model.roles.get(name) in (Role.ADAPTER_DOWN, Role.ADAPTER_UP)


def adapters(model: Transformer) -> dict[str, Tensor]:
    """The adapters' tensors by name; empty without any."""
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(model, name)}


@torch.no_grad()
def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """All weights of the plain model, adapters merged into the matrices that they stand beside."""
    merged = {f"{name}.weight": module.merged() for name, module in _adapted(model)}
    state = model.state_dict(keep_vars=True)
    plain = {name: value.detach() for name, value in state.items() if not is_adapter(model, name)}
    return {**plain, **merged}


def _adapted(model: Transformer) -> Iterator[tuple[str, Adapted]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))
