"""Bits per byte is one number for one model and one held-out text, however the scoring is cut up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from windtunnel.corpus.loader import Loader
from windtunnel.corpus.store import HeldOut
from windtunnel.train.bits_per_byte import score_heldout
from windtunnel.train.loop import Workshop
from windtunnel.train.step import train_step


@pytest.fixture(scope="module")
def trained(tiny_corpus, eager):
    """A trainer whose model has learnt a little, so that its losses differ from token to token."""
    from windtunnel.corpus.mixture import DataPlan, Segment
    from windtunnel.model.parametrization import Parametrization
    from windtunnel.model.shape import Shape
    from windtunnel.train.schedule import Schedule
    from windtunnel.train.stage import AdamW, Stage

    shape = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=320, base_width=32)
    plan = DataPlan(seed=1, row=32, segments=(Segment(0, (("tiny", 1.0),)),))
    stage = Stage("s", "trunk", shape, Parametrization(), AdamW(), Schedule(), plan, (), 8, 20, 1)
    trainer = Workshop(eager).trainer(stage)
    loader = Loader(plan, {"tiny": tiny_corpus})
    for step in range(20):
        train_step(trainer, loader.rows(8 * step, 8), 0.01)
    return trainer


def brute_force(model, heldout: HeldOut, row: int, documents: int) -> float:
    """Nats of the first documents, one at a time, in windows of ``row`` predictions that see only themselves."""
    total = 0.0
    with torch.no_grad():
        for number in range(documents):
            tokens = heldout.tokens[heldout.offsets[number] : heldout.offsets[number + 1]].astype(np.int64)
            for first in range(0, len(tokens) - 1, row):
                window = torch.from_numpy(tokens[first : first + row + 1])
                logits = model(window[None, :-1])[0]
                losses = F.cross_entropy(logits, window[1:], reduction="none")
                kept = torch.ones(len(losses)) if heldout.mask is None else torch.from_numpy(
                    heldout.mask[heldout.offsets[number] + first + 1 :][: len(losses)].astype(np.float32)
                )  # fmt: skip
                total += float((losses * kept).double().sum())
    return total


@pytest.mark.parametrize("row", [32, 50])
def test_it_is_the_sum_over_documents_one_by_one_over_their_bytes(trained, tiny_corpus, row):
    heldout = tiny_corpus.heldout
    count = len(heldout.offsets) - 1
    found = score_heldout(trained, heldout, row)
    assert found.nats == pytest.approx(brute_force(trained.model, heldout, row, count), rel=1e-6)
    assert found.tokens == len(heldout.tokens) - count  # all but the begin of each document
    assert found.bytes == int(heldout.bytes.sum())
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes, rel=1e-12)


def test_bytes_are_those_of_the_text_itself(trained, tiny_corpus):
    from windtunnel.corpus.tokenizer import Tokenizer

    heldout = tiny_corpus.heldout
    assert Tokenizer.bos_id == heldout.tokens[0]
    assert (heldout.bytes > 0).all()
    assert score_heldout(trained, heldout, 32).bits_per_byte < 8


def test_it_is_the_same_for_any_micro_batch(trained, tiny_corpus):
    values = []
    for micro in (1, 2, 7, 32):
        trained.micro = micro
        values.append(score_heldout(trained, tiny_corpus.heldout, 32).bits_per_byte)
    assert max(values) - min(values) <= 1e-6 * values[0]


def test_a_limit_scores_whole_documents_from_the_front(trained, tiny_corpus):
    heldout = tiny_corpus.heldout
    limit = int(heldout.offsets[3]) + 5
    found = score_heldout(trained, heldout, 32, limit)
    assert found.tokens == heldout.offsets[3] - 3
    assert found.nats == pytest.approx(brute_force(trained.model, heldout, 32, 3), rel=1e-6)


def test_a_mask_leaves_out_what_it_masks(trained, tiny_corpus):
    heldout = tiny_corpus.heldout
    mask = (np.arange(len(heldout.tokens)) % 3 == 0).astype(np.uint8)
    mask[heldout.offsets[:-1]] = 0
    masked = HeldOut(heldout.tokens, heldout.offsets, heldout.bytes, mask)
    found = score_heldout(trained, masked, 32)
    assert found.tokens == mask.sum()
    assert found.nats == pytest.approx(brute_force(trained.model, masked, 32, len(heldout.offsets) - 1), rel=1e-6)


def test_scoring_changes_no_weight_and_leaves_no_gradient(trained, tiny_corpus):
    before = [p.detach().clone() for p in trained.model.parameters()]
    score_heldout(trained, tiny_corpus.heldout, 32)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    assert all(p.grad is None for p in trained.model.parameters())
    assert trained.model.training
