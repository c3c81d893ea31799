"""The tokenizer gives every string back and never makes a control token out of text."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import ArtefactError
from windtunnel.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer, train

UNICODE = st.text(st.characters(codec="utf-8"), max_size=120)
SMUGGLED = st.lists(
    st.one_of(st.sampled_from([*SPECIAL_TOKENS, "<|im_", "start|>", "<s", ">", "assistant\n"]), UNICODE), max_size=8
)


@given(text=UNICODE)
@settings(max_examples=1000, deadline=None)
def test_every_string_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=SMUGGLED)
@settings(max_examples=500, deadline=None)
def test_text_never_becomes_a_control_token(tokenizer, parts):
    text = "".join(parts)
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
        assert min(ids, default=99) >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(ids) == text


def test_control_tokens_have_the_first_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.decode([1, 3, 4, 2, 0], control=True) == "<s><|im_start|><|im_end|></s><pad>"
    assert tokenizer.decode([1, 3, 4, 2, 0]) == ""


@given(texts=st.lists(UNICODE, max_size=6))
@settings(max_examples=200, deadline=None)
def test_documents_are_wrapped_and_token_bytes_add_up_to_utf8(tokenizer, texts):
    ids, counts = tokenizer.encode_documents(texts)
    assert len(ids) == counts.sum()
    for text, document in zip(texts, np.split(ids, np.cumsum(counts)[:-1]) if texts else [], strict=True):
        assert document[0] == tokenizer.bos_id
        assert document[-1] == tokenizer.eos_id
        assert document[1:-1].tolist() == tokenizer.encode(text)
        assert tokenizer.token_bytes[document].sum() == len(text.encode())


def test_digits_come_in_groups_of_up_to_three_and_spaces_stay_with_words(prose):
    tokenizer = train(["12345678 12345678 and and and"] * 50 + [prose(1)], 330)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("12345678 and")]
    assert pieces == ["123", "456", "78", " and"]


def test_training_is_a_pure_function_of_the_texts(prose):
    texts = [prose(seed) for seed in range(200)]
    hashes = {train(texts, 350).hash, train(texts, 350).hash, train(texts[::-1], 350).hash}
    assert len(hashes) == 1
    assert train(texts[:-1] + ["something else entirely"] * 3, 350).hash not in hashes


def test_training_does_not_depend_on_the_number_of_threads(prose, monkeypatch):
    texts = [prose(seed) for seed in range(200)]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    alone = train(texts, 350).hash
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert train(texts, 350).hash == alone


def test_a_saved_tokenizer_is_the_same_and_a_damaged_one_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert again.hash == tokenizer.hash
    assert again.encode("garden 12 <s>") == tokenizer.encode("garden 12 <s>")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("garden", "gardem", 1))
    with pytest.raises(ArtefactError, match=r"tokenizer.json: the content does not match its hash"):
        Tokenizer.load(tmp_path / "tokenizer")


def test_the_exported_json_gives_the_same_ids_with_a_begin(tokenizer):
    other = tokenizers.Tokenizer.from_str(tokenizer.to_json(add_bos=True))
    assert other.encode("A quiet garden.\n\n42").ids == [1, *tokenizer.encode("A quiet garden.\n\n42")]


def _encode_in_child(queue, tokenizer):
    queue.put(tokenizer.encode_batch(["garden path"] * 100)[0])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_tokenise_after_its_parent_did(tokenizer):
    expected = tokenizer.encode_batch(["garden path"] * 100)[0]
    assert "TOKENIZERS_PARALLELISM" not in os.environ  # set for the call only: left set, a fork would hang or warn
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_encode_in_child, args=(queue, tokenizer))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)


def test_small_vocabularies_are_stored_in_two_bytes(tokenizer):
    assert tokenizer.dtype == np.uint16
