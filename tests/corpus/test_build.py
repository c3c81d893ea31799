"""A corpus is a pure function of content, configuration and tokenizer; damage is noticed when it is opened."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from windtunnel.base.errors import ArtefactError, DataError
from windtunnel.corpus import build as building
from windtunnel.corpus import prepare as preparing
from windtunnel.corpus.build import build_corpus, build_tokenizer, corpus_key, tokenizer_key
from windtunnel.corpus.compression import compression_table
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.sources import source_fingerprint
from windtunnel.corpus.store import open_corpus
from windtunnel.corpus.tokenizer import train


def documents(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_every_document_is_stored_once_with_begin_and_end_in_an_order_by_hash(make_corpus, tokenizer, prose):
    corpus = make_corpus(documents=100)
    stored = documents(corpus.train.tokens, corpus.train.documents) + documents(
        corpus.heldout.tokens, corpus.heldout.offsets
    )
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in stored)
    texts = [tokenizer.decode(d[1:-1]) for d in stored]
    expected = [prose(s, 10 + s % 90) for s in range(100)]
    assert sorted(texts) == sorted(expected)
    assert texts != expected
    assert (
        corpus.tokens
        == len(corpus.train.tokens)
        == sum(len(d) for d in documents(corpus.train.tokens, corpus.train.documents))
    )
    assert corpus.train.tokens.dtype == np.uint16


def test_heldout_bytes_are_those_of_the_scored_text(make_corpus, tokenizer):
    corpus = make_corpus()
    texts = [tokenizer.decode(d) for d in documents(corpus.heldout.tokens, corpus.heldout.offsets)]
    assert corpus.heldout.bytes.tolist() == [len(text.encode()) for text in texts]
    chats = make_corpus("chats", chats=True)
    assert chats.heldout.mask is not None
    for start, end, size in zip(
        chats.heldout.offsets[:-1], chats.heldout.offsets[1:], chats.heldout.bytes, strict=True
    ):
        answer = chats.heldout.tokens[start:end][chats.heldout.mask[start:end] == 1]
        assert answer[-1] == tokenizer.im_end_id
        assert size == len(tokenizer.decode(answer).encode())


def test_a_chat_corpus_marks_the_answers_and_loss_all_marks_nothing(make_corpus, tokenizer):
    corpus = make_corpus("chats", chats=True)
    assert corpus.train.mask is not None
    assert 0 < corpus.train.mask.mean() < 1
    assert not corpus.train.mask[corpus.train.tokens == tokenizer.bos_id].any()
    everything = make_corpus("all", chats=True, loss="all")
    assert everything.train.mask is None
    assert everything.train.tokens.tolist() == corpus.train.tokens.tolist()


def test_building_twice_elsewhere_gives_the_same_hash_and_the_source_may_move(tmp_path, tokenizer, prose, write_jsonl):
    built = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "a.jsonl", [{"text": prose(s)} for s in range(50)])
        config = SourceConfig(source=("a.jsonl",), heldout=0.2, licence=place)
        base = tmp_path / place
        built.append(build_corpus(config, tokenizer, base / "out", name="a", downloads=base, base=base))
    assert built[0].hash == built[1].hash
    assert built[0].key == built[1].key


def test_batches_of_any_size_give_the_same_corpus(make_corpus, monkeypatch):
    whole = make_corpus("prose", heldout_tokens=300)
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 700)
    monkeypatch.setattr(preparing.Prepared.batches, "__defaults__", (500,))
    pieces = make_corpus("prose2", heldout_tokens=300)
    for side in ("train.tokens", "train.documents", "heldout.tokens", "heldout.documents", "heldout.bytes"):
        assert (whole.path / f"{side}.bin").read_bytes() == (pieces.path / f"{side}.bin").read_bytes()


def test_the_heldout_cap_keeps_whole_documents_from_the_front_and_leaves_the_rest_unused(make_corpus):
    whole = make_corpus("prose")
    capped = make_corpus("prose2", heldout_tokens=200)
    count = len(capped.heldout.offsets) - 1
    assert capped.heldout.offsets.tolist() == whole.heldout.offsets[: count + 1].tolist()
    assert capped.heldout.offsets[-1] <= 200 < whole.heldout.offsets[count + 1]
    assert capped.train.tokens.tolist() == whole.train.tokens.tolist()
    assert any("held-out documents are scored" in warning for warning in capped.stats["warnings"])
    assert len(make_corpus("prose3", heldout_tokens=1).heldout.offsets) == 2  # one document at least


def test_an_unchanged_corpus_is_opened_and_a_changed_one_is_built_again(make_corpus, monkeypatch):
    first = make_corpus()

    def must_not_build(*arguments, **settings):
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_side", must_not_build)
        assert make_corpus().hash == first.hash
        with pytest.raises(AssertionError, match="built again"):
            make_corpus(minimum_characters=60)
    assert make_corpus(minimum_characters=100).hash != first.hash


def test_the_key_names_what_the_result_depends_on(tokenizer):
    config = SourceConfig(source=("a",))
    key = corpus_key(config, tokenizer.hash, "f")
    assert corpus_key(SourceConfig(source=("b",), licence="MIT", language="en"), tokenizer.hash, "f") == key
    for other in (
        corpus_key(config, "other", "f"),
        corpus_key(config, tokenizer.hash, "g"),
        corpus_key(SourceConfig(source=("a",), heldout=0.5), tokenizer.hash, "f"),
        corpus_key(SourceConfig(source=("a",), minimum_characters=9), tokenizer.hash, "f"),
    ):
        assert other != key


@pytest.mark.parametrize(
    "file", ["train.tokens.bin", "heldout.tokens.bin", "train.documents.bin", "heldout.bytes.bin", "stats.json"]
)
def test_one_flipped_bit_or_a_cut_file_is_refused_when_opened(make_corpus, file):
    corpus = make_corpus()
    path = corpus.path / file
    whole = path.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], whole + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=file):
            open_corpus(corpus.path)
    path.write_bytes(whole)
    assert open_corpus(corpus.path).hash == corpus.hash


def test_tokens_of_a_wrong_size_or_beyond_the_vocabulary_are_refused_even_without_checksums(make_corpus):
    corpus = make_corpus()
    path = corpus.path / "train.tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="whole values of 2 bytes"):
        open_corpus(corpus.path, verify=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="expected boundaries up to"):
        open_corpus(corpus.path, verify=False)


def test_a_failing_build_leaves_the_earlier_corpus_as_it_was(make_corpus, monkeypatch):
    corpus = make_corpus()

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "write_side", full)
    with pytest.raises(Exception, match="the disk or quota is full"):
        make_corpus(minimum_characters=100)
    assert open_corpus(corpus.path).hash == corpus.hash
    assert [p.name for p in corpus.path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_tokenizer_learns_from_train_parts_only_and_weights_limit_its_sample(tmp_path, prose, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(s)} for s in range(100)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "zebra " * 30 + str(s)} for s in range(100)])
    configs = {name: SourceConfig(source=(f"{name}.jsonl",), heldout=0.3, clean={"near": False}) for name in "ab"}
    settings = {"downloads": tmp_path, "base": tmp_path}
    seen = []
    original = building.bpe.train

    def spy(texts, vocab):
        seen.append(list(texts))
        return original(seen[-1], vocab)

    building.bpe.train, restore = spy, original
    try:
        build_tokenizer(configs, 300, **settings)
        build_tokenizer(configs, 300, weights={"a": 3, "b": 1}, sample_bytes=8000, **settings)
        build_tokenizer(configs, 300, weights={"a": 1}, cache=tmp_path / "cache", **settings)
    finally:
        building.bpe.train = restore
    everything, weighted, only_a = seen
    corpus = {
        name: build_corpus(configs[name], original(everything, 300), tmp_path / name, name=name, **settings)
        for name in "ab"
    }
    assert len(everything) == sum(len(c.train.documents) - 1 for c in corpus.values())
    sizes = {name: sum(len(t) for t in weighted if ("zebra" in t) == (name == "b")) for name in "ab"}
    assert 2 < sizes["a"] / sizes["b"] < 4
    assert sum(sizes.values()) < 9000
    assert not any("zebra" in text for text in only_a)


def test_the_tokenizer_key_follows_texts_vocabulary_and_weights(tmp_path, write_jsonl):
    configs = {"a": SourceConfig(source=("a.jsonl",))}
    key = tokenizer_key(configs, {"a": "f"}, 300)
    assert tokenizer_key(configs, {"a": "g"}, 300) != key != tokenizer_key(configs, {"a": "f"}, 301)
    assert tokenizer_key(configs, {"a": "f"}, 300, {"a": 1.0}) != key
    chats = {"a": SourceConfig(source=("a.jsonl",), heldout_tokens=5, licence="MIT")}
    assert tokenizer_key(chats, {"a": "f"}, 300) == key


def test_the_compression_table_counts_bytes_of_heldout_text_for_each_token(make_corpus, tokenizer, prose):
    corpora = [make_corpus("prose"), make_corpus("more", seed=3)]
    larger = train([prose(s) for s in range(400)], 800)
    table = compression_table(corpora, {"own": tokenizer, "larger": larger})
    assert list(table) == ["own", "larger"]
    assert list(table["own"]) == ["prose", "more", "average"]
    tokens = len(corpora[0].heldout.tokens) - 2 * len(corpora[0].heldout.bytes)
    assert table["own"]["prose"] == pytest.approx(corpora[0].heldout.bytes.sum() / tokens)
    assert table["larger"]["average"] > table["own"]["average"] > 1
    with pytest.raises(DataError, match="the tokenizer of the corpus is missing"):
        compression_table(corpora, {"larger": larger})


def test_the_room_never_loads_torch():
    folder = Path(building.__file__).parent
    names = [f"windtunnel.corpus.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    imports = "".join(f"import {name}\n" for name in names)
    code = f"{imports}import json, sys\nprint(json.dumps('torch' in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(folder.parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(result.stdout) is False


def test_the_fingerprint_of_a_package_needs_no_download(tmp_path):
    config = SourceConfig(source=("pypi:a==1/x.json",), sha256="0" * 64)
    assert source_fingerprint(config, downloads=tmp_path, base=tmp_path)
