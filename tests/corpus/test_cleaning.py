"""Cleaning is idempotent, drops what it says, counts exactly, and never lets a document lie on both sides of the split."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import DataError
from windtunnel.corpus.cleaning import clean_text
from windtunnel.corpus.config import Cleaning, SourceConfig
from windtunnel.corpus.dedup import TestSets as Listed
from windtunnel.corpus.dedup import band_keys, exact_duplicates, jaccard, near_duplicates
from windtunnel.corpus.prepare import HELDOUT, TRAIN, Prepared, prepare
from windtunnel.corpus.shingles import sequences, shingles, word_hashes

UNICODE = st.text(st.characters(codec="utf-8"), max_size=200)


@given(UNICODE)
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_changes_nothing_more_and_leaves_no_control_character(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", once)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("cafe\u0301", "café"), ("a\r\nb\rc", "a\nb\nc"), ("a\x00b\x1b[31mc", "ab[31mc"), ("\ufeffa\ufeffb", "ab"),
        ("tab\tstays", "tab\tstays"), ("  around \n", "around"), ("e\x01\u0301", "é"), ("page\x0cnext", "page\nnext"),
        ("plain", "plain"), ("汉字 и текст", "汉字 и текст"),
    ],
)  # fmt: skip
def test_cleaning_by_example(raw, clean):
    assert clean_text(raw) == clean


def words_of(text: str) -> list[str]:
    """The words that ``shingles`` sees, found the slow way."""
    words, current = [], ""
    for character in text:
        if "\u3000" <= character <= "\u9fff":
            words += [current] * bool(current) + [character]
            current = ""
        elif character.isascii() and not character.isalnum():
            words += [current] * bool(current)
            current = ""
        else:
            current += character.lower() if character.isascii() else character
    return words + [current] * bool(current)


@given(st.lists(st.text(st.sampled_from("aB é汉字ab.\n1ü—"), max_size=40), max_size=12))
@settings(max_examples=200, deadline=None)
def test_word_hashes_find_the_words_that_a_simple_reading_finds(texts):
    hashes, counts = word_hashes([text.encode() for text in texts])
    expected = [words_of(text) for text in texts]
    assert counts.tolist() == [len(words) for words in expected]
    flat = [word for words in expected for word in words]
    assert len(set(zip(flat, hashes.tolist(), strict=True))) == len(set(flat)) == len(set(hashes.tolist()))


def test_word_hashes_do_not_depend_on_position_or_batch():
    texts = [f"{'x ' * n}alpha beta{' y' * n}".encode() for n in range(300)] * 30  # more than one internal piece
    hashes, counts = word_hashes(texts)
    starts = np.cumsum(counts) - counts
    alpha = {int(hashes[start + n % 300]) for n, start in enumerate(starts)}
    assert len(alpha) == 1


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=8), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_runs_of_words_are_those_within_one_text(texts, length):
    hashes, counts = word_hashes([" ".join(words).encode() for words in texts])
    grams, runs = sequences(hashes, counts, length)
    expected = [[tuple(words[i : i + length]) for i in range(len(words) - length + 1)] for words in texts]
    assert runs.tolist() == [len(e) for e in expected]
    flat = [gram for e in expected for gram in e]
    assert len(set(zip(flat, grams.tolist(), strict=True))) == len(set(flat)) == len(set(grams.tolist()))
    short, filled = shingles(hashes, counts, length)
    assert filled.tolist() == [max(len(e), 1 if w else 0) for e, w in zip(expected, texts, strict=True)]
    assert len(short) == sum(filled)


def edited(words: list[str], share: float, draw: random.Random) -> list[str]:
    return [draw.choice("qrstuvw") * 6 if draw.random() < share else word for word in words]


def test_minhash_finds_pairs_above_the_bar_and_spares_those_below():
    draw = random.Random(0)
    documents, similar, different = [], [], []
    for _ in range(150):
        words = [f"w{draw.randrange(3000)}" for _ in range(200)]
        documents.append(" ".join(words).encode())
        documents.append(" ".join(edited(words, draw.choice([0.005, 0.01, 0.06, 0.1]), draw)).encode())
    sets = [np.unique(shingles(*word_hashes([d]), 5)[0]) for d in documents]
    for first in range(0, 300, 2):
        (similar if jaccard(sets[first], sets[first + 1]) >= 0.8 else different).append(first + 1)
    found = near_duplicates(band_keys(documents), np.ones(300, bool), lambda i: documents[i])
    assert len(similar) > 40
    assert len(different) > 40
    assert set(found) <= set(similar)  # every dropped pair was compared exactly
    assert len(found) >= 0.9 * len(similar)
    assert all(found[i] == i - 1 for i in found)


def test_jaccard_agrees_with_sets():
    a, b = np.array([1, 2, 3, 4]), np.array([3, 4, 5])
    assert jaccard(a, b) == 2 / 5


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(max_examples=50, deadline=None)
def test_exact_duplicates_point_to_the_first(values):
    hashes = np.array([[v % 2, v // 2] for v in values], np.uint64).reshape(-1, 2)
    assert exact_duplicates(hashes).tolist() == [values.index(v) for v in values]


def test_thirteen_words_in_a_row_are_found_whatever_case_and_punctuation():
    question = "Which of these small animals lives longest in the cold water of northern lakes during winter?"
    listed = Listed([question, "too short"])
    assert listed.too_short == 1
    documents = [
        f"Before. {question.upper().replace(' ', ', ')} After.",
        " ".join(question.split()[:13]), " ".join(question.split()[:12]), "Nothing of the kind.", "",
    ]  # fmt: skip
    assert listed.hits([d.encode() for d in documents]).tolist() == [0, 0, -1, -1, -1]


def prepared(base: Path, records: list[dict], name: str = "a", **settings) -> Prepared:
    (base / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = SourceConfig(source=(f"{name}.jsonl",), heldout=settings.pop("heldout", 0.3), **settings)
    return prepare(config, base / f"{name}-text", downloads=base, base=base)


def side(text: Prepared, fate: int) -> set[str]:
    return {text.plain(raw) for batch in text.batches(text.select(fate)) for raw in batch}


def test_each_step_drops_its_documents_counts_them_and_keeps_pairs(tmp_path, prose):
    base = [prose(seed) for seed in range(60)]
    question = " ".join(f"question{n}" for n in range(20))
    (tmp_path / "tests.jsonl").write_text(json.dumps({"query": question, "choices": ["yes", "no"]}) + "\n")
    near = base[5] + " And so on."
    records = [*base, base[3], base[3], near, "tiny", "con\x07trol " + prose(99), f"{prose(77)} {question}"]
    texts = [{"text": text} for text in records]
    found = prepared(tmp_path, texts, decontaminate=("tests.jsonl",))
    assert found.stats["dropped"] == {"short": 1, "exact": 2, "near": 1, "decontaminate": 1}
    assert found.stats["changed"] == 1
    assert found.stats["documents"]["read"] == len(records)
    assert found.stats["documents"]["kept"] == 61
    examples = read_json(found.folder / "examples.json")
    assert [pair["against"][:40] for pair in examples["exact"]] == [base[3][:40]] * 2
    assert examples["near"][0]["text"][:40] == examples["near"][0]["against"][:40] == base[5][:40]
    assert examples["decontaminate"][0]["against"].startswith("question0 question1")
    assert "con\x07trol" in examples["unicode"][0]["text"]
    off = Cleaning(unicode=False, exact=False, near=False, decontaminate=False)
    assert prepared(tmp_path, texts[:-2], "b", decontaminate=("tests.jsonl",), clean=off).stats["dropped"] == {
        "short": 1, "exact": 0, "near": 0, "decontaminate": 0,
    }  # fmt: skip


def test_ten_examples_are_kept_at_most_and_more_than_a_tenth_dropped_is_a_warning(tmp_path, prose):
    texts = [{"text": prose(seed % 40)} for seed in range(80)]
    found = prepared(tmp_path, texts)
    assert found.stats["dropped"]["exact"] == 40
    assert len(read_json(found.folder / "examples.json")["exact"]) == 10
    assert found.stats["warnings"] == ["the cleaning step 'exact' dropped 50 % of the documents: look at its examples"]


@given(st.sets(st.integers(0, 10**6), min_size=20, max_size=60), st.sets(st.integers(0, 10**6), max_size=40))
@settings(max_examples=15, deadline=None)
def test_a_document_stays_on_its_side_when_others_are_added_and_lies_on_one_side_only(
    tmp_path_factory, prose, first, second
):
    base = tmp_path_factory.mktemp("split")
    before = prepared(base, [{"text": prose(s)} for s in sorted(first)], heldout=0.4)
    after = prepared(base, [{"text": prose(s)} for s in sorted(second) + sorted(first)], "b", heldout=0.4)
    for fate in (TRAIN, HELDOUT):
        assert side(before, fate) <= side(after, fate)
    assert not side(after, TRAIN) & side(after, HELDOUT)


def test_duplicates_lie_on_one_side_even_where_they_are_kept(tmp_path, prose):
    found = prepared(tmp_path, [{"text": prose(s % 20)} for s in range(60)], clean=Cleaning(exact=False, near=False))
    assert found.stats["documents"]["kept"] == 60
    assert not side(found, TRAIN) & side(found, HELDOUT)


def test_the_share_held_out_is_the_share_asked_for(tmp_path, prose):
    found = prepared(tmp_path, [{"text": prose(s, 12)} for s in range(2000)], heldout=0.1)
    assert abs(found.stats["documents"]["heldout"] / 2000 - 0.1) < 0.03


def test_records_with_one_title_lie_on_one_side_as_text_and_as_chats(tmp_path, prose):
    records = [{"title": f"Title {s}", "body": prose(s)} for s in range(80)]
    as_text = prepared(tmp_path, records, text="{{ title }}: {{ body }}", heldout_by="title")
    as_chat = prepared(
        tmp_path, records, "b", user="What is {{ title }}?", assistant="{{ body }}", heldout_by="{{ title }}"
    )
    titles = [{re.search(r"Title \d+", t)[0] for t in side(text, HELDOUT)} for text in (as_text, as_chat)]  # type: ignore[index]
    assert titles[0] == titles[1]
    assert len(titles[0]) > 5


def test_prepared_text_is_reused_only_for_the_same_content_and_configuration(tmp_path, prose):
    records = [{"text": prose(s)} for s in range(30)]
    first = prepared(tmp_path, records)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    assert (prepared(tmp_path, records).folder / "manifest.json").stat().st_mtime_ns == stamp
    assert prepared(tmp_path, records[:-1]).stats["documents"]["read"] == 29
    assert prepared(tmp_path, records[:-1], heldout=0.5).stats["documents"]["heldout"] > 8


def test_a_list_of_test_sets_that_holds_none_is_refused(tmp_path, prose):
    records = [{"text": prose(s)} for s in range(30)]
    with pytest.raises(DataError, match=r"none.jsonl: expected a file"):
        prepared(tmp_path, records, decontaminate=("none.jsonl",))
    (tmp_path / "empty.jsonl").write_text('{"unknown": 1}\n')
    with pytest.raises(DataError, match="expected test texts"):
        prepared(tmp_path, records, decontaminate=("empty.jsonl",))
