"""Chats that cannot be learnt from: one line that names file, line and way out, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from windtunnel.base.errors import ArtefactError, DataError
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.packing import row_index
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.posttrain.soup import soup_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.average import load_average
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.stage import AdamW

PLAIN = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)


def turn(role: str, content: Any = "Four plus four is eight.") -> dict[str, Any]:
    return {"role": role, "content": content}


def build(folder: Path, tokenizer: Tokenizer, last: list[dict[str, Any]], **settings: Any) -> Corpus:
    good = [[turn("user", f"What is {i} plus 1?"), turn("assistant", f"It is {i + 1}.")] for i in range(40)]
    lines = [json.dumps({"messages": messages}) for messages in (*good[:3], last, *good[3:])]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clean: Any = {"near": False}
    config = SourceConfig(
        source=("chats.jsonl",), messages="messages", heldout=0.2, clean=clean, minimum_characters=8, **settings
    )
    return build_corpus(config, tokenizer, folder / "chats", name="chats", downloads=folder, base=folder)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([turn("human"), turn("assistant")], "turn 1: expected the role system, user or assistant, got 'human'"),
        ([turn("user"), turn("system")], "turn 2: expected the role assistant, got system"),
        ([turn("user"), turn("assistant", " \n ")], "turn 2: expected text in the assistant turn, found none"),
        ([turn("user")], "turn 1: expected an answer at the end, found user"),
        ([], "expected a list of turns {role, content}"),
    ],
)  # fmt: skip
def test_a_chat_that_is_none_is_named_by_file_and_line(tmp_path, chat_tokenizer, messages, words) -> None:
    with pytest.raises(DataError) as caught:
        build(tmp_path, chat_tokenizer, messages)
    said = str(caught.value)
    assert said.startswith("chats.jsonl line 4")
    assert words in said
    assert 'on_bad = "skip"' in said
    assert "\n" not in said
    kept = build(tmp_path, chat_tokenizer, messages, on_bad="skip")
    assert kept.stats["documents"]["kept"] == 40


def test_chats_beyond_the_context_are_cut_and_counted_or_refused_where_nothing_is_left(
    tmp_path, chat_tokenizer
) -> None:
    long = [turn("user", "Why? " * 60), turn("assistant", "Because. " * 60)]
    corpus = build(tmp_path, chat_tokenizer, long)
    facts = row_index(corpus, 64).facts()
    assert facts["cut"] + facts["left_out"] == 1
    with pytest.raises(
        DataError,
        match=r"^corpus\.chats: expected a scored token within rows of 4 tokens, found none; raise model\.row$",
    ):
        row_index(corpus, 4)


def test_a_soup_of_another_tokenizer_or_shape_or_of_a_run_that_is_not_there_is_one_line(tmp_path, eager, chats) -> None:
    setting = Setting(
        corpora=(("chats", chats.hash),), mixture=(("chats", 1.0),), row=96, batch=2, warmup=1, seed=5,
        parametrization=Parametrization(), optimizer=AdamW(), score=("chats",),
    )  # fmt: skip
    trunk = trunk_stage("trunk", PLAIN, setting, 2, [1])
    run_stage(trunk, tmp_path / trunk.folder_name, {"chats": chats}, Workshop(eager))
    assert checkpoint_path(tmp_path / trunk.folder_name, 1).is_dir()
    mean = soup_stage("mean", [(trunk, 2), (trunk, 1)], setting)
    model = Workshop(eager).trainer(mean).model
    load_average(mean, tmp_path / mean.folder_name, model, chats.tokenizer_hash)
    with pytest.raises(ArtefactError, match="expected a checkpoint of the tokenizer that the corpora were built with"):
        load_average(mean, tmp_path / mean.folder_name, model, "f" * 64)
    other = trunk_stage("other", PLAIN, setting, 3)
    wrong = soup_stage("mean", [(trunk, 2), (trunk_stage("x", PLAIN, setting.with_seed(9), 2), 2)], setting)
    assert other.key == trunk.key  # a trunk that is only longer is the same one
    with pytest.raises(ArtefactError, match="expected the run .* that it averages, found none; run it first"):
        load_average(wrong, tmp_path / mean.folder_name, model, chats.tokenizer_hash)
