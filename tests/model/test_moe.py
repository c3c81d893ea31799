"""Experts: the same numbers as a loop over tokens and as Mixtral's block, and as many parameters as the paper says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from windtunnel.base.errors import RecipeError
from windtunnel.model.family import FAMILIES
from windtunnel.model.moe import Decisions, Experts, expert_counts
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import KeyValueCache, Transformer

SHAPE = Shape(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ff=48, vocab=100, base_width=32, experts=8, top_k=2)


def experts(shape: Shape = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Experts:
    block = Experts(shape, None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return block.to(dtype)


def one_token_after_another(block: Experts, x_ND: torch.Tensor) -> torch.Tensor:
    """What a mixture of experts says, written as slowly and plainly as possible."""
    out = []
    for x_D in x_ND:
        probability_E = (block.router.weight @ x_D).softmax(-1)
        likely = probability_E.tolist()
        best = sorted(range(len(likely)), key=lambda e: -likely[e])[: block.top_k]
        total = sum(probability_E[e] for e in best)
        y_D = torch.zeros_like(x_D)
        for e in best:
            inner = F.silu(block.gate[e] @ x_D) * (block.up[e] @ x_D)
            y_D = y_D + probability_E[e] / total * (block.down[e] @ inner)
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(top_k):
    block = experts(replace(SHAPE, top_k=top_k), dtype=torch.float64)
    x_ND = torch.randn(37, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pull_ND = torch.randn(37, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = [block(x_ND[None])[0], one_token_after_another(block, x_ND)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)
    wanted = [x_ND, *block.parameters()]
    fast, slow = (torch.autograd.grad((value * pull_ND).sum(), wanted) for value in values)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_outputs_and_gradients_are_those_of_mixtrals_block():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block = experts()
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    other = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        other.gate.weight.copy_(block.router.weight)
        other.experts.gate_up_proj.copy_(torch.cat((block.gate, block.up), 1))
        other.experts.down_proj.copy_(block.down)
    inputs = [torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [block(inputs[0]), other(inputs[1])]
    outputs[1] = outputs[1][0] if isinstance(outputs[1], tuple) else outputs[1]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    for output in outputs:
        (output * torch.linspace(-1, 1, 32)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(block.router.weight.grad, other.gate.weight.grad, rtol=1e-5, atol=1e-5)
    pairs = torch.cat((block.gate.grad, block.up.grad), 1), other.experts.gate_up_proj.grad
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block.down.grad, other.experts.down_proj.grad, rtol=1e-5, atol=1e-5)


def test_no_token_is_dropped_where_all_of_them_choose_the_same_experts():
    block = experts()
    with torch.no_grad():
        block.bias[3], block.bias[5] = 1e4, 2e4
    x_BTD = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    decisions = Decisions()
    out = block(x_BTD, decisions)
    logits_NE, chosen_NK = decisions.routing[0]
    assert set(chosen_NK.flatten().tolist()) == {3, 5}
    assert expert_counts(chosen_NK, 8).tolist() == [0, 0, 0, 80, 0, 80, 0, 0]
    weights = logits_NE[:, [3, 5]].softmax(-1)  # the bias chooses and does not weigh
    plain = sum(
        weights[:, i, None]
        * (F.silu(x_BTD @ block.gate[e].T) * (x_BTD @ block.up[e].T) @ block.down[e].T).flatten(0, 1)
        for i, e in enumerate((3, 5))
    )
    torch.testing.assert_close(out.flatten(0, 1), plain, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert block.gate.grad[0].abs().max() == 0 < block.gate.grad[3].abs().max()


def test_the_papers_model_has_13_6_billion_parameters_of_which_4_are_active():
    dense = FAMILIES["minicpm"].shape("2.4B", 122_753)
    shape = replace(dense, experts=8, top_k=2)
    model = Transformer(shape, Parametrization(), device="meta")
    count = sum(p.numel() for name, p in model.named_parameters() if name != "embedding.weight")
    assert count == shape.body == dense.body + 40 * (7 * 3 * 2304 * 5760 + 8 * 2304)
    assert shape.body == pytest.approx(13.6e9, rel=2e-3)
    assert shape.active == dense.body + 40 * (3 * 2304 * 5760 + 8 * 2304)
    assert shape.active == pytest.approx(4.03e9, rel=2e-3)
    router = Parametrization().rule(Role.ROUTER, shape)
    assert router.init_std**2 == pytest.approx(0.01)
    assert router.lr_multiplier == pytest.approx(1 / 9)
    assert {model.roles[f"layers.0.mlp.{name}"] for name in ("gate", "up", "down")} == {Role.HIDDEN}
    matrices = shape.active - 40 * 2 * 2304 - 2304
    assert shape.flops_per_token(4096).body == 6 * matrices
    assert shape.flops_per_token(4096).head == dense.flops_per_token(4096).head


def test_a_dense_shape_is_what_it_was_before_there_were_experts():
    dense = replace(SHAPE, experts=1, top_k=1)
    assert {"experts", "top_k"}.isdisjoint(dense.to_dict())
    assert Shape(**dense.to_dict()) == dense
    assert Shape(**SHAPE.to_dict()) == SHAPE
    assert dense.active == dense.body
    for wrong in (0, 9):
        with pytest.raises(RecipeError, match="number of experts, 8"):
            replace(SHAPE, top_k=wrong)


def test_token_after_token_gives_the_logits_of_the_whole_row():
    model = Transformer(SHAPE, Parametrization())
    model.init_weights(0)
    tokens_BT = torch.randint(0, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(model, 12)
    parts = [model.logits(model.hidden(tokens_BT[:, i : i + 1], cache=cache)) for i in range(12)]
    torch.testing.assert_close(torch.cat(parts, 1)[..., :100], model(tokens_BT)[..., :100], rtol=0, atol=1e-4)


def test_in_bf16_the_router_still_computes_in_fp32():
    model = Transformer(SHAPE, Parametrization(), compute_dtype=torch.bfloat16)
    model.init_weights(0)
    tokens_BT = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    logits, routing = model.routed(tokens_BT)
    assert {decided[0].dtype for decided in routing} == {torch.float32}
    logits[..., :100].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
