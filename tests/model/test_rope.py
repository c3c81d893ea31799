"""Rotary positions: the frequencies of transformers' functions, and tables that decoding and whole rows agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from windtunnel.base.errors import RecipeError, UserError
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.export.folding import fold
from windtunnel.export.huggingface import llama_config
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.rope import frequencies, position_tables
from windtunnel.model.sample import generate
from windtunnel.model.serving import DynamicNtk
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import KeyValueCache, Transformer

SHAPE = Shape(32, 2, 2, 2, 16, 48, 100, 32, max_positions=512)
LONG = replace(SHAPE, head_dim=64, max_positions=16384, rope_factor=4.0, rope_original=4096)


@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic", "yarn"])
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (1e6, 128), (5e4, 16)])
@pytest.mark.parametrize("length", [100, 4096, 9000])
def test_frequencies_are_those_of_transformers(scaling, theta, head_dim, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = replace(LONG, rope_scaling=scaling, rope_theta=theta, head_dim=head_dim)
    if scaling == "none":
        wanted, grown = 1 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim), 1.0
    else:
        config = LlamaConfig(
            hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=4096,
            rope_parameters={"rope_type": scaling, "factor": 4.0, "rope_theta": theta, "original_max_position_embeddings": 4096},
        )  # fmt: skip
        wanted, grown = ROPE_INIT_FUNCTIONS[scaling](config, device="cpu", seq_len=length)
    torch.testing.assert_close(frequencies(shape, length).double(), wanted.double(), rtol=2e-6, atol=0)
    cos, sin = position_tables(shape, 50, length=length)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, grown), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.atan2(sin, cos)[1].double(), wanted.double(), rtol=1e-5, atol=1e-7)


def test_ntk_divides_the_slowest_frequency_by_the_factor_and_leaves_the_fastest():
    plain, stretched = frequencies(LONG), frequencies(replace(LONG, rope_scaling="ntk"))
    assert stretched[0] == plain[0]
    assert (plain[-1] / stretched[-1]).item() == pytest.approx(4.0, rel=1e-5)
    assert (plain / stretched).diff().min() > 0


def test_dynamic_positions_are_the_plain_ones_up_to_the_trained_length_and_decoding_agrees_with_the_row_beyond():
    shape = replace(SHAPE, rope_scaling="dynamic", rope_factor=4.0, rope_original=16, max_positions=64)
    models = [Transformer(s, Parametrization()) for s in (shape, SHAPE)]
    for model in models:
        model.init_weights(0)
    tokens_BT = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    short, long = tokens_BT[:, :16], tokens_BT
    torch.testing.assert_close(models[0](short), models[1](short), rtol=0, atol=0)
    whole = models[0](long)
    assert (whole - models[1](long))[..., :100].abs().max() > 1e-3
    cache = KeyValueCache(models[0], 40)
    parts = [models[0].logits(models[0].hidden(long[:, i : i + 1], cache=cache)) for i in range(40)]
    torch.testing.assert_close(torch.cat(parts, 1)[..., :100], whole[..., :100], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [40, 64, 65, 200])
def test_a_model_served_with_dynamic_ntk_is_transformers_with_that_config_below_and_beyond(length):
    from transformers import LlamaConfig, LlamaForCausalLM

    trained = replace(SHAPE, rope_theta=1e6, rope_scaling="ntk", rope_factor=4.0, rope_original=32, max_positions=128)
    model = Transformer(trained, Parametrization())
    model.init_weights(0)
    served = model.placed(DynamicNtk.parse("4@64").of(trained))
    config = llama_config(served.shape, torch.float32, Tokenizer)
    assert config["rope_scaling"] == config["rope_parameters"] | {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 1e6,
    }
    assert config["max_position_embeddings"] == 64
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    llama.load_state_dict(fold(served), strict=False)
    tokens_BT = torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = llama(tokens_BT).logits, served(tokens_BT)[..., :100]
    assert (found - wanted).abs().max() <= 1e-4
    plain = model.placed(replace(trained, rope_scaling="none", rope_factor=1.0, rope_original=0, max_positions=256))
    assert torch.equal(served(tokens_BT), plain(tokens_BT)) == (length <= 64)


def test_by_default_dynamic_ntk_leaves_the_trained_positions_as_they_are_and_reaches_beyond():
    for changes in ({}, {"rope_scaling": "ntk", "rope_factor": 4.0, "rope_original": 16}):
        model = Transformer(replace(SHAPE, max_positions=64, **changes), Parametrization())
        model.init_weights(0)
        served = model.placed(DynamicNtk(2.0).of(model.shape))
        assert served.shape.max_positions == 128
        tokens_BT = torch.randint(0, 100, (1, 100), generator=torch.Generator().manual_seed(0))
        assert torch.equal(served(tokens_BT[:, :64]), model(tokens_BT[:, :64]))
        prompt = tokens_BT[0].tolist()
        assert len(list(generate(served, prompt, max_new=20))) == 20
        with pytest.raises(RecipeError, match="expected at most 64 tokens"):
            generate(model, prompt, max_new=20)
        assert served.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_what_dynamic_ntk_cannot_be_is_one_line():
    assert str(DynamicNtk.parse("4.0@65536")) == "4@65536"
    assert DynamicNtk.parse(4) == DynamicNtk(4.0)
    for wrong in ("", "x", "4@", "4@x", "0.5", "4@-1", "inf", "nan"):
        with pytest.raises(
            UserError, match=r"--dynamic-ntk: expected FACTOR or FACTOR@TOKENS, such as 4 or 4@65536, got"
        ):
            DynamicNtk.parse(wrong)
    for scaling in ("linear", "yarn", "dynamic"):
        with pytest.raises(UserError, match=f"expected positions as they are or with static NTK, got '{scaling}'"):
            DynamicNtk(4.0).of(replace(LONG, rope_scaling=scaling))


def test_positions_that_were_never_stretched_leave_a_shape_as_it_was_and_nonsense_is_refused():
    assert not [name for name in SHAPE.to_dict() if name.startswith("rope_") and name != "rope_theta"]
    assert Shape(**LONG.to_dict()) == LONG
    with pytest.raises(RecipeError, match=r"rope\.scaling: expected none, linear"):
        replace(SHAPE, rope_scaling="magic")
    with pytest.raises(RecipeError, match=r"rope\.factor"):
        replace(SHAPE, rope_factor=0.5)
