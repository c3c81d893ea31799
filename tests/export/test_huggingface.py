"""Export: the folded model is the trained model, in transformers and in a plain Llama; anything else is not exported."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from windtunnel.base.artefact import read_manifest
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.corpus.chat import CHATML_JINJA, MINICPM_JINJA
from windtunnel.corpus.tokenizer import Tokenizer, train
from windtunnel.export import folding, huggingface
from windtunnel.export.card import CardFacts, render_card
from windtunnel.export.folding import fold
from windtunnel.export.huggingface import export_huggingface, llama_config
from windtunnel.export.llama import llama_logits
from windtunnel.model.parametrization import Parametrization, rebase
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

VOCAB = 300
SHAPE = Shape(
    width=64, layers=3, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=VOCAB, base_width=16, max_positions=128
)
CARD = CardFacts("tiny-test", 6_400_000, {"wiki": 1.2345}, {"wiki": {"licence": "CC-BY-SA-4.0", "tokens": 1_000_000}})
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew", "coffee"]
    return train((" ".join(words[i % 12 : i % 12 + 5]) + f" {i}.\n" for i in range(2000)), VOCAB)


@pytest.fixture(scope="module")
def tokenizer_json(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tokenizer.save(folder)
    return folder / "tokenizer.json"


def _model(
    dtype: torch.dtype = torch.float32, parametrization: Parametrization | None = None, **changes
) -> Transformer:
    """A model whose gains are not all one and whose blocks matter, as after training."""
    model = Transformer(replace(SHAPE, **changes), parametrization or Parametrization()).to(dtype)
    model.init_weights(0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def _tokens(model: Transformer) -> torch.Tensor:
    return torch.randint(0, model.shape.vocab, (2, 48), generator=torch.Generator().manual_seed(2))


def test_a_model_that_saw_no_chats_has_no_chat_template(tokenizer_json: Path, tmp_path: Path) -> None:
    said = export_huggingface(_model(), tokenizer_json, tmp_path / "base", CARD, chats=False)
    assert "logits agree" in said
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    assert "chat" not in (tmp_path / "base" / "README.md").read_text(encoding="utf-8").lower()


@needs_transformers
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("name", ["mup", "standard", "rebased", "completep"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_transformers_gives_the_same_logits(
    name, qk_norm: bool, tied: bool, dtype: torch.dtype, limit: float, tokenizer: Tokenizer
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, reference = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    shape = replace(SHAPE, tied=tied, qk_norm=qk_norm)
    parametrization = Parametrization() if name == "rebased" else Parametrization.named(name)
    if name == "rebased":
        parametrization, shape = rebase(parametrization, shape, 48)
    model = _model(dtype, parametrization, tied=tied, base_width=shape.base_width, qk_norm=qk_norm)
    llama = reference(config(**llama_config(shape, dtype, tokenizer))).to(dtype).eval()
    missing, unexpected = llama.load_state_dict(fold(model, dtype), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    llama.tie_weights()
    tokens = _tokens(model)
    with torch.no_grad():
        got, wanted = llama(tokens).logits, model(tokens)
    assert got.shape[-1] == VOCAB < wanted.shape[-1]
    assert (got - wanted[..., :VOCAB]).abs().max() <= limit
    assert wanted[..., :VOCAB].std() > 0.1


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plain_decoder_gives_the_same_logits(
    tied: bool, qk_norm: bool, tokenizer_json: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    model = _model(tied=tied, qk_norm=qk_norm)
    check = export_huggingface(model, tokenizer_json, tmp_path / "out", CARD)
    assert "plain decoder" in check
    tokens = _tokens(model)
    exact = _model(torch.float64, tied=tied, qk_norm=qk_norm)
    difference = llama_logits(tmp_path / "out", tokens) - exact(tokens)[..., :VOCAB]
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("part", ["embedding", "norm", "attention.output", "mlp.down"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_each_scale_that_is_left_out_fails_the_export(
    part: str, tied: bool, tokenizer_json: Path, tmp_path: Path, monkeypatch
) -> None:
    scale = folding._scale
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        folding,
        "_scale",
        lambda name, model: 1.0 if name.endswith(f"{part}.weight") and "_norm" not in name else scale(name, model),
    )
    with pytest.raises(ArtefactError, match="logits differ"):
        export_huggingface(_model(tied=tied), tokenizer_json, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []  # nothing is left that looks exported


@pytest.mark.parametrize("alone", [True, False], ids=["from the files alone", "transformers"])
def test_a_mixture_of_experts_loads_as_a_mixtral(alone, tokenizer_json: Path, tmp_path: Path, monkeypatch) -> None:
    if alone:
        monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    elif importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    model = _model(experts=4, top_k=2)
    check = export_huggingface(model, tokenizer_json, tmp_path / "out", CARD)
    assert ("plain decoder" if alone else "transformers") in check
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["num_local_experts"]) == (["MixtralForCausalLM"], 4)
    model.layers[1].mlp.bias[2] = 0.25
    with pytest.raises(ArtefactError, match=r"found a bias in layers\.1"):
        export_huggingface(model, tokenizer_json, tmp_path / "out", CARD)
    with pytest.raises(ArtefactError, match="expected experts without QK-norm"):
        export_huggingface(_model(experts=4, top_k=2, qk_norm=True), tokenizer_json, tmp_path / "other", CARD)


@pytest.mark.parametrize("alone", [True, False], ids=["from the files alone", "transformers"])
@pytest.mark.parametrize(
    "scaling", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "ntk", "dynamic")), "yarn"]
)
def test_stretched_positions_are_exported_as_they_are(
    scaling, alone, tokenizer_json: Path, tmp_path: Path, monkeypatch
) -> None:
    if alone:
        monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    elif importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    model = _model(tied=False, rope_scaling=scaling, rope_factor=4.0, rope_original=16)
    check = export_huggingface(
        model, tokenizer_json, tmp_path / "out", CARD
    )  # of 64 positions, four times the trained ones
    assert ("plain decoder" if alone else "transformers") in check
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == ("default" if scaling == "ntk" else scaling)
    wrong = _model(tied=False, rope_scaling=scaling, rope_factor=2.0, rope_original=16)
    tokenizer = huggingface._tokenizer(tokenizer_json, model.shape)
    with pytest.raises(ArtefactError, match="logits differ"):
        huggingface.check_export(tmp_path / "out", wrong, tokenizer, torch.float32)


@needs_transformers
def test_a_fresh_offline_process_loads_the_folder(tokenizer_json: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    check = export_huggingface(_model(), tokenizer_json, out, CARD)
    assert re.fullmatch(r"logits agree to \d\.\de-\d\d: transformers [\d.]+ in a fresh offline process", check)
    assert {p.name for p in out.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["head_dim"], config["tie_word_embeddings"]) == (VOCAB, 16, True)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 4]
    weights = load_file(out / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (VOCAB, 64)
    assert "lm_head.weight" not in weights
    read_manifest(out, "huggingface")
    assert not any(str(tmp_path) in p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")
    # An earlier export is replaced; here by an untied model in bf16.
    assert "transformers" in export_huggingface(_model(tied=False), tokenizer_json, out, CARD, dtype=torch.bfloat16)
    weights = load_file(out / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16


@needs_transformers
def test_a_model_with_qk_norm_is_a_qwen3_to_a_fresh_offline_process(tokenizer_json: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert "in a fresh offline process" in export_huggingface(_model(qk_norm=True), tokenizer_json, out, CARD)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert load_file(out / "model.safetensors")["model.layers.0.self_attn.q_norm.weight"].shape == (16,)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "loads as a plain Qwen3" in card
    assert '"qwen3"' in card


@needs_transformers
def test_a_tokenizer_that_renders_otherwise_fails_the_export(tokenizer_json: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface, "CHATML_JINJA", "{{ messages[0]['content'] }}")
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ArtefactError, match="other ids"):
            export_huggingface(_model(), tokenizer_json, tmp_path / "out", CARD)
        assert not (tmp_path / "out").exists()


MERGED = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- 'A: ' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{{- 'Q: ' + m.content + '\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- 'A: ' }}{%- endif %}"
)
"""As one text, a full stop and the line end behind it are one token."""


@pytest.mark.parametrize("alone", [True, False], ids=["from the files alone", "transformers"])
def test_a_template_other_than_chatml_is_exported_where_one_text_gives_the_ids_of_training(
    alone, tokenizer_json: Path, tmp_path: Path, monkeypatch
) -> None:
    if alone:
        monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    elif importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    cases = [("minicpm", MINICPM_JINJA, "</s>", [2]), (MERGED, None, "<|im_end|>", [2, 4])]
    if alone:  # loading transformers takes a while
        cases.append((CHATML_JINJA, CHATML_JINJA, "<|im_end|>", [2, 4]))
    for number, (template, text, end, stops) in enumerate(cases):
        out = tmp_path / str(number)
        check = export_huggingface(_model(), tokenizer_json, out, CARD, template=template)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == stops
        assert f"an answer ends with `{end}`." in card
        assert (out / "chat_template.jinja").exists() == (text is not None)
        assert ("There is no chat template" in card) == ("the chat template is left out" in check) == (text is None)
        assert ("which is not ChatML" in card) == (text is not None)
        if text is not None:
            assert (out / "chat_template.jinja").read_text(encoding="utf-8") == text
        read_manifest(out, "huggingface")


def test_a_wrong_config_fails_the_export(tokenizer_json: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    right = llama_config(SHAPE, torch.float32, Tokenizer)
    for wrong in ({"rope_parameters": {"rope_theta": 500.0}}, {"rms_norm_eps": 0.1}, {"num_hidden_layers": 2}):
        monkeypatch.setattr(huggingface, "llama_config", lambda *_, wrong=wrong: {**right, **wrong})
        with pytest.raises(ArtefactError, match="logits differ"):
            export_huggingface(_model(), tokenizer_json, tmp_path / "out", CARD)


def test_what_is_in_the_way_or_does_not_fit_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="something else"):
        export_huggingface(_model(), tokenizer_json, tmp_path / "out", CARD)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ArtefactError, match="301"):
        export_huggingface(_model(vocab=301), tokenizer_json, tmp_path / "new", CARD)
    with pytest.raises(ArtefactError, match="found none"):
        export_huggingface(_model(), tmp_path / "absent.json", tmp_path / "new", CARD)
    assert not (tmp_path / "new").exists()


def test_the_card_has_metadata_and_no_paths() -> None:
    card = render_card(CARD, SHAPE, chats=True)
    _, metadata, body = card.split("---\n", 2)
    values = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in metadata.splitlines())}
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    assert values["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.2345
    assert "CC-BY-SA-4.0" in body
    assert "6.4M" in body
    assert "No licence was chosen" in body
    for bad in ("/home/someone/run", "C:\\runs", " "):
        with pytest.raises(UserError, match="plain name"):
            CardFacts(bad)
