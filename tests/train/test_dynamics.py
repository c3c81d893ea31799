"""The watched second pass: exact on a quadratic, equal to brute force on a small net, and the run's own updates."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from windtunnel.base.artefact import read_json
from windtunnel.corpus.loader import Loader
from windtunnel.train.checkpoint import load_model
from windtunnel.train.dynamics import Probe, Sampling, second_pass
from windtunnel.train.folder import RESULT, checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import MOVE, read_metrics
from windtunnel.train.objectives import OBJECTIVES
from windtunnel.train.pairs import LiveProbe, Watched, derivatives
from windtunnel.train.stage import AdamW, Stage, Start, optimizer_of


class Bowl(torch.nn.Module):
    """½·xᵀAx with A = diag(1, 4, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64))
        self.roles = {"x": SimpleNamespace(value="hidden")}


CURVES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def test_on_a_quadratic_every_number_is_the_closed_form():
    bowl: Any = Bowl()

    def compute(model, scale):
        return scale * (0.5 * CURVES * model.x**2).sum(), None

    probe = Probe(bowl, compute, Sampling(every=1, sharpness_every=1, window=2), 0)
    optimizer = Watched(torch.optim.SGD(bowl.parameters(), lr=0.05), probe=probe)
    places = [bowl.x.detach().clone()]
    for _ in range(5):
        probe.watched(bowl, 1.0)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        places.append(bowl.x.detach().clone())
    assert len(probe.pairs) == 4
    for t, pair in enumerate(probe.pairs):
        g, h, v = CURVES * places[t], CURVES * places[t + 1], places[t + 1] - places[t]
        found = derivatives(pair["roles"]["hidden"])
        assert pair["step"] == t + 1
        assert found["norm"] == pytest.approx(float(g.norm()), rel=1e-12)
        assert found["max"] == pytest.approx(float(g.abs().max()), rel=1e-12)
        assert found["cosine"] == pytest.approx(float((g * h).sum() / g.norm() / h.norm()), rel=1e-12)
        slope, curve = float((h * v).sum() / v.norm()), float((CURVES * v * v).sum() / (v * v).sum())
        assert found["d1"] == pytest.approx(slope, rel=1e-9)
        assert found["d2"] == pytest.approx(curve, rel=1e-9)  # v·A·v / v·v, exactly
        assert found["curvature"] == pytest.approx(abs(curve) / (1 + slope**2) ** 1.5, rel=1e-9)
        assert pair["sharpness"] == pytest.approx(float((g * CURVES * g).sum() / (g * g).sum()), rel=1e-6)
    assert [move["step"] for move in probe.moves] == [2, 4]
    assert probe.moves[0]["largest"]["x"] == pytest.approx(float((places[2] - places[0]).abs().max()))


def test_numbers_that_would_divide_by_nothing_are_none():
    still: dict[str, float] = dict.fromkeys(("gg", "hh", "gh", "gv", "hv", "vv", "max"), 0.0)
    found = derivatives(still)
    assert (found["cosine"], found["d1"], found["d2"], found["curvature"]) == (None, None, None, None)


@pytest.mark.parametrize("clip", [1.0, 0.02])
def test_a_small_net_is_measured_as_by_brute_force_however_it_was_clipped(
    tmp_path, make_trunk, tiny_corpus, eager, clip
):
    trunk = make_trunk(7, tuple(range(1, 8)), optimizer=AdamW(clip=clip))
    corpora, run = {"tiny": tiny_corpus}, tmp_path / "run"
    run_stage(trunk, run, corpora, Workshop(eager))
    again = replace(trunk, start=Start(trunk.key, 2), keep=(), save_final=False, open_ended=False)
    seen = second_pass(again, corpora, checkpoint_path(run, 2), Sampling(1, 2, 1), tmp_path / "pass", eager)

    recorded = dict(read_metrics(run))
    assert dict(seen["losses"]) == {s: v["loss"] for s, v in recorded.items() if s > 2}
    weights, gradients = {}, {}
    for t in range(2, 7):
        model = load_model(checkpoint_path(run, t))[0]
        gradients[t], weights[t] = gradient(model, trunk, corpora, t)
    pairs = {pair["step"]: pair for pair in seen["steps"]}
    assert sorted(pairs) == [3, 4, 5, 6]
    for t in range(2, 6):
        g, h, v, found = gradients[t], gradients[t + 1], weights[t + 1] - weights[t], pairs[t + 1]
        size = np.linalg.norm(v)
        slope, curve = h @ v / size, (h - g) @ v / size**2
        assert found["norm"] == pytest.approx(np.linalg.norm(g), rel=1e-4)
        assert found["max"] == pytest.approx(np.abs(g).max(), rel=1e-4)
        assert found["cosine"] == pytest.approx(g @ h / np.linalg.norm(g) / np.linalg.norm(h), abs=1e-4)
        assert found["d1"] == pytest.approx(slope, rel=1e-3)
        assert found["d2"] == pytest.approx(curve, rel=1e-3, abs=1e-3)
        assert found["curvature"] == pytest.approx(abs(curve) / (1 + slope**2) ** 1.5, rel=1e-3, abs=1e-3)
        assert math.isclose(
            math.hypot(*(part["norm"] for part in found["roles"].values())), found["norm"], rel_tol=1e-6
        )
        model = load_model(checkpoint_path(run, t))[0]
        if found["sharpness"] is not None:
            assert found["sharpness"] == pytest.approx(along_gradient(model, trunk, corpora, t, g), rel=0.02)
    assert [t for t in pairs if pairs[t]["sharpness"] is not None] == [3, 5]
    moved = np.abs(weights[4] - weights[3]).max()
    assert max(seen["moves"][1]["largest"].values()) <= moved * (1 + 1e-6)
    assert set(seen["moves"][0]["largest"]) == {n for n, p in model.named_parameters() if p.ndim == 2}


def loss_of(model, stage, corpora, t) -> torch.Tensor:
    rows = Loader(stage.plan, corpora).rows(t * stage.batch, stage.batch)
    batch = (torch.from_numpy(a) for a in (rows.inputs, rows.targets, rows.documents))
    return OBJECTIVES["lm"].sums(model, *batch)[0] / float(OBJECTIVES["lm"].counts(rows)[0])


def gradient(model, stage, corpora, t) -> tuple[np.ndarray, np.ndarray]:
    """The whole batch at once: gradient and weights, flattened."""
    loss_of(model, stage, corpora, t).backward()
    parts = [(p.grad, p.detach()) for p in model.parameters()]
    g, w = (np.concatenate([x.double().numpy().ravel() for x in column]) for column in zip(*parts, strict=True))
    return g, w


def along_gradient(model, stage, corpora, t, g: np.ndarray) -> float:
    """ĝ·H·ĝ by differentiating twice."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels cannot be differentiated twice
        first = torch.autograd.grad(loss_of(model, stage, corpora, t), parameters, create_graph=True)
    unit = torch.from_numpy(g / np.linalg.norm(g)).float()
    pieces = torch.split(unit, [p.numel() for p in parameters])
    slope = sum((f.ravel() * u).sum() for f, u in zip(first, pieces, strict=True))
    assert isinstance(slope, torch.Tensor)
    second = torch.autograd.grad(slope, parameters)
    return float(sum((s.ravel() * u).sum() for s, u in zip(second, pieces, strict=True)))


def test_looking_at_every_third_step_finds_the_same_numbers_there_and_changes_no_update(
    tmp_path, make_trunk, tiny_corpus, eager
):
    trunk, corpora = make_trunk(9, open_ended=False, save_final=False), {"tiny": tiny_corpus}
    every, third = (second_pass(trunk, corpora, None, Sampling(n, 1, 3), tmp_path / str(n), eager) for n in (1, 3))
    assert [pair["step"] for pair in third["steps"]] == [1, 4, 7]
    known = {pair["step"]: pair for pair in every["steps"]}
    assert all(known[pair["step"]] == pair for pair in third["steps"])
    assert third["losses"] == every["losses"]
    assert third["moves"] == every["moves"]
    assert [move["step"] for move in third["moves"]] == [3, 6, 9]


def without_pairs(run) -> list:
    return [(s, {n: v for n, v in values.items() if not n.startswith("pair_")}) for s, values in read_metrics(run)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_live_probe_changes_no_bit_of_the_training_and_finds_what_the_second_pass_finds(
    tmp_path, make_trunk, tiny_corpus, eager, kind
):
    corpora = {"tiny": tiny_corpus}
    plain = make_trunk(11, (4, 11), optimizer=optimizer_of(kind, AdamW(clip=0.5)))
    live = replace(plain, dynamics_every=3)
    assert (live.key, Stage.from_dict(live.to_dict())) == (plain.key, live)
    for name, stage in (("plain", plain), ("live", live)):
        run_stage(stage, tmp_path / name, corpora, Workshop(eager))
    assert without_pairs(tmp_path / "live") == list(read_metrics(tmp_path / "plain"))
    for step in (4, 11):
        for part in ("weights", "optimizer"):
            a, b = (checkpoint_path(tmp_path / name, step) / f"{part}.safetensors" for name in ("plain", "live"))
            assert a.read_bytes() == b.read_bytes()
    again = replace(plain, keep=(), save_final=False, open_ended=False)
    second = second_pass(again, corpora, None, Sampling(1, 100, 1), tmp_path / "2", eager)
    wanted = {p["step"]: p for p in second["steps"]}
    moved = {move["step"]: move["largest"] for move in second["moves"]}
    found = {s - 1: v for s, v in read_metrics(tmp_path / "live") if "pair_d1" in v}
    assert list(found) == [3, 6, 9]
    for step, values in found.items():
        for name in ("max", "cosine", "d1", "d2", "curvature"):
            assert values[f"pair_{name}"] == pytest.approx(wanted[step][name], rel=1e-9)
        for role, numbers in wanted[step]["roles"].items():
            for name in ("norm", "max", "cosine", "d1", "d2", "curvature"):
                assert values[f"pair_{name}/{role}"] == pytest.approx(numbers[name], rel=1e-9)
        assert {n.removeprefix(MOVE): v for n, v in values.items() if n.startswith(MOVE)} == moved[step]
    assert read_json(tmp_path / "live" / RESULT)["probe_seconds"] > 0


def test_a_torn_pair_is_left_out_and_the_others_are_those_of_an_uninterrupted_run(
    tmp_path, make_trunk, tiny_corpus, eager
):
    corpora, stage = {"tiny": tiny_corpus}, make_trunk(10, (4, 10), dynamics_every=2)
    run_stage(stage, tmp_path / "whole", corpora, Workshop(eager))
    run_stage(stage.with_steps(4), tmp_path / "torn", corpora, Workshop(eager))
    (tmp_path / "torn" / RESULT).unlink()
    run_stage(stage, tmp_path / "torn", corpora, Workshop(eager))
    whole, torn = ({s: v for s, v in read_metrics(tmp_path / n) if "pair_d1" in v} for n in ("whole", "torn"))
    assert list(whole) == [3, 5, 7, 9]
    assert torn == {step: values for step, values in whole.items() if step != 5}


def test_a_pair_with_a_skipped_update_is_none(tiny_corpus, make_trunk, eager):
    model: Any = Workshop(eager).trainer(make_trunk(3)).model
    probe = LiveProbe(model, 2, eager)

    def update(step: int, *, applied: bool = True) -> dict[str, float]:
        probe.at(step)
        if applied:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            probe.before()
            for p in model.parameters():
                p.data -= 0.1
            probe.after()
        return probe.closed(1.0, applied)

    seen = [update(1), update(2), update(3), update(4), update(5, applied=False), update(6, applied=False), update(7)]
    assert [bool(pair) for pair in seen] == [False, False, True, False, False, False, False]
    assert seen[2]["pair_cosine"] == pytest.approx(1)
