"""Reloads an exported folder as a stranger would: transformers only, offline, no remote code. Run as a script.

    python reload.py FOLDER QUESTION.safetensors TEXTS.json

prints one JSON line: the largest difference of logits, and the token ids of each text and of each chat. It imports nothing of
windtunnel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file


def main(folder: str, question: str, texts: str) -> None:
    """Compares the folder's logits with those in ``question`` and prints what its tokenizer makes of the texts."""
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    asked = load_file(question)
    with torch.no_grad():
        logits = model(asked["tokens"]).logits
    with open(texts, encoding="utf-8") as stream:
        asked_of_it = json.load(stream)
    answer = {
        "difference": float((logits.double() - asked["logits"].double()).abs().max()),
        "ids": [tokenizer(text)["input_ids"] for text in asked_of_it["texts"]],
        "chats": [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in asked_of_it["chats"]
        ],
        "templated": bool(tokenizer.chat_template),
        "ends": model.generation_config.eos_token_id,
        "version": transformers.__version__,
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
