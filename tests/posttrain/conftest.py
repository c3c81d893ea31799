"""Chats and pairs of made-up text, a parent to grow from, and the same model in transformers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import Tokenizer, train
from windtunnel.export.folding import fold, llama_name
from windtunnel.export.huggingface import llama_config
from windtunnel.model.adapters import adapters
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.lora import Lora

PLAIN = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)
"""Under the standard parametrization every multiplier is 1, so that our tensors are a Llama's, gradients too."""


def answer_to(seed: int) -> tuple[str, str]:
    draw = random.Random(seed)
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    return train([" ".join(answer_to(seed)) + "\nuser\nassistant\n" for seed in range(300)], PLAIN.vocab)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Tokenizer) -> Corpus:
    """Questions with answers, one or two turns."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for seed in range(160):
        turns = [answer_to(seed), answer_to(seed + 1000)][: 1 + seed % 2]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clean: Any = {"near": False}
    config = SourceConfig(source=("chats.jsonl",), messages="messages", heldout=0.1, clean=clean, minimum_characters=8)
    return build_corpus(config, chat_tokenizer, folder / "chats", name="chats", downloads=folder, base=folder)


@pytest.fixture(scope="session")
def twin() -> Callable[[], tuple[Transformer, Any]]:
    """The same weights as our model and as a Llama of transformers, with gains that are not all one."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0) -> tuple[Transformer, Any]:
        model = Transformer(replace(PLAIN, tied=False), Parametrization.named("standard"))
        model.init_weights(seed)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + 1)
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        llama = LlamaForCausalLM(LlamaConfig(**llama_config(model.shape, torch.float32, Tokenizer)))
        llama.load_state_dict(fold(model))
        return model, llama

    return make


@pytest.fixture(scope="session")
def share_adapters() -> Callable[[Transformer, Any], dict[str, torch.nn.Parameter]]:
    """Fills a model's adapters with numbers, copies them into those of its twin under peft, and gives peft's by our names."""

    def share(model: Transformer, theirs: Any) -> dict[str, torch.nn.Parameter]:
        parameters, out = dict(theirs.named_parameters()), {}
        for name, value in sorted(adapters(model).items()):
            stem, _, side = name.rpartition(".")
            which = {"down": "lora_A", "up": "lora_B"}[side]
            inner = llama_name(f"{stem}.weight").removesuffix(".weight")
            out[name] = parameters[f"base_model.model.{inner}.{which}.default.weight"]
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
                out[name].copy_(value)
        assert {id(p) for p in parameters.values() if p.requires_grad} == {id(p) for p in out.values()}
        return out

    return share


@pytest.fixture(scope="session")
def lora_config() -> Callable[[Lora], Any]:
    """Our adapters as peft's configuration."""

    def make(lora: Lora) -> Any:
        from peft import LoraConfig

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names, lora_dropout=0.0, bias="none")

    return make


@pytest.fixture
def trainer_arguments(tmp_path: Path) -> dict[str, Any]:
    """What every trainer of trl is told here."""
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "activation_checkpointing": False,
    }


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """A tokenizer that trl's trainers accept; the tests hand them ids."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
