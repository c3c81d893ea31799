"""A plain Llama, Qwen3 or Mixtral as the files say, written from an exported folder alone: the check without transformers.

It shares nothing with ``windtunnel.model``: what it computes is what the files say.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def llama_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of an exported folder, in fp64."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    x = weights["model.embed_tokens.weight"][tokens_BT]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = x + _attention(
            weights, f"{layer}.self_attn", _norm(x, weights[f"{layer}.input_layernorm.weight"], config), config
        )
        y = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config)
        x = x + (_mixture if "num_local_experts" in config else _mlp)(weights, layer, y, config)
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], config) @ head.T


def _mlp(weights: dict[str, Tensor], layer: str, y: Tensor, config: dict) -> Tensor:
    gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return _swiglu(y, gate, up, down)


def _swiglu(y: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    opened = y @ gate.T
    return (opened * torch.sigmoid(opened) * (y @ up.T)) @ down.T


def _mixture(weights: dict[str, Tensor], layer: str, y: Tensor, config: dict) -> Tensor:
    """Every expert on every token, weighted by its share, which is zero for all but the likeliest few."""
    block = f"{layer}.block_sparse_moe"
    share = (y @ weights[f"{block}.gate.weight"].T).softmax(-1)
    least = share.topk(config["num_experts_per_tok"], dim=-1).values[..., -1:]
    share = torch.where(share >= least, share, 0.0)
    share = share / share.sum(-1, keepdim=True)
    parts = (
        _swiglu(y, *(weights[f"{block}.experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2")))
        for e in range(config["num_local_experts"])
    )
    return sum((share[..., e, None] * part for e, part in enumerate(parts)), torch.zeros_like(y))


def _norm(x: Tensor, gain: Tensor, config: dict) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * gain


def _attention(weights: dict[str, Tensor], name: str, x: Tensor, config: dict) -> Tensor:
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
    rows, length, _ = x.shape
    q, k = q.view(rows, length, heads, size), k.view(rows, length, groups, size)
    if config["model_type"] == "qwen3":
        q, k = (_norm(x, weights[f"{name}.{part}_norm.weight"], config) for x, part in ((q, "q"), (k, "k")))
    q, k = _turn(q, config), _turn(k, config).repeat_interleave(heads // groups, 2)
    v = v.view(rows, length, groups, size).repeat_interleave(heads // groups, 2)
    score = torch.einsum("bthk,bshk->bhts", q, k) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhts,bshk->bthk", score.masked_fill(future, -torch.inf).softmax(-1), v)
    return mixed.flatten(2) @ weights[f"{name}.o_proj.weight"].T


def _turn(x: Tensor, config: dict) -> Tensor:
    """Rotates pair (i, i + half) of each head by position · theta^(−i/half)."""
    half = x.shape[-1] // 2
    speed = config["rope_parameters"]["rope_theta"] ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half], x[..., half:])
    angle = torch.arange(x.shape[1]).double()[:, None] * speed
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)
