"""Folding: the forward multipliers moved into the weights, so that a plain Llama computes the same logits.

With s, c and m the multipliers of embedding, residual branches and logits:

    E' = s·E      W_output' = c·W_output      W_down' = c·W_down      g_norm' = m·g_norm (untied) or m/s·g_norm (tied)

A tied matrix stays tied: the final norm's gain takes back on the way out what the embedding gained on the way in. Nothing
inside the residual stream changes scale, so the norms' epsilon stays what it was. Training goes on from the unfolded
checkpoint only: folded tensors would need other learning rates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from windtunnel.base.errors import ArtefactError
from windtunnel.model.transformer import Transformer

_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "block_sparse_moe.gate",
}
_EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def fold(model: Transformer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model's weights under the names of transformers' Llama or Qwen3, without the rows that pad the vocabulary.

    Folded in fp64, then cast. A tied head is not stored twice. A mixture of experts gets the names of Mixtral, whose routers
    choose and weigh as ours do: by the k largest logits and the softmax over them.

    Raises:
        ArtefactError: experts are chosen with a bias, or queries and keys of a mixture are normalised: Mixtral knows neither.
    """
    if model.shape.experts > 1 and model.shape.qk_norm:
        fix = "no architecture that loads everywhere has both; train without model.qk_norm to export it"
        raise ArtefactError("export", "expected experts without QK-norm, found both", fix)
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("mlp.bias"):
            if value.abs().max() > 0:
                fix = "decay it with balance by loss (experts.bias = 0) to export it"
                raise ArtefactError(
                    "export", f"expected experts chosen by their logits alone, found a bias in {name}", fix
                )
            continue
        folded = _cast(value.double() * _scale(name, model), name, model, dtype)
        if folded.dim() == 3:
            out |= {expert_name(name, e): part.contiguous() for e, part in enumerate(folded)}
        else:
            out[llama_name(name)] = folded
    return out


def expert_name(name: str, expert: int) -> str:
    """The Mixtral name of one expert's part of one of our parameters."""
    _, number, _, part = name.split(".")
    return f"model.layers.{number}.block_sparse_moe.experts.{expert}.{_EXPERT[part]}.weight"


def llama_name(name: str) -> str:
    """The Llama or Qwen3 name of one of our parameters."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, number, rest = stem.split(".", 2)
    return f"model.layers.{number}.{_LAYER[rest]}.weight"


def _scale(name: str, model: Transformer) -> float:
    multipliers = model.parametrization.multipliers(model.shape)
    if name == "embedding.weight":
        return multipliers.embedding
    if name == "norm.weight":
        return multipliers.logits / (multipliers.embedding if model.shape.tied else 1.0)
    if name.endswith(("attention.output.weight", "mlp.down.weight", "mlp.down")):
        return multipliers.residual
    return 1.0


def _cast(value: Tensor, name: str, model: Transformer, dtype: torch.dtype) -> Tensor:
    if name in ("embedding.weight", "head.weight"):
        value = value[: model.shape.vocab]
    return value.to(dtype).cpu().contiguous()
