"""The MiniCPM decoder (arXiv 2404.06395, tables 2 and 7): pre-norm RMSNorm, rotary positions, SwiGLU, grouped queries.

    h = E[x] · embedding;  h += block(norm(h)) · residual, twice a layer;  logits = W · (norm(h) · logits)

with the three multipliers from the parametrization's table. Shapes in names: B rows, T positions, D width, H heads, K head
dimension, V padded vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from windtunnel.model.attention import Backend, attend, attention_backend, document_mask
from windtunnel.model.chunked import log_likelihoods, summed_cross_entropy
from windtunnel.model.moe import Decisions, Experts, Routing
from windtunnel.model.parametrization import Parametrization, Role, named_roles, tag
from windtunnel.model.rope import position_tables
from windtunnel.model.shape import Shape


class KeyValueCache:
    """Keys and values of the positions seen so far, for decoding one token after another.

    Args:
        model: the model that will fill it.
        length: most positions it can hold.
        rows: sequences decoded side by side.
    """

    def __init__(self, model: Transformer, length: int, rows: int = 1) -> None:
        shape, weight = model.shape, model.embedding.weight
        size = (shape.layers, 2, rows, shape.kv_heads, length, shape.head_dim)
        self.store = torch.empty(size, device=weight.device, dtype=model.compute_dtype or weight.dtype)
        self.used, self.length = 0, length

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values, and returns all of that layer's."""
        end = self.used + k_BHTK.shape[2]
        self.store[layer, 0, :, :, self.used : end] = k_BHTK
        self.store[layer, 1, :, :, self.used : end] = v_BHTK
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the sequences only, in the order given."""
        kept = self.store[:, :, rows, :, : self.used]
        self.store = torch.empty((*kept.shape[:4], self.length, kept.shape[5]), device=kept.device, dtype=kept.dtype)
        self.store[..., : self.used, :] = kept


class Matrix(nn.Module):
    """A matrix without bias, tagged with its role. Multiplies in the input's dtype; its own may be wider."""

    def __init__(self, rows: int, columns: int, role: Role, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(rows, columns, device=device)), role)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm over the last dimension: mean square in at least fp32, result cast back, then the gain."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None, role: Role = Role.NORM) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(width, device=device)), role)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


def rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions in half-split layout: pair i is (x[i], x[i + K/2]). Computed in the tables' dtype, cast back."""
    a, b = x_BTHK.to(torch.promote_types(x_BTHK.dtype, cos_TK.dtype)).chunk(2, -1)
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BTHK.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape, device: torch.device | str | None) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        inner, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.query = Matrix(inner, shape.width, Role.HIDDEN, device)
        self.key = Matrix(keys, shape.width, Role.HIDDEN, device)
        self.value = Matrix(keys, shape.width, Role.HIDDEN, device)
        self.output = Matrix(shape.width, inner, Role.HIDDEN, device)
        self.query_norm = self.key_norm = None
        if shape.qk_norm:
            self.query_norm = Norm(shape.head_dim, shape.norm_eps, device, Role.HEAD_NORM)
            self.key_norm = Norm(shape.head_dim, shape.norm_eps, device, Role.HEAD_NORM)

    def forward(self, x_BTD: Tensor, place: Place, layer: int) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (-1, self.head_dim)) for f in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, place.cos_TK, place.sin_TK), rotate(k, place.cos_TK, place.sin_TK)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if place.cache is not None:
            k, v = place.cache.extend(layer, k, v)
        return self.output(attend(q, k, v, place.mask, place.backend).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, shape: Shape, device: torch.device | str | None) -> None:
        super().__init__()
        self.gate = Matrix(shape.ff, shape.width, Role.HIDDEN, device)
        self.up = Matrix(shape.ff, shape.width, Role.HIDDEN, device)
        self.down = Matrix(shape.width, shape.ff, Role.HIDDEN, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, device: torch.device | str | None) -> None:
        super().__init__()
        self.attention_norm = Norm(shape.width, shape.norm_eps, device)
        self.attention = Attention(shape, device)
        self.mlp_norm = Norm(shape.width, shape.norm_eps, device)
        self.mlp = SwiGLU(shape, device) if shape.experts == 1 else Experts(shape, device)

    def forward(self, h_BTD: Tensor, place: Place, layer: int) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), place, layer) * place.residual
        x_BTD = self.mlp_norm(h_BTD)
        mixed = self.mlp(x_BTD, place.decisions) if isinstance(self.mlp, Experts) else self.mlp(x_BTD)
        return h_BTD + mixed * place.residual


@dataclass(frozen=True)
class Place:
    """What every layer of one forward pass shares: positions, residual multiplier, mask, cache, what routers decided."""

    cos_TK: Tensor
    sin_TK: Tensor
    residual: Tensor
    mask: Any
    backend: Backend
    cache: KeyValueCache | None
    decisions: Decisions | None = None


def _run(layer: nn.Module, h_BTD: Tensor, place: Place, number: int) -> Tensor:
    return layer(h_BTD, place, number)


def _recomputed(layer: nn.Module, h_BTD: Tensor, place: Place, number: int) -> Tensor:
    """A layer that keeps nothing but its input for the backward pass."""

    def block(h_BTD: Tensor) -> tuple[Tensor, ...]:
        own = Decisions()  # they come back as outputs: computing them again must not list them twice
        out_BTD = layer(h_BTD, replace(place, decisions=own), number)
        return (out_BTD, *(own.routing[0] if own.routing else ()))

    out_BTD, *decided = checkpoint(block, h_BTD, use_reentrant=False, preserve_rng_state=False)
    if decided and place.decisions is not None:
        place.decisions.routing.append((decided[0], decided[1]))
    return out_BTD


class Transformer(nn.Module):
    """The decoder. Weights are not initialised until ``init_weights`` or loading.

    Args:
        shape: sizes.
        parametrization: gives each tensor its init and the forward multipliers.
        device: ``meta`` builds the shapes without memory.
        compute_dtype: type of activations and matrix products; None means the weights' own. Weights stay as they are
            (fp32 masters); norms, rotary positions and logits are computed in fp32 at least.
    """

    embedding_multiplier: Tensor
    residual_multiplier: Tensor
    logit_multiplier: Tensor
    cos: Tensor
    sin: Tensor
    load: Tensor
    """With experts: how many choices of the running step have fallen on each, [layers, experts]."""
    shares: Tensor
    """With experts: the whole step's share of each, as the balancing loss needs it; −1 where it is not known beforehand."""

    def __init__(
        self,
        shape: Shape,
        parametrization: Parametrization,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.parametrization, self.compute_dtype = shape, parametrization, compute_dtype
        self.backend: Backend | None = None
        """Forces one way of document masking; None chooses by device and row."""
        self.recompute = False
        """Whether a layer keeps its input alone, and is computed again in the backward pass (arXiv 1604.06174)."""
        tied = Role.TIED_EMBEDDING if shape.tied else Role.EMBEDDING
        self.embedding = Matrix(shape.padded_vocab, shape.width, tied, device)
        self.layers = nn.ModuleList(Layer(shape, device) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.norm_eps, device, Role.LAST_NORM)
        self.head = None if shape.tied else Matrix(shape.padded_vocab, shape.width, Role.HEAD, device)
        # Multipliers are tensors, so that models that differ only in them share one compiled graph.
        for name in ("embedding_multiplier", "residual_multiplier", "logit_multiplier"):
            self.register_buffer(name, torch.empty((), device=device), persistent=False)
        for name in ("cos", "sin"):
            table = torch.empty(shape.max_positions, shape.head_dim // 2, device=device)
            self.register_buffer(name, table, persistent=False)
        if shape.experts > 1:
            for name in ("load", "shares"):
                table = torch.full((shape.layers, shape.experts), -1.0, device=device)
                self.register_buffer(name, table, persistent=False)
        self.roles = named_roles(self)
        """The role of every parameter by name; read here, because tags do not survive sharding or a deep copy."""
        self._fill_buffers()

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        m, shape = self.parametrization.multipliers(self.shape), self.shape
        self.embedding_multiplier.fill_(m.embedding)
        self.residual_multiplier.fill_(m.residual)
        self.logit_multiplier.fill_(m.logits)
        for table, values in zip(
            (self.cos, self.sin), position_tables(shape, shape.max_positions, length=0), strict=True
        ):
            table.copy_(values)

    def set_parametrization(self, parametrization: Parametrization) -> None:
        """Changes the forward multipliers in place; weights stay as they are and compiled code stays valid."""
        self.parametrization = parametrization
        self._fill_buffers()

    def placed(self, shape: Shape) -> Transformer:
        """The same weights, not copied, under a shape that differs in its positions alone; for inference."""
        other = Transformer(shape, self.parametrization, device="meta", compute_dtype=self.compute_dtype)
        other.to_empty(device=self.embedding.weight.device)
        other.load_state_dict(self.state_dict(), assign=True)
        other._fill_buffers()
        return other.eval()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every parameter, and fills the buffers.

        Each is drawn on the CPU from a generator of its own, seeded by (seed, name): the values depend neither on the device
        nor on the order of parameters nor on the vocabulary's padding, whose rows are zero.
        """
        self._fill_buffers()
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial(name, seed))
        for layer in self.layers:
            if isinstance(layer.mlp, Experts):
                layer.mlp.bias.zero_()

    def initial(self, name: str, seed: int) -> Tensor:
        """The initial value of one parameter, fp32 on the CPU."""
        parameter = self.get_parameter(name)
        rule = self.parametrization.rule(self.roles[name], self.shape)
        value = torch.full(parameter.shape, rule.init_mean)
        if rule.init_std:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            rows = self.shape.vocab if name in ("embedding.weight", "head.weight") else parameter.shape[0]
            value[:rows] += torch.randn(rows, *parameter.shape[1:], generator=generator) * rule.init_std
        return value

    def hidden(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, cache: KeyValueCache | None = None,
        decisions: Decisions | None = None,
    ) -> Tensor:  # fmt: skip
        """What the head multiplies: norm(h_L) times the logit multiplier, in the compute dtype.

        Args:
            tokens_BT: token ids.
            documents_BT: number of each position's document within its row, ascending; tokens see only their own document.
                None means that a row is one document.
            cache: decode on from the positions it holds, and add these; excludes ``documents_BT``.
            decisions: receives what each layer's router decided.
        """
        length = tokens_BT.shape[1]
        start = 0 if cache is None else cache.used
        backend: Backend = "dense" if cache is not None else self.backend or attention_backend(tokens_BT.device, length)
        mask = None if documents_BT is None else document_mask(documents_BT, backend)
        if start:
            position = torch.arange(start + length, device=tokens_BT.device)
            mask = position[start:, None] >= position[None, :]
        cos_TK, sin_TK = self._positions(start, length, start + length if cache is None else cache.length)
        place = Place(cos_TK, sin_TK, self.residual_multiplier, mask, backend, cache, decisions)
        weight = self.embedding.weight
        h_BTD = F.embedding(tokens_BT, weight).to(self.compute_dtype or weight.dtype) * self.embedding_multiplier
        run = _recomputed if self.recompute and cache is None and torch.is_grad_enabled() else _run
        for i, layer in enumerate(self.layers):
            h_BTD = run(layer, h_BTD, place, i)
        if cache is not None:
            cache.used += length
        return self.norm(h_BTD) * self.logit_multiplier

    def _positions(self, start: int, count: int, whole: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``count`` positions from ``start`` on, in a sequence that will have ``whole`` tokens.

        Where they depend on the length (``dynamic``), decoding takes the cache's, so that all keys are turned alike.
        """
        shape, end = self.shape, start + count
        if shape.rope_scaling == "dynamic" and whole > (shape.rope_original or shape.max_positions):
            cos, sin = position_tables(shape, end, length=whole, device=self.cos.device)
            return cos[start:], sin[start:]
        return self.cos[start:end], self.sin[start:end]

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Logits in fp32 at least; −inf for the rows that pad the vocabulary."""
        logits_BTV = (self.embedding if self.head is None else self.head)(h_BTD)
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        if self.shape.padded_vocab == self.shape.vocab:
            return logits_BTV
        real_V = torch.arange(self.shape.padded_vocab, device=h_BTD.device) < self.shape.vocab
        return torch.where(real_V, logits_BTV, -torch.inf)

    def summed_loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Cross-entropy in nats summed over the scored targets, its logits made a chunk at a time, and what routers decided."""
        decisions = Decisions()
        h_ND = self.hidden(tokens_BT, documents_BT, decisions=decisions).flatten(0, 1)
        head = self.embedding if self.head is None else self.head
        return summed_cross_entropy(h_ND, head.weight, targets_BT.flatten(), self.shape.vocab), decisions.routing

    def log_likelihoods(self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Log-likelihood in nats of each target [B, T], 0 where none is scored, the logits made a chunk at a time."""
        h_ND = self.hidden(tokens_BT, documents_BT).flatten(0, 1)
        head = self.embedding if self.head is None else self.head
        return log_likelihoods(h_ND, head.weight, targets_BT.flatten(), self.shape.vocab).view(targets_BT.shape)

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BT, documents_BT))

    def routed(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Logits, and what each layer's router decided."""
        decisions = Decisions()
        return self.logits(self.hidden(tokens_BT, documents_BT, decisions=decisions)), decisions.routing
