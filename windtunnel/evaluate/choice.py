"""Multiple choice by likelihood: the answer whose text the model finds least surprising for its length."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from windtunnel.base.errors import DataError
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.model.transformer import Transformer

_Z = 1.959964


def read_items(path: Path) -> list[dict[str, Any]]:
    """Items ``{"query", "choices", "gold"}`` of a JSONL file.

    Raises:
        DataError: no such file, or a line that is no such item.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(str(path), "expected a readable JSONL file of query, choices, gold", "check the path") from None
    items: list[dict[str, Any]] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            item = json.loads(text)
            good = (
                isinstance(item["query"], str) and len(item["choices"]) > 1 and 0 <= item["gold"] < len(item["choices"])
            )
        except (ValueError, KeyError, TypeError):
            good, item = False, {}
        if not good:
            raise DataError(
                f"{path}:{number}",
                "expected {query, choices, gold} with two choices or more",
                "mend or delete the line",
            )
        items.append(item)
    if not items:
        raise DataError(str(path), "expected items, found none", "check the file")
    return items


@torch.no_grad()
def score_choices(model: Transformer, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval: an item counts if its gold choice has the highest log-likelihood per UTF-8 byte.

    The query is cut from the left if query and choice do not fit into the model's positions.
    """
    items, right = read_items(path), 0
    for item in items:
        values = [_per_byte(model, tokenizer, item["query"], choice) for choice in item["choices"]]
        right += max(range(len(values)), key=lambda i: values[i]) == item["gold"]
    low, high = wilson(right, len(items))
    chance = sum(1 / len(item["choices"]) for item in items) / len(items)
    return {"accuracy": right / len(items), "count": len(items), "low": low, "high": high, "chance": chance}


def _per_byte(model: Transformer, tokenizer: Tokenizer, query: str, choice: str) -> float:
    context = [tokenizer.bos_id, *tokenizer.encode(query)]
    answer = tokenizer.encode(choice if choice.startswith((" ", "\n")) or not query else " " + choice)
    room = model.shape.max_positions
    ids = (context + answer)[-room:]
    count = min(len(answer), len(ids) - 1)
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    logits = model(tokens)[0, -count - 1 : -1]
    loss = F.cross_entropy(logits, tokens[0, -count:], reduction="sum")
    return -float(loss) / max(1, len(choice.encode()))


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). A tie may count half."""
    share, z2 = right / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return min(share, max(0.0, middle - half)), max(
        share, min(1.0, middle + half)
    )  # rounding must not leave the share outside
