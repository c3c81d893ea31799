"""A Hugging Face folder that loads as a plain Llama (Qwen3 with QK-norm, Mixtral with experts), reloaded and compared."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from windtunnel.base.artefact import read_manifest, write_artefact
from windtunnel.base.errors import ArtefactError
from windtunnel.corpus.chat import CHATML_JINJA, Message, ends_of, jinja_of, render, stop_ids
from windtunnel.corpus.chat_template import rendered
from windtunnel.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from windtunnel.export.card import CardFacts, architecture, render_card
from windtunnel.export.folding import fold
from windtunnel.export.llama import llama_logits
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

KIND = "huggingface"
_TEMPLATE, _CARD = "chat_template.jinja", "README.md"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit after reloading, relative to the largest logit where that exceeds 1, by type of the weights."""
_DYNAMIC = 1024
"""Most positions for whose sake an export is compared beyond the length from which on dynamic NTK counts."""
_CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hi, who are you?"}, {"role": "assistant", "content": "“A model.”"},
     {"role": "user", "content": "7 + 8"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 世界, (as code)."}],
)  # fmt: skip
"""What is asked for comparison: contents that begin and end with letters, digits and full stops."""
_APART = "the chat template is left out: on a whole text it gives other ids than in training"
_TEXTS = ("Hello, world!", " Two  spaces\n\n and 12345 digits", "naïve café 世界 🙂")


def export_huggingface(
    model: Transformer, tokenizer_json: Path, out: Path, card: CardFacts, *, dtype: torch.dtype = torch.float32,
    chats: bool = True, template: str = "chatml",
) -> str:  # fmt: skip
    """Writes the folder and returns one line that says which check it passed.

    With transformers installed, a fresh offline process loads the folder with ``AutoModelForCausalLM`` and ``AutoTokenizer``
    and compares logits and token ids; without, a plain decoder written from the files alone compares the logits. A folder
    that fails is not left behind.

    Marks that are plain text may share a token with what stands beside them where a chat is tokenised as one string, and in
    training they do not. Where that happens, the folder has no chat template, and its card and the line say so. ChatML has
    control tokens on both sides of each content; there another id is an error.

    Args:
        model: unfolded, as trained.
        tokenizer_json: the trained tokenizer's file.
        out: the folder; an earlier export there is replaced, anything else is refused.
        card: what the model card says.
        dtype: of the stored weights.
        chats: whether the model has learnt any; a template without them would promise answers that it cannot give.
        template: of the chats that it has learnt.

    Raises:
        ArtefactError: the tokenizer is not the model's, ``out`` holds something else, or the comparison failed.
    """
    tokenizer = _tokenizer(tokenizer_json, model.shape)
    _refuse_to_overwrite(out)
    config = {
        "shape": model.shape.to_dict(),
        "parametrization": model.parametrization.to_dict(),
        "dtype": str(dtype)[6:],
    }
    with write_artefact(out, KIND, config) as folder:
        save_file(fold(model, dtype), folder / "model.safetensors", metadata={"format": "pt"})
        for name, text in _files(model.shape, tokenizer, card, dtype, chats, template).items():
            (folder / name).write_text(text, encoding="utf-8")
        check, same = check_export(folder, model, tokenizer, dtype, chats, template)
        if same:
            return check
        (folder / _TEMPLATE).unlink()
        told = render_card(card, model.shape, chats=True, template=None, ends=ends_of(template))
        (folder / _CARD).write_text(told, encoding="utf-8")
        return f"{check}; {_APART}"


def _tokenizer(path: Path, shape: Shape) -> Tokenizer:
    if not path.is_file():
        raise ArtefactError(
            str(path), "expected the tokenizer's file, found none", "give the tokenizer that the model was trained with"
        )
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    if tokenizer.vocab_size != shape.vocab:
        problem = f"expected a vocabulary of {shape.vocab} entries as in the model, found {tokenizer.vocab_size}"
        raise ArtefactError(str(path), problem, "give the tokenizer that the model was trained with")
    return tokenizer


def _refuse_to_overwrite(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_manifest(out, KIND, verify=False)
    except ArtefactError:
        raise ArtefactError(
            str(out), "expected a new folder or an earlier export, found something else", "choose another"
        ) from None


def _files(
    shape: Shape, tokenizer: Tokenizer, card: CardFacts, dtype: torch.dtype, chats: bool, template: str
) -> dict[str, str]:
    pad, bos, eos = SPECIAL_TOKENS[:3]
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer_config = {
        **special, "additional_special_tokens": list(SPECIAL_TOKENS[3:]), "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(stop_ids(tokenizer, template)),
        "pad_token_id": tokenizer.pad_id,
    }
    texts: dict[str, Any] = {
        "config.json": llama_config(shape, dtype, tokenizer),
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": {**special, "additional_special_tokens": list(SPECIAL_TOKENS[3:])},
    }
    return {
        **{name: json.dumps(value, indent=2) + "\n" for name, value in texts.items()},
        "tokenizer.json": tokenizer.to_json(add_bos=True),
        **({_TEMPLATE: CHATML_JINJA if template == "chatml" else jinja_of(template)} if chats else {}),
        _CARD: render_card(card, shape, chats=chats, template=template, ends=ends_of(template)),
    }


def llama_config(shape: Shape, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json. Theta and dtype stand there twice: old and new readers look in different places, and a default would be
    silently wrong.

    With QK-norm it is Qwen3's, which is a Llama with an RMSNorm of each query and key head before the rotation; with experts
    it is Mixtral's. Options for sliding windows are off.
    """
    name, rope = architecture(shape), rope_parameters(shape)
    mixture = {
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **({"use_sliding_window": False} if shape.qk_norm else {"mlp_bias": False}),
        "hidden_size": shape.width,
        "intermediate_size": shape.ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.rope_original if shape.rope_scaling == "dynamic" else shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        **({} if rope["rope_type"] == "default" else {"rope_scaling": rope}),
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": str(dtype)[6:],
        "torch_dtype": str(dtype)[6:],
        **(mixture if shape.experts > 1 else {}),
    }


def rope_parameters(shape: Shape) -> dict[str, Any]:
    """How positions are turned, in transformers' words. ``ntk`` is a larger base and nothing else, so it is written as that."""
    theta, d = shape.rope_theta, shape.head_dim
    if shape.rope_scaling in ("none", "ntk"):
        grown = shape.rope_factor ** (d / (d - 2)) if shape.rope_scaling == "ntk" else 1.0
        return {"rope_type": "default", "rope_theta": theta * grown}
    original = shape.rope_original or shape.max_positions
    return {
        "rope_type": shape.rope_scaling, "rope_theta": theta, "factor": shape.rope_factor,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def check_export(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    chats: bool = True,
    template: str = "chatml",
) -> tuple[str, bool]:
    """Compares a written folder with the model that it came from.

    Returns:
        What was checked, and whether chats under the folder's template have the ids of training.

    Raises:
        ArtefactError: logits or token ids differ, those of chats under ChatML included.
    """
    length = min(64, model.shape.max_positions)
    if model.shape.rope_scaling == "dynamic" and model.shape.rope_original <= _DYNAMIC:
        length = min(model.shape.rope_original + 32, model.shape.max_positions)  # where it begins to count
    tokens_BT = torch.randint(0, model.shape.vocab, (2, length), generator=torch.Generator().manual_seed(0))
    logits = _own_logits(model, tokens_BT)
    asked = _CHATS if chats else ()
    if importlib.util.find_spec("transformers") is None:
        difference = float((llama_logits(folder, tokens_BT) - logits).abs().max())
        who, found = "a plain decoder from the files alone", [_as_one_text(folder, chat) for chat in asked]
    else:
        difference, who, found = _reloaded(folder, tokens_BT, logits, tokenizer, asked)
    same = found == [render(chat, tokenizer, template, add_generation_prompt=True)[0] for chat in asked]
    if template == "chatml" and not same:
        raise _other_ids()
    limit = TOLERANCE[dtype] * max(1.0, float(logits.abs().max()))
    if not difference <= limit:
        problem = f"logits differ by {difference:.2g} after reloading, {limit:.2g} is allowed ({who})"
        raise ArtefactError("export", problem, "please report this: the folder was not written")
    return f"logits agree to {difference:.1e}: {who}", same


def _other_ids() -> ArtefactError:
    return ArtefactError(
        "export", "the reloaded tokenizer gives other ids", "please report this: the folder was not written"
    )


def _as_one_text(folder: Path, chat: list[Message]) -> list[int]:
    """The ids of a chat that is rendered to a text first and tokenised then, as other libraries do."""
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = rendered((folder / _TEMPLATE).read_text(encoding="utf-8"), chat, prompt=True)
    return written.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def _own_logits(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Logits of the real vocabulary with activations in the weights' own type, on the CPU."""
    before, model.compute_dtype = model.compute_dtype, None
    try:
        return model(tokens_BT.to(model.embedding.weight.device))[..., : model.shape.vocab].cpu().contiguous()
    finally:
        model.compute_dtype = before


def _reloaded(
    folder: Path, tokens_BT: Tensor, logits: Tensor, tokenizer: Tokenizer, chats: tuple[list[Message], ...]
) -> tuple[float, str, list[list[int]]]:
    """The largest difference of logits in a fresh process without network, and the ids of chats; those of texts must be equal."""
    with tempfile.TemporaryDirectory() as temporary:
        question, texts = Path(temporary, "question.safetensors"), Path(temporary, "texts.json")
        save_file({"tokens": tokens_BT, "logits": logits}, question)
        texts.write_text(json.dumps({"texts": _TEXTS, "chats": chats}), encoding="utf-8")
        command = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("reload.py")),
            str(folder),
            str(question),
            str(texts),
        ]
        offline = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtefactError("export", f"transformers cannot load the folder: {last}", "the folder was not written")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    wanted = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in _TEXTS]
    if answer["ids"] != wanted or answer["templated"] != bool(chats):
        raise _other_ids()
    return answer["difference"], f"transformers {answer['version']} in a fresh offline process", answer["chats"]
