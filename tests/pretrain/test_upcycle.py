"""A dense checkpoint becomes a mixture that first says what it said, and then trains, stops, resumes and scores as any stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from windtunnel.base.errors import ArtefactError
from windtunnel.base.runtime import Runtime, has_compiler
from windtunnel.corpus.loader import IGNORED, Loader, Rows
from windtunnel.growth import regained
from windtunnel.model.parametrization import Role
from windtunnel.model.sample import generate
from windtunnel.pretrain.upcycle import upcycled_stage
from windtunnel.train import surgery as surgery_module
from windtunnel.train.balance import begin_step
from windtunnel.train.bits_per_byte import score_heldout
from windtunnel.train.checkpoint import load_model
from windtunnel.train.control import Control
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.growth import Balance, Surgery
from windtunnel.train.loop import Workshop, begin, run_stage, scorer
from windtunnel.train.metrics import read_metrics
from windtunnel.train.noise import split
from windtunnel.train.stage import Muon, Stage
from windtunnel.train.step import to_device, train_step

EXPERTS = 4


@pytest.fixture(scope="module")
def workshop(eager):
    return Workshop(eager)


@pytest.fixture
def parent(tmp_path, workshop, make_trunk, tiny_corpus):
    """A trunk of six steps, and its checkpoint."""
    trunk = make_trunk(6)
    run_stage(trunk, tmp_path / "trunk", {"tiny": tiny_corpus}, workshop)
    return trunk, checkpoint_path(tmp_path / "trunk", 6)


def upcycled(trunk: Stage, setting, **changes) -> Stage:
    options = {"at": 6, "stable": 3, "decay": 3, "experts": EXPERTS, **changes}
    return upcycled_stage(trunk, "moe", setting, **options)


def started(stage: Stage, path, workshop: Workshop, folder) -> tuple:
    """A trainer at the beginning of a stage, its position, and what was said."""
    said: list[str] = []
    trainer = workshop.trainer(stage)
    at = begin(stage, folder / "run", path, trainer, Control(say=said.append))
    return trainer, at, said


def test_every_expert_is_the_parents_mlp_with_its_moments_and_the_logits_are_the_parents(
    tmp_path, parent, workshop, tiny_setting
):
    trunk, path = parent
    stage = upcycled(trunk, tiny_setting)
    dense, dense_at, _ = started(replace(trunk, start=stage.start, keep=()), path, Workshop(workshop.runtime), tmp_path)
    trainer, at, said = started(stage, path, workshop, tmp_path)
    assert at == dense_at
    assert (at.step, at.optimizer_step, at.sequences) == (6, 6, 24)
    assert "logits agree" in said[0]
    old, new = dict(dense.model.named_parameters()), dict(trainer.model.named_parameters())
    for name, parameter in new.items():
        state = trainer.optimizer.state[parameter]
        assert state["step"] == 6
        source = old.get(name, old.get(f"{name}.weight"))
        if source is None:
            assert name.endswith("router.weight")
            rule = stage.parametrization.rule(trainer.model.roles[name], stage.shape)
            assert parameter.std().item() == pytest.approx(rule.init_std, rel=0.3)
            assert state["exp_avg"].abs().max() == 0 == state["exp_avg_sq"].abs().max()
            continue
        for mine, theirs in (
            (parameter, source),
            *((state[m], dense.optimizer.state[source][m]) for m in ("exp_avg", "exp_avg_sq")),
        ):
            assert torch.equal(mine, theirs.expand(mine.shape)), name
    tokens_BT = torch.randint(0, 320, (3, 32), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(trainer.model(tokens_BT), dense.model(tokens_BT), rtol=0, atol=1e-5)


def test_a_copy_that_computes_something_else_is_refused_before_any_training(
    tmp_path, parent, workshop, tiny_setting, monkeypatch
):
    real = surgery_module._weight
    monkeypatch.setattr(
        surgery_module, "_weight", lambda name, *a: real(name, *a) * (1.01 if name.endswith(".up") else 1)
    )
    with pytest.raises(ArtefactError, match="found a difference"):
        started(upcycled(parent[0], tiny_setting), parent[1], workshop, tmp_path)


def test_dropped_columns_are_new_in_every_expert_and_have_the_parents_mean_and_deviation(
    tmp_path, parent, workshop, tiny_setting
):
    trunk, path = parent
    trainer, _, said = started(upcycled(trunk, tiny_setting, surgery=Surgery(drop=0.5)), path, workshop, tmp_path)
    assert "50% of the columns" in said[0]
    assert "differ by up to" in said[0]
    old, new = load_model(path)[0], trainer.model
    sets = []
    for layer in range(2):
        gate, up, down = (getattr(old.layers[layer].mlp, part).weight for part in ("gate", "up", "down"))
        mine = new.layers[layer].mlp
        for expert in range(EXPERTS):
            fresh = (mine.gate[expert] != gate).all(1)
            assert fresh.sum() == 40
            assert torch.equal(fresh, (mine.up[expert] != up).all(1))
            assert torch.equal(fresh, (mine.down[expert] != down).all(0))
            assert torch.equal(mine.gate[expert][~fresh], gate[~fresh])
            assert mine.gate[expert][fresh].std().item() == pytest.approx(gate[fresh].std().item(), rel=0.1)
            moment = trainer.optimizer.state[mine.gate]["exp_avg"][expert]
            assert moment[fresh].abs().max() == 0 < moment[~fresh].abs().max()
            sets.append(tuple(fresh.tolist()))
    assert len(set(sets)) == 2 * EXPERTS


@pytest.mark.parametrize("change", [{"ff": 48}, {"layers": 3}, {"vocab": 300}])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, parent, workshop, tiny_setting, change):
    stage = upcycled(parent[0], tiny_setting)
    stage = replace(stage, shape=replace(stage.shape, **change))
    with pytest.raises(ArtefactError, match=f"{next(iter(change))} "):
        started(stage, parent[1], workshop, tmp_path)


def test_a_mixture_with_a_batch_schedule_reads_what_it_says_and_goes_on_bit_for_bit_from_before_and_after_a_change(
    tmp_path, parent, workshop, tiny_setting, tiny_corpus
):
    trunk, path = parent
    stage = upcycled(trunk, tiny_setting, balance=Balance(0.01, 1e-3, 0.01), batch=6, changes=((8, 2), (10, 9)))
    assert stage.own_tokens == (2 * 6 + 2 * 2 + 2 * 9) * stage.plan.row
    corpora = {"tiny": tiny_corpus}
    result = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=path)
    assert result["timed_tokens"] == stage.own_tokens
    assert result["tokens"] == trunk.tokens + stage.own_tokens
    wanted = [f.read_bytes() for f in sorted(checkpoint_path(tmp_path / "whole", 12).glob("*.safetensors"))]
    for at in (7, 8, 9, 11):
        run_stage(replace(stage, steps=at), tmp_path / f"cut{at}", corpora, workshop, parent=path)
        run_stage(stage, tmp_path / f"cut{at}", corpora, workshop, parent=path)
        found = [f.read_bytes() for f in sorted(checkpoint_path(tmp_path / f"cut{at}", 12).glob("*.safetensors"))]
        assert found == wanted
        assert list(read_metrics(tmp_path / f"cut{at}")) == list(read_metrics(tmp_path / "whole"))


def test_a_mixture_trains_stops_resumes_scores_and_samples_like_any_stage(
    tmp_path, parent, workshop, tiny_setting, tiny_corpus
):
    trunk, path = parent
    stage = upcycled(trunk, tiny_setting, balance=Balance(0.01, 1e-3, 0.01), batch=6)
    corpora = {"tiny": tiny_corpus}
    result = run_stage(stage, tmp_path / "whole", corpora, workshop, parent=path)
    assert result["tokens"] == (6 * 4 + 6 * 6) * 32
    control = Control()
    real = Control.due

    def stop_after_two(self):
        self.calls = getattr(self, "calls", 0) + 1
        self.stop = self.calls == 2
        return real(self)

    control.due = stop_after_two.__get__(control)
    with pytest.raises(Exception, match="stopped after step"):
        run_stage(stage, tmp_path / "cut", corpora, workshop, parent=path, control=control)
    again = run_stage(stage, tmp_path / "cut", corpora, workshop, parent=path)
    assert again["scores"] == result["scores"]
    assert list(read_metrics(tmp_path / "cut")) == list(read_metrics(tmp_path / "whole"))
    files = [checkpoint_path(tmp_path / run, 12) / "weights.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    values = list(read_metrics(tmp_path / "whole"))[-1][1]
    assert {"loss", "balance", "router_z", "load_cv", "load_max", "load_0", "load_3"} <= values.keys()
    assert sum(values[f"load_{e}"] for e in range(EXPERTS)) == pytest.approx(EXPERTS)
    model, _ = load_model(checkpoint_path(tmp_path / "whole", 12))
    assert any(layer.mlp.bias.abs().max() > 0 for layer in model.layers)
    assert len(list(generate(model, [1], max_new=5))) == 5
    score = score_heldout(scorer(model, workshop.runtime, 32), tiny_corpus.heldout, 32, 600)
    assert score.bits_per_byte == pytest.approx(result["scores"]["tiny"]["bits_per_byte"], rel=1e-6)


def test_eight_times_one_row_is_one_times_eight_rows_balancing_loss_included(
    parent, workshop, tiny_setting, tiny_corpus
):
    # The shares of one row are far from those of eight, so a loss counted by micro-batch would differ in its first digits.
    stage = upcycled(parent[0], tiny_setting, batch=8, balance=Balance(1.0, 0.1, 0.01))
    loader = Loader(stage.plan, {"tiny": tiny_corpus})
    reports, weights = [], []
    for micro in (8, 1, 3):
        trainer = workshop.trainer(stage)
        trainer.micro = micro
        reports.append([train_step(trainer, loader.rows(8 * i, 8), 0.001) for i in range(3)])
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    for other in (1, 2):
        for a, b in zip(reports[0], reports[other], strict=True):
            assert b.terms == pytest.approx(a.terms, rel=1e-5)
            assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-5)
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[other][name], value, rtol=0, atol=2e-4)


def test_the_noise_of_a_step_of_experts_is_that_of_each_rows_gradient_under_the_whole_steps_shares(
    parent, workshop, tiny_setting, tiny_corpus
):
    stage = upcycled(parent[0], tiny_setting, batch=8, balance=Balance(1.0, 0.1, 0.01))
    rows = Loader(stage.plan, {"tiny": tiny_corpus}).rows(0, 8)
    trainer = workshop.trainer(stage)
    trainer.micro = 1
    begin_step(trainer, [to_device(rows, i, trainer) for i in range(8)])
    parts = []
    for i in range(8):
        counts = trainer.objective.counts(rows.part(i, 1))
        scale = torch.tensor(np.asarray(trainer.objective.weights) / counts, dtype=torch.float32)
        trainer.compute(trainer.model, *to_device(rows, i, trainer), scale)[0].backward()
        squares = [float(torch.linalg.vector_norm(p.grad)) ** 2 for p in trainer.model.parameters()]
        parts.append((float(counts[0]), sum(squares)))
        trainer.model.zero_grad(set_to_none=True)
    report = train_step(trainer, rows, 0.001, measure=True)
    wanted = split(parts, report.gradient_norm**2)
    assert wanted is not None
    assert report.noise is not None
    assert report.noise.trace == pytest.approx(wanted.trace, rel=1e-4)
    assert report.noise.square == pytest.approx(wanted.square, rel=1e-3, abs=1e-4 * wanted.trace)


def test_the_terms_are_those_of_the_formulas_over_scored_tokens_alone(parent, workshop, tiny_setting, tiny_corpus):
    stage = upcycled(parent[0], tiny_setting, batch=4)
    rows = Loader(stage.plan, {"tiny": tiny_corpus}).rows(0, 4)
    targets = rows.targets.copy()
    targets[0, 5:], targets[1] = IGNORED, IGNORED
    trainer = workshop.trainer(stage)
    _, routing = trainer.model.routed(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents))
    real = torch.from_numpy(targets.flatten() != IGNORED)
    balance, z = [], []
    for logits_NE, chosen_NK in routing:
        share_E = torch.bincount(chosen_NK[real].flatten(), minlength=EXPERTS) / (2 * real.sum())
        balance.append(EXPERTS * (logits_NE[real].softmax(-1).mean(0) * share_E).sum().item())
        z.append(logits_NE[real].logsumexp(-1).square().mean().item())
    report = train_step(trainer, Rows(rows.inputs, targets, rows.documents), 0.0)
    assert report.terms["balance"] == pytest.approx(np.mean(balance), rel=1e-5)
    assert report.terms["router_z"] == pytest.approx(np.mean(z), rel=1e-5)


@pytest.mark.parametrize("balance", [Balance(1.0), Balance(0.0, bias=0.1)], ids=["loss", "bias"])
def test_both_ways_of_balancing_even_out_the_load(parent, workshop, tiny_setting, tiny_corpus, balance):
    def unevenness(chosen: Balance) -> float:
        stage = upcycled(parent[0], tiny_setting, batch=8, balance=chosen)
        loader, trainer = Loader(stage.plan, {"tiny": tiny_corpus}), workshop.trainer(stage)
        lean(trainer.model, loader.rows(0, 8))
        reports = [train_step(trainer, loader.rows(8 * i, 8), 0.01) for i in range(20)]
        return float(np.mean([report.terms["load_cv"] for report in reports[-5:]]))

    assert unevenness(balance) < 0.5 * unevenness(Balance(0.0))


@torch.no_grad()
def lean(model, rows: Rows) -> None:
    """Tilts every router towards its first expert by what all of its inputs have in common."""
    inputs = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _, x, __: inputs.append(x[0].mean(0))) for layer in model.layers
    ]
    model(torch.from_numpy(rows.inputs))
    for layer, hook, mean_D in zip(model.layers, hooks, inputs, strict=True):
        layer.mlp.router.weight[0] += 2 * mean_D / mean_D.square().sum()
        hook.remove()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_a_compiled_step_of_experts_is_the_eager_one(parent, workshop, tiny_setting, tiny_corpus):
    stage = upcycled(parent[0], tiny_setting, balance=Balance(0.01, 1e-3, 0.01))
    loader = Loader(stage.plan, {"tiny": tiny_corpus})
    terms = []
    for runtime in (workshop.runtime, Runtime()):
        trainer = Workshop(runtime).trainer(stage)
        terms.append([train_step(trainer, loader.rows(4 * i, 4), 0.01).terms for i in range(3)])
    for eager_terms, compiled_terms in zip(*terms, strict=True):
        assert compiled_terms == pytest.approx(eager_terms, rel=1e-4)


def test_experts_of_a_muon_trunk_are_trained_by_adamw_and_its_other_matrices_by_muon_as_before(
    tmp_path, workshop, make_trunk, tiny_setting, tiny_corpus
):
    trunk = make_trunk(6, optimizer=Muon())
    run_stage(trunk, tmp_path / "trunk", {"tiny": tiny_corpus}, workshop)
    stage = upcycled(trunk, tiny_setting)
    trainer, at, said = started(stage, checkpoint_path(tmp_path / "trunk", 6), workshop, tmp_path)
    assert (at.step, at.optimizer_step) == (6, 6)
    assert "logits agree" in said[0]
    state = {name: trainer.optimizer.state[p] for name, p in trainer.model.named_parameters()}
    assert set(state["layers.0.attention.query.weight"]) == {"momentum_buffer"}
    assert state["layers.0.attention.query.weight"]["momentum_buffer"].abs().max() > 0
    for name in ("gate", "up", "down", "router.weight"):
        assert set(state[f"layers.0.mlp.{name}"]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state[f"layers.0.mlp.{name}"]["exp_avg"].abs().max() == 0  # Muon's moments are no use to AdamW
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    rule = stage.parametrization.rule(Role.ROUTER, stage.shape)
    assert groups[id(trainer.model.layers[0].mlp.router.weight)]["lr_multiplier"] == rule.lr_multiplier
    result = run_stage(
        stage, tmp_path / "moe", {"tiny": tiny_corpus}, workshop, parent=checkpoint_path(tmp_path / "trunk", 6)
    )
    assert 0 < result["scores"]["tiny"]["bits_per_byte"] < 20


def test_where_columns_were_drawn_anew_the_loss_after_one_hundredth_of_the_steps_stands_beside_the_dense_one(
    parent, tiny_setting
):
    stage = upcycled(parent[0], tiny_setting, stable=3000, decay=1000, surgery=Surgery(0.5))
    dense = (
        list(range(1, 9)),
        [9.0] * 5 + [3.0, 100.0, 100.0],
    )  # the branch point is step 6: what comes later is not its
    own = (list(range(7, 60)), [8.0] * 20 + [4.0] * 20 + [1.0] * 13)
    facts = regained(stage, own, dense)
    assert facts == {"step": 46, "dense": pytest.approx((9 * 5 + 3) / 6), "own": pytest.approx(4.0)}
