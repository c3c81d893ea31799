"""One step: rates by role, sums that do not depend on how a batch is cut, and no way in for a number that is not finite."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from windtunnel.corpus.loader import IGNORED, Loader, Rows
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.control import Control
from windtunnel.train.loop import Workshop, step_or_halve
from windtunnel.train.optimizer import build_optimizer, set_learning_rate
from windtunnel.train.stage import AdamW
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
    with pytest.raises(RuntimeError, match="can't allocate memory"):
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
