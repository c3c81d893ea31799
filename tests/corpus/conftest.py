"""Small corpora that the tests of this room share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import Tokenizer, train

WORDS = (
    "river", "stone", "light", "winter", "garden", "bread", "silver", "morning", "quiet", "window", "letter", "forest",
    "harbour", "candle", "mountain", "story", "teacher", "engine", "copper", "village", "music", "paper", "field", "summer",
    "glass", "bridge", "cloud", "orange", "shadow", "market",
)  # fmt: skip


def make_prose(seed: int, words: int = 60) -> str:
    """Made-up sentences, different for each seed."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        length = draw.randint(4, 12)
        sentences.append(
            " ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + f" {draw.randint(0, 9999)}."
        )
        words -= length
    return " ".join(sentences)


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prose() -> Callable[..., str]:
    return make_prose


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[dict]], Path]:
    return write_records


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([make_prose(seed) for seed in range(300)] + ["user\nassistant\nsystem\n" * 3], 400)


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Corpus]:
    """Builds a corpus of made-up text; ``chats=True`` makes chats."""

    def make(name: str = "prose", documents: int = 120, seed: int = 0, chats: bool = False, **settings) -> Corpus:
        seeds = range(1000 * seed, 1000 * seed + documents)
        if chats:
            records = [
                {
                    "messages": [
                        {"role": "user", "content": make_prose(s, 8)},
                        {"role": "assistant", "content": make_prose(s + 500, 20)},
                    ]
                }
                for s in seeds
            ]
            settings["messages"] = "messages"
        else:
            records = [{"text": make_prose(s, 10 + s % 90)} for s in seeds]
        path = write_records(tmp_path / f"{name}.jsonl", records)
        config = SourceConfig(source=(str(path),), heldout=settings.pop("heldout", 0.2), **settings)
        return build_corpus(config, tokenizer, tmp_path / name, name=name, downloads=tmp_path, base=tmp_path)

    return make
