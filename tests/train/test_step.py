"""One step: rates by role, sums that do not depend on how a batch is cut, and no way in for a number that is not finite."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from windtunnel.base.errors import WindtunnelError
from windtunnel.corpus.loader import IGNORED, Loader, Rows
from windtunnel.model.parametrization import Parametrization, Role
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.control import Control
from windtunnel.train.loop import Workshop, run_stage, step_or_halve
from windtunnel.train.metrics import read_metrics
from windtunnel.train.noise import EVERY_HALVED, noise_scale, split
from windtunnel.train.optimizer import build_optimizer, set_learning_rate
from windtunnel.train.stage import AdamW, optimizer_of
from windtunnel.train.step import train_step


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Copies of all weights, moments and counts of updates."""
    out = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        out.update({f"{key}/{name}": value.clone() for key, value in trainer.optimizer.state.get(p, {}).items()})
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def workshop(eager):
    return Workshop(eager)


@pytest.fixture
def loader(make_trunk, tiny_corpus):
    return Loader(make_trunk(10).plan, {"tiny": tiny_corpus})


def test_every_tensor_gets_the_learning_rate_and_decay_of_its_role():
    shape = Shape(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=320, base_width=32, tied=False)
    model = Transformer(shape, Parametrization())
    optimizer = build_optimizer(model, AdamW(learning_rate=0.01, weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    for factor in (1.0, 0.25):
        set_learning_rate(optimizer, 0.01 * factor)
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert len(found) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)
        for name, (rate, weight_decay) in found.items():
            hidden = ".attention." in name or ".mlp." in name  # matrices between the two ends: η/(64/32)
            assert rate == pytest.approx(0.01 * factor / (2 if hidden else 1), rel=1e-12), name
            assert weight_decay == pytest.approx(0.1, rel=1e-12), name


def test_independent_decay_takes_the_same_share_of_every_tensor_whatever_the_learning_rate():
    """w ← w − f·λ·w by hand: gradients are zero, so that nothing but decay moves a weight."""
    shape = Shape(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=320, base_width=32, tied=False)
    model = Transformer(shape, Parametrization())
    for rate in (0.01, 0.003):
        model.init_weights(0)
        optimizer = build_optimizer(model, AdamW(learning_rate=rate, weight_decay=2e-3, decay="independent"))
        wanted = {name: p.detach().double() for name, p in model.named_parameters()}
        for factor in (0.5, 1.0, 0.25):  # of the schedule
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            set_learning_rate(optimizer, rate * factor)
            optimizer.step()
            wanted = {name: w - factor * 2e-3 * w for name, w in wanted.items()}
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), wanted[name], rtol=1e-6, atol=0, msg=name)


def test_adamw_makes_the_update_that_its_formula_says(workshop, make_trunk, loader):
    stage = make_trunk(10)
    trainer = workshop.trainer(stage)
    before = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    rows = loader.rows(0, stage.batch)
    loss = torch.nn.functional.cross_entropy(
        trainer.model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents)).flatten(0, 1),
        torch.from_numpy(rows.targets).flatten(), ignore_index=IGNORED,
    )  # fmt: skip
    gradients = dict(zip(before, torch.autograd.grad(loss, list(trainer.model.parameters())), strict=True))
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
    report = train_step(trainer, rows, 0.004)
    assert report.terms["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-5)
    clip = min(1.0, 1.0 / norm)
    for name, p in trainer.model.named_parameters():
        g = gradients[name].double() * clip  # m̂ = g and v̂ = g² after one step
        expected = before[name] * (1 - 0.004 * 0.1) - 0.004 * g / (g.abs() + 1e-8)
        # Where |g| is close to ε the quotient amplifies rounding; those entries are few and bounded by the rate.
        clear = g.abs() > 1e-5
        torch.testing.assert_close(p.detach().double()[clear], expected[clear], rtol=0, atol=2e-6)


@pytest.mark.parametrize("decay", ["plain", "independent"])
@pytest.mark.parametrize("name", ["mup", "completep"])
def test_muon_and_adamw_step_as_torchs_own_do_by_hand(name, decay):
    """One torch optimizer for each tensor, its numbers written out here, against ours after four steps."""
    shape = Shape(width=64, layers=4, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=320, base_width=32, qk_norm=True)
    constants = optimizer_of("muon", AdamW(learning_rate=0.02, weight_decay=0.05, decay=decay, epsilon=1e-4))
    ours, theirs = (Transformer(shape, Parametrization.named(name)) for _ in range(2))
    ours.init_weights(0)
    theirs.init_weights(0)
    optimizer, by_hand = build_optimizer(ours, constants, fused=False), []
    for key, p in theirs.named_parameters():
        share = 0.05 * 0.02 if decay == "plain" else 0.05  # that a step at full rate takes away
        if key.endswith((".query.weight", ".key.weight", ".value.weight", ".output.weight")) or ".mlp." in key:
            rate = 0.02 * min(1.0, math.sqrt(p.shape[0] / p.shape[1]))  # torch adds max(1, √(out/in))
            by_hand.append(torch.optim.Muon([p], lr=rate, momentum=0.95, weight_decay=share / rate))
        else:
            eps = 1e-4 / (2 if "_norm" not in key or "mlp_norm" in key or "attention_norm" in key else 1)  # m_N = 2
            eps /= 2 if key.startswith("layers.") else 1  # m_L = 2
            eps = eps if name == "completep" else 1e-4
            by_hand.append(torch.optim.AdamW([p], lr=0.02, betas=(0.9, 0.95), eps=eps, weight_decay=share / 0.02))
    rates = [part.param_groups[0]["lr"] for part in by_hand]
    for step, factor in enumerate((0.5, 1.0, 1.0, 0.3)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
            q.grad = p.grad.clone()
        set_learning_rate(optimizer, 0.02 * factor)
        optimizer.step()
        for part, rate in zip(by_hand, rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=key)


def test_a_muon_step_moves_every_matrix_by_its_spectral_size_along_the_polar_factor():
    """‖ΔW‖ = η·√(out/in) within Newton-Schulz's .7 to 1.2 (arXiv 2310.17813), in the direction of UVᵀ of the gradient."""
    for width in (32, 128):
        shape = Shape(width, 2, width // 16, 1, 16, 5 * width // 2, 320, 32)
        model = Transformer(shape, Parametrization())
        model.init_weights(0)
        optimizer = build_optimizer(model, optimizer_of("muon", AdamW(weight_decay=0.0)))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        for name, p in model.named_parameters():
            if model.roles[name] is not Role.HIDDEN:
                continue
            change, (rows, columns) = (before[name] - p.detach()).double(), p.shape
            size = torch.linalg.matrix_norm(change, 2).item() / (0.01 * math.sqrt(rows / columns))
            assert 0.7 < size < 1.25, (name, size)
            u, _, v = torch.linalg.svd(p.grad.double(), full_matrices=False)
            along = (change * (u @ v)).sum() / (change.norm() * (u @ v).norm())
            assert along > 0.95, (name, along)


@pytest.mark.parametrize("masking", ["document", "causal"])
def test_eight_times_one_row_is_one_times_eight_rows(workshop, make_trunk, loader, masking):
    stage = make_trunk(10, batch=8, masking=masking)
    losses, weights = [], []
    for micro in (8, 1, 3):
        trainer = workshop.trainer(stage)
        trainer.micro = micro
        losses.append([train_step(trainer, loader.rows(8 * i, 8), 0.01).terms["loss"] for i in range(5)])
        weights.append(state_of(trainer))
    for other in (1, 2):
        np.testing.assert_allclose(losses[other], losses[0], rtol=1e-5)
        for name in dict(trainer.model.named_parameters()):
            torch.testing.assert_close(weights[other][name], weights[0][name], rtol=0, atol=2e-4)


def test_rows_with_few_scored_tokens_count_by_tokens_and_not_by_rows(workshop, make_trunk, loader):
    rows = loader.rows(0, 4)
    targets = rows.targets.copy()
    targets[0, 2:] = IGNORED
    targets[1] = IGNORED
    rows = Rows(rows.inputs, targets, rows.documents)
    model = workshop.trainer(make_trunk(10)).model
    logits = model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents)).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).flatten(), ignore_index=IGNORED)
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    losses = []
    for micro in (4, 1):
        trainer = workshop.trainer(make_trunk(10))
        trainer.micro = micro
        losses.append(train_step(trainer, rows, 0.01))
    assert losses[1].terms["loss"] == pytest.approx(losses[0].terms["loss"], rel=1e-6)
    for report in losses:
        assert report.terms["loss"] == pytest.approx(mean.item(), rel=1e-6)
        assert report.gradient_norm == pytest.approx(norm, rel=1e-5)


def test_a_number_that_is_not_finite_changes_no_weight_and_no_moment_wherever_it_comes_from(
    workshop, make_trunk, loader
):
    stage, draw = make_trunk(10), random.Random(3)
    trainer = workshop.trainer(stage)
    real, parameters = trainer.compute, list(trainer.model.parameters())
    for step in range(2):
        assert train_step(trainer, loader.rows(4 * step, 4), 0.01).applied
    before = state_of(trainer)
    trainer.micro = 1
    for case in range(30):
        bad = draw.choice([math.nan, math.inf, -math.inf])
        place, micro = draw.choice(["loss", "reported", "gradient"]), draw.randrange(4)
        victim, calls = draw.choice(parameters), [0]

        def compute(*arguments, place=place, micro=micro, bad=bad, victim=victim, calls=calls):
            loss, sums = real(*arguments)
            calls[0] += 1
            if calls[0] == micro + 1:
                if place == "loss":
                    return loss * bad, sums * bad
                if place == "reported":
                    return loss, sums * bad
                victim.register_hook(lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 5, bad, g))
            return loss, sums

        trainer.compute = compute
        report = train_step(trainer, loader.rows(8, 4), 0.01)
        assert not report.applied, (case, place)
        assert same(state_of(trainer), before), (case, place, bad)
        for parameter in parameters:
            parameter._backward_hooks.clear() if parameter._backward_hooks else None
    trainer.compute = real
    assert train_step(trainer, loader.rows(8, 4), 0.01).applied
    assert not same(state_of(trainer), before)


def test_a_step_that_was_skipped_leaves_no_trace_in_later_steps(workshop, make_trunk, loader):
    def weights(skip: bool):
        trainer = workshop.trainer(make_trunk(10))
        for step in range(4):
            if skip and step == 2:
                real = trainer.compute
                trainer.compute = lambda *a, real=real: tuple(x * math.nan for x in real(*a))
                assert not train_step(trainer, loader.rows(400, 4), 0.01).applied
                trainer.compute = real
            train_step(trainer, loader.rows(4 * step, 4), 0.01)
        return state_of(trainer)

    assert same(weights(skip=True), weights(skip=False))


def test_out_of_memory_halves_the_micro_batch_says_so_once_and_changes_nothing_else(workshop, make_trunk, loader):
    said: list[str] = []
    results = []
    for fails in (False, True):
        trainer = workshop.trainer(make_trunk(10))
        real, calls = trainer.compute, [0]

        def compute(*arguments, real=real, calls=calls, fails=fails):
            calls[0] += 1
            if fails and len(arguments[1]) > 2 and calls[0] > 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(*arguments)

        trainer.compute = compute
        reports = [step_or_halve(trainer, loader.rows(4 * i, 4), 0.01, Control(say=said.append)) for i in range(3)]
        results.append([report.terms["loss"] for report in reports])
        assert trainer.micro == (2 if fails else 4)
    assert len(said) == 1
    assert "out of memory: the micro-batch is now 2 rows" in said[0]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_memory_that_does_not_suffice_for_one_row_is_an_error(workshop, make_trunk, loader):
    trainer = workshop.trainer(make_trunk(10))

    def compute(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    trainer.compute = compute
    with pytest.raises(WindtunnelError, match="out of memory with a micro-batch of 1 row; use more or larger devices"):
        step_or_halve(trainer, loader.rows(0, 4), 0.01, Control())
    assert trainer.micro == 1


def test_what_a_failed_stage_left_behind_does_not_reach_the_next_stage_of_the_same_shape(workshop, make_trunk, loader):
    def first_loss_after(dirty: bool):
        trainer = workshop.trainer(make_trunk(10))
        if dirty:
            trainer.compute(trainer.model, *_tensors(loader), torch.ones(1))[0].backward()  # killed before its update
            trainer = workshop.trainer(make_trunk(10))
        train_step(trainer, loader.rows(0, 4), 0.01)
        return state_of(trainer)

    assert same(first_loss_after(dirty=True), first_loss_after(dirty=False))


def _tensors(loader):
    rows = loader.rows(0, 4)
    return torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets), torch.from_numpy(rows.documents)


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(workshop, make_trunk, loader):
    def run(seed: int):
        trainer = workshop.trainer(replace(make_trunk(10), seed=seed))
        train_step(trainer, loader.rows(0, 4), 0.01)
        return state_of(trainer)

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def gradient_square(trainer, rows: Rows) -> float:
    """‖∇‖² of the mean loss over these rows, by autograd."""
    model = trainer.model
    logits = model(torch.from_numpy(rows.inputs), torch.from_numpy(rows.documents)).flatten(0, 1)
    targets = torch.from_numpy(rows.targets).flatten()
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
    return sum(
        float((g**2).sum()) for g in map(torch.Tensor.double, torch.autograd.grad(loss, list(model.parameters())))
    )


@pytest.mark.parametrize(("batch", "micro"), [(8, 2), (7, 2), (9, 4), (4, 1)])
def test_the_noise_of_a_step_is_what_every_micro_batchs_own_gradient_says(workshop, make_trunk, loader, batch, micro):
    """Against autograd on each part; and on all parts of one row, S is the sample variance of their gradients."""
    trainer = workshop.trainer(make_trunk(10))
    trainer.micro = micro
    rows = loader.rows(0, batch)
    cuts = [rows.part(i, micro) for i in range(0, batch, micro)]
    tokens = [float((cut.targets != IGNORED).sum()) for cut in cuts]
    parts = [(m, gradient_square(trainer, cut)) for m, cut in zip(tokens, cuts, strict=True)]
    wanted = split(parts, gradient_square(trainer, rows))
    report = train_step(trainer, rows, 0.004, measure=True)
    assert report.noise is not None
    assert wanted is not None
    assert report.noise.trace == pytest.approx(wanted.trace, rel=1e-4)
    assert report.noise.square == pytest.approx(wanted.square, rel=1e-3, abs=1e-4 * wanted.trace)
    assert workshop.trainer(make_trunk(10)).noise_every > 0


@pytest.mark.parametrize(("micro", "halve"), [(2, False), (8, True)])
def test_measuring_the_noise_changes_no_bit_of_weights_and_moments(workshop, make_trunk, loader, micro, halve):
    states = []
    for measure in (False, True):
        trainer = workshop.trainer(make_trunk(10))
        trainer.micro = micro
        found = [
            train_step(trainer, loader.rows(8 * step, 8), 0.004, measure=measure, halve=halve and measure).noise
            for step in range(3)
        ]
        assert all((noise is not None) == measure for noise in found)
        states.append(state_of(trainer))
    assert same(*states)


@pytest.mark.parametrize("batch", [8, 5, 2])
def test_the_only_micro_batch_of_a_step_is_measured_by_its_halves(workshop, make_trunk, loader, batch):
    trainer = workshop.trainer(make_trunk(10))
    trainer.micro = 8  # filled up with rows that nothing is asked of
    rows = loader.rows(0, batch)
    cuts = [rows.part(0, batch // 2), rows.part(batch // 2, batch)]
    tokens = [float((cut.targets != IGNORED).sum()) for cut in cuts]
    parts = [(m, gradient_square(trainer, cut)) for m, cut in zip(tokens, cuts, strict=True)]
    wanted = split(parts, gradient_square(trainer, rows))
    found = train_step(trainer, rows, 0.004, measure=True, halve=True).noise
    assert found is not None
    assert wanted is not None
    assert found.trace == pytest.approx(wanted.trace, rel=1e-4)
    assert found.square == pytest.approx(wanted.square, rel=1e-3, abs=1e-4 * wanted.trace)


def test_one_micro_batch_is_halved_in_trunks_now_and_then_and_one_row_never(workshop, make_trunk, loader):
    trunk = workshop.trainer(make_trunk(10))
    assert trunk.halved_every == EVERY_HALVED
    assert EVERY_HALVED % trunk.noise_every == 0  # only measured steps are halved
    assert workshop.trainer(replace(make_trunk(10), kind="trial")).halved_every == 0
    assert train_step(trunk, loader.rows(0, 1), 0.004, measure=True, halve=True).noise is None
    assert train_step(trunk, loader.rows(0, 4), 0.004, measure=True).noise is None


def test_a_trunk_of_one_micro_batch_a_step_records_its_noise_and_trains_bit_for_bit_as_without(
    workshop, make_trunk, tiny_corpus, tmp_path, monkeypatch
):
    stage, losses = make_trunk(EVERY_HALVED + 3), []
    for name, every in (("measured", EVERY_HALVED), ("not", 0)):
        monkeypatch.setattr("windtunnel.train.loop.EVERY_HALVED", every)
        run_stage(stage, tmp_path / name, {"tiny": tiny_corpus}, workshop)
        rows = dict(read_metrics(tmp_path / name))
        measured = [step for step, row in rows.items() if "noise_trace" in row]
        assert measured == ([EVERY_HALVED] if every else [])
        losses.append([row["loss"] for row in rows.values()])
        losses.append([row["gradient_norm"] for row in rows.values()])
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 1, 2), (4, 0, 4)])
def test_noise_and_signal_are_separated_without_bias_for_any_division(sizes):
    """Gradients of known mean and covariance: the averages of many steps find ‖G‖² and the trace."""
    draw = np.random.default_rng(0)
    mean, deviation = np.array([0.3, -0.2, 0.1]), np.array([0.5, 1.0, 0.2])
    found = []
    for _ in range(20_000):
        samples = mean + deviation * draw.standard_normal((sum(sizes), 3))
        parts, begin = [], 0
        for size in sizes:
            parts.append((float(size), float((samples[begin : begin + size].mean(0) ** 2).sum()) if size else 0.0))
            begin += size
        found.append(split(parts, float((samples.mean(0) ** 2).sum())))
    trace, square = (float((deviation**2).sum()), float((mean**2).sum()))
    assert np.mean([one.trace for one in found]) == pytest.approx(trace, rel=0.03)
    assert np.mean([one.square for one in found]) == pytest.approx(square, rel=0.05)
    assert noise_scale([o.trace for o in found], [o.square for o in found]) == pytest.approx(trace / square, rel=0.06)
    assert noise_scale([1.0, 2.0], [-1.0, 0.5]) is None
    assert split([(4.0, 1.0)], 1.0) is None
