"""Rows of whole documents: nothing is cut, lost or read twice, nobody sees another chat, and shares are shares of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import DataError
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.mixture import DataPlan, Segment, locate
from windtunnel.corpus.packing import corrected, pack, pack_pairs, pairs_in, row_index
from windtunnel.corpus.store import TokenStream
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

ROW = 64


@st.composite
def streams(draw: st.DrawFn, masked: bool = True) -> TokenStream:
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=40))
    documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(5, 5 + documents[-1]).astype(np.uint16)
    if not masked:
        return TokenStream(tokens, documents, None)
    flags = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return TokenStream(tokens, documents, np.array(flags, np.uint8))


@given(stream=streams(), row=st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_every_chat_stands_in_one_row_up_to_its_last_answer_that_ends_there(stream, row):
    index = pack(stream, row)
    found = dict(index.windows.tolist())
    assert len(found) == len(index.windows)
    cut = scored = left_out = 0
    for begin, end in zip(stream.documents[:-1].tolist(), stream.documents[1:].tolist(), strict=True):
        count, flags = min(row, end - 1 - begin), stream.mask[begin:end]
        if end - 1 - begin > row:
            count = max([at for at in range(row + 1) if flags[at] and not flags[at + 1]], default=0)
        learnt = int(stream.mask[begin + 1 : begin + count + 1].sum())
        assert (begin in found) == (learnt > 0)
        assert found.get(begin, count) == count
        left_out += learnt == 0
        cut += learnt > 0 and end - 1 - begin > row
        scored += learnt
    assert (index.cut, index.left_out, index.scored) == (cut, left_out, scored)


@given(stream=streams(masked=False), row=st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_a_text_longer_than_a_row_goes_on_in_another_window_and_each_token_is_predicted_once(stream, row):
    index = pack(stream, row)
    predicted = sorted(at for first, count in index.windows.tolist() for at in range(first + 1, first + count + 1))
    assert predicted == sorted(set(range(len(stream.tokens))) - set(stream.documents.tolist()))
    assert index.tokens == index.scored == len(predicted)


@given(stream=streams(), row=st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_no_two_rows_would_fit_into_one_and_the_index_is_a_pure_function(stream, row):
    index = pack(stream, row)
    loads = sorted(sum(count for _, count in index.of(at)) for at in range(index.rows))
    assert all(0 < load <= row for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > row
    assert pack(stream, row).hash == index.hash


def test_the_hash_depends_on_row_and_documents(make_corpus):
    corpus = make_corpus("a", chats=True)
    assert (
        len(
            {
                row_index(corpus, 64).hash,
                row_index(corpus, 65).hash,
                row_index(make_corpus("b", chats=True, seed=1), 64).hash,
            }
        )
        == 3
    )


def plan_of(corpora, row=ROW, weights=None, seed=3) -> DataPlan:
    facts = {name: row_index(corpus, row) for name, corpus in corpora.items()}
    mixture = corrected(weights or dict.fromkeys(corpora, 1.0), {name: f.fill for name, f in facts.items()})
    return DataPlan(seed, row, (Segment(0, mixture),), tuple(sorted((name, f.hash) for name, f in facts.items())))


def test_an_epoch_reads_every_chat_once_and_scores_the_answers_and_their_ends_alone(make_corpus, tokenizer):
    corpus = make_corpus("chats", chats=True, documents=80)
    loader = Loader(plan_of({"chats": corpus}), {"chats": corpus})
    rows = loader.rows(0, loader.rows_of["chats"])
    stream, spans = corpus.train, []
    for a, b in zip(stream.documents.tolist(), stream.documents[1:].tolist(), strict=False):
        ends = [
            at for at in range(a + 1, a + ROW + 1) if b - a > ROW + 1 and stream.mask[at] and not stream.mask[at + 1]
        ]
        spans.append((a, b if b - a <= ROW + 1 else max(ends, default=a) + 1))
    chats = [stream.tokens[a:b].astype(int) for a, b in spans]
    masks = [stream.mask[a:b] for a, b in spans]
    found = []
    for inputs, targets, documents in zip(rows.inputs, rows.targets, rows.documents, strict=True):
        for number in range(documents.max() + 1):
            here = documents == number
            if (targets[here] != IGNORED).any():
                found.append((inputs[here].tolist(), targets[here].tolist()))
            else:
                assert set(inputs[here].tolist()) == {tokenizer.pad_id}
    expected = [
        (chat[:-1].tolist(), np.where(mask[1:] == 1, chat[1:], IGNORED).tolist())
        for chat, mask in zip(chats, masks, strict=True) if mask[1:].any()
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    ends = sum(target == tokenizer.im_end_id for _, targets in found for target in targets)
    assert (
        ends == sum(int(mask[chat == tokenizer.im_end_id].sum()) for chat, mask in zip(chats, masks, strict=True)) > 0
    )


def test_a_chat_in_a_row_is_computed_as_if_it_were_alone(make_corpus):
    corpus = make_corpus("chats", chats=True, documents=60)
    loader = Loader(plan_of({"chats": corpus}, row=160), {"chats": corpus})
    model = Transformer(
        Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=400, base_width=32), Parametrization()
    )
    model.init_weights(1)
    rows = loader.rows(0, 8)
    compared = 0
    with torch.no_grad():
        for backend in ("dense", "documents"):
            model.backend = backend
            packed = model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents))
            for at in range(len(rows)):
                for number in range(rows.documents[at].max()):
                    here = torch.from_numpy(rows.documents[at] == number)
                    alone = model(torch.from_numpy(rows.inputs[at])[here][None])[0]
                    torch.testing.assert_close(packed[at, here], alone, rtol=0, atol=1e-5)
                    compared += 1
    assert compared > 2 * len(rows)


def test_shares_are_shares_of_tokens_even_where_rows_are_half_empty(make_corpus):
    full, half = make_corpus("full", documents=150), make_corpus("half", chats=True, documents=150, seed=4)
    corpora = {"full": full, "half": half}
    row = int(1.5 * np.median(np.diff(half.train.documents)))  # hardly two chats fit into one row, while texts fill it
    assert row_index(half, row).fill < 0.9 < row_index(full, row).fill
    plan = plan_of(corpora, row=row, weights={"full": 3.0, "half": 1.0})
    loader = Loader(plan, corpora)
    count = 600
    tokens = {"full": 0, "half": 0}
    which, places = locate(plan, loader.rows_of, 0, count)
    for corpus, place in zip(which.tolist(), places.tolist(), strict=True):
        name = plan.corpora[corpus]
        tokens[name] += sum(length for _, length in loader.indices[name].of(place))
    assert tokens["full"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.01)


def test_a_corpus_that_was_built_anew_is_refused(make_corpus):
    corpus = make_corpus("chats", chats=True)
    plan = replace(plan_of({"chats": corpus}), packed=(("chats", "0" * 64),))
    with pytest.raises(DataError, match="corpus.chats: expected the row index 0000000000, found"):
        Loader(plan, {"chats": corpus})
    with pytest.raises(DataError, match="corpus.chats: expected a scored token within rows of 4 tokens, found none"):
        row_index(corpus, 4)


def test_a_plan_of_slices_is_written_as_before_and_a_packed_one_reads_back(make_corpus):
    plain = DataPlan(1, 32, (Segment(0, (("a", 1.0),)),))
    assert set(plain.to_dict()) == {"seed", "row", "segments"}
    packed = plan_of({"chats": make_corpus("chats", chats=True)})
    assert DataPlan.from_dict(packed.to_dict()) == packed
    assert packed.extended(5, (("chats", 2.0),)).packed == packed.packed


@given(
    lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=20), row=st.integers(2, 60)
)
@settings(max_examples=80, deadline=None)
def test_a_pair_that_fits_stands_whole_in_one_row_and_two_rows_would_not_fit_into_one(lengths, row):
    flat = [n for pair in lengths for n in pair]
    documents = np.concatenate([[0], np.cumsum(flat)]).astype(np.int64)
    index = pack_pairs(
        TokenStream(np.arange(documents[-1]).astype(np.uint16), documents, np.ones(documents[-1], np.uint8)), row
    )
    fitting = [(int(documents[2 * at]), a, b) for at, (a, b) in enumerate(lengths) if a + b - 2 <= row]
    rows = [index.of(at) for at in range(index.rows)]
    found = [
        (better[0], better[1] + 1, worse[1] + 1)
        for row_ in rows
        for better, worse in zip(row_[::2], row_[1::2], strict=True)
    ]
    assert sorted(found) == fitting
    assert all(
        worse[0] == better[0] + better[1] + 1
        for row_ in rows
        for better, worse in zip(row_[::2], row_[1::2], strict=True)
    )
    assert index.left_out == len(lengths) - len(fitting)
    assert all(len(row_) <= 2 * pairs_in(row) for row_ in rows)
    loads = sorted(sum(max(16, b[1] + w[1]) for b, w in zip(r[::2], r[1::2], strict=True)) for r in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > row
