"""The loss in chunks is the loss, and layers that are computed again give the same gradients, whatever the row's length."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from windtunnel.corpus.loader import IGNORED
from windtunnel.model import chunked_size
from windtunnel.model.adapters import attach
from windtunnel.model.chunked import summed_cross_entropy
from windtunnel.model.chunked_size import chunk_positions, is_chunked
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.balance import balanced
from windtunnel.train.growth import Balance
from windtunnel.train.objectives import OBJECTIVES, PairwisePreference
from windtunnel.train.preference import Preference
from windtunnel.train.step import make_compute

SHAPE = Shape(width=32, layers=3, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=301, base_width=32)


def batch(rows: int = 2, row: int = 90, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tokens, targets of which every seventh is not scored, and documents of 40 tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(5, SHAPE.vocab, (rows, row), generator=draw) for _ in range(2))
    targets[:, ::7] = IGNORED
    return tokens, targets, (torch.arange(row) // 40).expand(rows, row).int()


def pairs() -> tuple[torch.Tensor, ...]:
    """Two answers of 40 tokens in each row, and what a reference says of them."""
    tokens, targets, _ = batch()
    documents = torch.tensor([0] * 40 + [1] * 40 + [2] * 10).expand(2, 90).int()
    targets[documents == 2] = IGNORED
    return tokens, targets, documents, torch.tensor([[-240.0, -230.0], [-235.0, -242.0]])


DPO = PairwisePreference(Preference())


def gradients(model: Transformer, objective, parts=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The objective's sums, and the gradient of each weight that is trained."""
    model.zero_grad(set_to_none=True)
    compute = make_compute(objective, compiled=False)
    loss, sums = compute(model, *(parts or batch()), torch.ones(len(objective.names)) / 150)
    loss.backward()
    return sums, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def chunks(monkeypatch):
    """From here on all logits are made in chunks of 16 positions."""

    def switch() -> None:
        monkeypatch.setattr(chunked_size, "WHOLE", 0)
        monkeypatch.setattr(chunked_size, "CHUNK", {"cpu": 16 * SHAPE.vocab})

    return switch


@pytest.mark.parametrize("kind", ["tied", "untied", "adapters", "experts"])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_all_logits_at_once(kind, chunks):
    shape = replace(SHAPE, tied=kind != "untied", experts=4 if kind == "experts" else 1)
    model = Transformer(shape, Parametrization())
    objective = OBJECTIVES["lm"]
    if kind == "experts":
        objective = balanced(objective, Balance(loss=0.01, z=0.001, bias=0.0))
    if kind == "adapters":
        attach(model, 2, 1.0)
    model.init_weights(0)
    if kind == "experts":
        model.load.zero_()
        model.shares.fill_(-1.0)
    sums, wanted = gradients(model, objective)
    chunks()
    found, others = gradients(model, objective)
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=0)
    assert len(others) == len(wanted) > 0
    for mine, other in zip(others, wanted, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm() + 1e-12


@pytest.mark.parametrize("kind", ["tied", "untied", "adapters"])
@pytest.mark.parametrize("loss", ["dpo", "dpo-normalised", "simpo"])
def test_a_preference_in_chunks_and_its_gradients_are_those_of_all_logits_at_once(kind, loss, chunks):
    model = Transformer(replace(SHAPE, tied=kind != "untied"), Parametrization())
    if kind == "adapters":
        attach(model, 2, 1.0)
    model.init_weights(0)
    objective = PairwisePreference(Preference(loss, beta=0.5, smoothing=0.1))
    sums, wanted = gradients(model, objective, pairs())
    chunks()
    found, others = gradients(model, objective, pairs())
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=1e-6 * float(sums.abs().max()))
    assert len(others) == len(wanted) > 0
    for mine, other in zip(others, wanted, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm() + 1e-12


def test_short_rows_keep_all_logits_at_once_and_long_ones_do_not():
    assert not is_chunked(1024, 4096)  # what a micro-batch on a CPU is
    assert not is_chunked(8 * 1024, 2048)  # of experts
    assert is_chunked(131_072, 320)
    assert is_chunked(1024, 122_760)
    assert chunk_positions(122_760) * 122_760 <= 1 << 22
    assert chunk_positions(1 << 24) == 16


def test_without_gradients_none_are_made_and_rows_that_score_nothing_cost_nothing():
    h, head = torch.randn(50, 8), torch.randn(20, 8, requires_grad=True)
    targets = torch.full((50,), IGNORED)
    loss = summed_cross_entropy(h, head, targets, 17)
    loss.backward()
    assert loss.item() == 0
    assert head.grad is not None
    assert head.grad.abs().max() == 0
    with torch.no_grad():
        targets[3] = 5
        whole = torch.nn.functional.cross_entropy(h @ head[:17].T, targets, ignore_index=IGNORED, reduction="sum")
        assert summed_cross_entropy(h, head, targets, 17).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("experts", [1, 4])
def test_layers_that_are_computed_again_give_the_same_gradients_to_the_bit(experts):
    model = Transformer(replace(SHAPE, experts=experts), Parametrization())
    model.init_weights(1)
    objective = OBJECTIVES["lm"]
    if experts > 1:
        objective = balanced(objective, Balance(loss=0.01, z=0.001, bias=0.0))
        model.load.zero_()
        model.shares.fill_(-1.0)
    sums, wanted = gradients(model, objective)
    if experts > 1:
        model.load.zero_()
    model.recompute = True
    found, others = gradients(model, objective)
    assert torch.equal(found, sums)
    assert all(torch.equal(mine, other) for mine, other in zip(others, wanted, strict=True))
    if experts > 1:
        assert model.load.sum() == SHAPE.layers * (batch()[1] != IGNORED).sum()  # counted once


@pytest.mark.slow
@pytest.mark.parametrize("objective", [OBJECTIVES["lm"], DPO], ids=["lm", "dpo"])
def test_compiled_it_is_the_same(chunks, objective):
    model = Transformer(SHAPE, Parametrization())
    model.init_weights(1)
    parts = pairs() if objective is DPO else batch()
    _, wanted = gradients(model, objective, parts)
    chunks()
    model.recompute = True
    model.zero_grad(set_to_none=True)
    loss, _ = make_compute(objective, compiled=True)(model, *parts, torch.ones(len(objective.names)) / 150)
    loss.backward()
    for p, other in zip(model.parameters(), wanted, strict=True):
        assert (p.grad - other).norm() <= 2e-6 * other.norm() + 1e-12


PEAK = """
import json, sys, torch
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.objectives import OBJECTIVES, PairwisePreference
from windtunnel.train.preference import Preference
from torch.profiler import ProfilerActivity, profile

torch.set_num_threads(1)
values, row, recompute = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "again"
model = Transformer(Shape(**values, max_positions=row), Parametrization())
model.init_weights(0)
model.recompute = recompute
tokens = torch.randint(5, 6000, (1, row))
documents = torch.zeros(1, row, dtype=torch.int32)
objective, batch = OBJECTIVES["lm"], [tokens, tokens, documents]
if sys.argv[4] == "dpo":
    documents[0, row // 2 :] = 1
    objective, batch = PairwisePreference(Preference()), [*batch, torch.zeros(1, 2)]
now = most = 0
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    objective.sums(model, *batch)[0].backward()
for event in seen.profiler.kineto_results.events():
    if event.name() == "[memory]":
        now += event.nbytes()
        most = max(most, now)
print(most)
"""
LONG = {"width": 32, "layers": 3, "heads": 2, "kv_heads": 2, "head_dim": 16, "ff": 80, "vocab": 6016, "base_width": 32}


def peak(row: int, how: str, objective: str = "lm") -> float:
    """Most memory, in MiB, that the tensors of one forward and backward pass over one document take, in a process of its own."""
    command = [sys.executable, "-c", PEAK, json.dumps(LONG), str(row), how, objective]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 2**20


@pytest.mark.slow
def test_peak_memory_grows_with_the_row_and_not_with_its_square():
    """Logits whole would be 4 × 376 MiB at 16,384 tokens, a square of scores 1 GiB a head."""
    for how, each in (("kept", 10.0), ("again", 5.0)):
        small, middle, large = (peak(row, how) for row in (4096, 8192, 16_384))
        print(f"{how}: {small:.0f}, {middle:.0f}, {large:.0f} MiB at 4k, 8k, 16k tokens")
        assert large - middle == pytest.approx(2 * (middle - small), rel=0.1)
        assert large < each * 1024 * 16_384 / 2**20 + 100  # KiB a token, and the chunk


@pytest.mark.slow
def test_a_pair_of_long_answers_takes_no_more_than_one_long_document():
    """Both answers' logits whole would be 188 MiB at 8,192 tokens, and as much for each of their gradients."""
    document, pair = (peak(8192, "again", objective) for objective in ("lm", "dpo"))
    print(f"one document {document:.0f} MiB, a pair {pair:.0f} MiB at 8k tokens")
    assert pair < 1.05 * document + 2
    assert pair < 188
