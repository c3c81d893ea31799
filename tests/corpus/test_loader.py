"""The loader returns what the plan says, and scoring rows score each token of each whole document once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import DataError
from windtunnel.corpus.evaluation_rows import scored, scoring_rows
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.mixture import DataPlan, Segment, locate
from windtunnel.corpus.store import HeldOut


@pytest.fixture
def corpora(make_corpus):
    return {"prose": make_corpus("prose"), "chats": make_corpus("chats", chats=True, seed=7)}


PLAN = DataPlan(11, 32, (Segment(0, (("prose", 1.0),)), Segment(20, (("prose", 0.5), ("chats", 0.5)))))


def test_rows_are_slices_of_the_corpus_with_targets_one_ahead(corpora, tokenizer):
    rows = Loader(PLAN, corpora).rows(0, 60)
    which, places = locate(PLAN, {name: c.rows(32) for name, c in corpora.items()}, 0, 60)
    for at in range(60):
        stream = corpora[PLAN.corpora[which[at]]].train
        run = stream.tokens[places[at] * 32 : places[at] * 32 + 33].astype(int)
        assert rows.inputs[at].tolist() == run[:-1].tolist()
        kept = rows.targets[at] != IGNORED
        assert rows.targets[at][kept].tolist() == run[1:][kept].tolist()
        hidden = run[1:] == tokenizer.bos_id
        if stream.mask is not None:
            hidden |= stream.mask[places[at] * 32 + 1 : places[at] * 32 + 33] == 0
        assert (~kept).tolist() == hidden.tolist()
    assert set(which.tolist()) == {0, 1}


def test_document_numbers_rise_at_each_begin_of_document(corpora, tokenizer):
    rows = Loader(PLAN, corpora).rows(0, 600)
    assert (rows.inputs[:, 0] == tokenizer.bos_id).any()
    assert (rows.documents[:, 0] == 0).all()
    steps = np.diff(rows.documents, axis=1)
    assert (steps == (rows.inputs[:, 1:] == tokenizer.bos_id)).all()
    assert rows.documents.max() > 0
    assert (rows.inputs.dtype, rows.targets.dtype, rows.documents.dtype) == (np.int64, np.int64, np.int32)


@given(cuts=st.lists(st.integers(0, 64), max_size=5))
@settings(max_examples=20, deadline=None)
def test_any_division_into_calls_gives_the_same_rows(loader_60, cuts):
    loader, whole = loader_60
    edges = [0, *sorted(cuts), 64]
    parts = [loader.rows(a, b - a) for a, b in itertools.pairwise(edges)]
    for field in ("inputs", "targets", "documents"):
        assert np.concatenate([getattr(part, field) for part in parts]).tolist() == getattr(whole, field).tolist()


@pytest.fixture(scope="module")
def loader_60(tmp_path_factory, tokenizer, prose, write_jsonl):
    from windtunnel.corpus.build import build_corpus
    from windtunnel.corpus.config import SourceConfig

    base = tmp_path_factory.mktemp("loader")
    write_jsonl(base / "a.jsonl", [{"text": prose(s)} for s in range(60)])
    config = SourceConfig(source=("a.jsonl",), heldout=0.2)
    corpus = build_corpus(config, tokenizer, base / "a", name="a", downloads=base, base=base)
    loader = Loader(DataPlan(1, 16, (Segment(0, (("a", 1.0),)),)), {"a": corpus})
    return loader, loader.rows(0, 64)


def test_an_epoch_reads_every_row_once(loader_60):
    loader, _ = loader_60
    count = loader.rows_of["a"]
    rows = loader.rows(0, count)
    tokens = loader.rows(count, count)
    assert sorted(map(tuple, rows.inputs.tolist())) == sorted(map(tuple, tokens.inputs.tolist()))
    assert rows.inputs.tolist() != tokens.inputs.tolist()


def test_a_plan_with_an_unknown_corpus_or_two_tokenizers_is_refused(corpora, make_corpus, tokenizer):
    with pytest.raises(DataError, match=r"mixture.wiki: expected one of the corpora prose, chats"):
        Loader(DataPlan(0, 8, (Segment(0, (("wiki", 1.0),)),)), corpora)
    from dataclasses import replace

    mixed = {**corpora, "chats": replace(corpora["chats"], tokenizer_hash="other")}
    with pytest.raises(DataError, match="expected corpora of one tokenizer"):
        Loader(PLAN, mixed)


def test_part_of_rows(corpora):
    rows = Loader(PLAN, corpora).rows(0, 10)
    assert rows.part(3, 4).inputs.tolist() == rows.inputs[3:7].tolist()


@st.composite
def heldouts(draw: st.DrawFn) -> HeldOut:
    lengths = draw(st.lists(st.integers(2, 70), min_size=1, max_size=30))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(5, 5 + offsets[-1]).astype(np.uint16)  # each token is unique, so that it can be followed
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 1, 2
    mask = None
    if draw(st.booleans()):
        mask = np.array(draw(st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens))), np.uint8)
        mask[offsets[:-1]] = 0
    return HeldOut(tokens, offsets, np.array(lengths, np.int64) * 3, mask)


@given(
    heldout=heldouts(), row=st.integers(1, 80), batch=st.integers(1, 9), limit=st.one_of(st.none(), st.integers(1, 800))
)
@settings(max_examples=150, deadline=None)
def test_scoring_rows_score_each_token_of_whole_documents_once(heldout, row, batch, limit):
    batches = list(scoring_rows(heldout, row, limit, batch))
    facts = scored(heldout, limit)
    end = int(heldout.offsets[facts.documents])
    if limit is None:
        assert facts.documents == len(heldout.bytes)
    else:
        assert end <= limit or facts.documents == 1
    expected = heldout.tokens[:end][[i for i in range(end) if i not in set(heldout.offsets.tolist())]]
    if heldout.mask is not None:
        flags = heldout.mask[:end]
        expected = heldout.tokens[:end][flags == 1]
    found = np.concatenate([b.targets[b.targets != IGNORED] for b in batches])
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert facts.tokens == len(found)
    assert facts.bytes == heldout.bytes[: facts.documents].sum() == sum(b.bytes for b in batches)
    assert all(b.inputs.shape == b.targets.shape == b.documents.shape == (batch, row) for b in batches)


@given(heldout=heldouts(), row=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_a_window_sees_only_its_own_document_and_predicts_the_next_token(heldout, row):
    owner = np.repeat(np.arange(len(heldout.bytes)), np.diff(heldout.offsets))
    for batch in scoring_rows(heldout, row, None, 4):
        for inputs, targets, documents in zip(batch.inputs, batch.targets, batch.documents, strict=True):
            assert (np.diff(documents) >= 0).all()
            for number in range(documents.max() + 1):
                here = documents == number
                kept = inputs[here]
                inner = [int(t) for t in kept if t >= 5]
                assert len({owner[t - 5] for t in inner}) <= 1
                for token, target in zip(kept, targets[here], strict=True):
                    if target >= 5 and token >= 5:
                        assert target == token + 1


def test_the_packing_of_short_documents_wastes_little(make_corpus):
    corpus = make_corpus("prose", documents=300, heldout=0.5)
    batches = list(scoring_rows(corpus.heldout, 256, batch=1))
    assert scored(corpus.heldout).tokens / (256 * len(batches)) > 0.85
