"""The three-term law recovers a planted world, and its best batch and prices are those of a search over batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from windtunnel.laws.batch_terms import BatchPoint, ThreeTermLaw, fit_three_terms
from windtunnel.laws.fit import LawError

TRUE = {"E": 1.1, "A": 30.0, "a": 0.3, "B": 8.0, "b": 0.6, "C": 9.0, "c": 0.35}
WORLD = ThreeTermLaw(TRUE, (2e4, 1e5), (512.0, 16384.0), (2e5, 4e6), 0.0)


def planted(noise: float = 0.0, seed: int = 0) -> list[BatchPoint]:
    draw = np.random.default_rng(seed)
    points = []
    for size in (2.4e4, 5.3e4, 9.5e4):
        for batch in (512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0):
            shared = noise * draw.standard_normal()
            for ratio in (10, 20, 40):
                steps = round(ratio * size / batch)
                loss = WORLD.loss(size, batch, steps) * math.exp(shared + 0.3 * noise * draw.standard_normal())
                points.append(BatchPoint(size, batch, steps, loss, f"{size}-{batch}"))
    return points


def test_the_best_batch_is_where_a_search_finds_it_and_prices_bring_the_loss_back() -> None:
    for tokens in (3e5, 1e7):
        batches = np.geomspace(100, 1e5, 20_001)
        losses = [WORLD.loss(5e4, m, tokens / m) for m in batches]
        best = WORLD.best_batch(tokens)
        assert best.value == pytest.approx(batches[int(np.argmin(losses))], rel=1e-3)
        assert (best.low, best.high) == (None, None)
        for factor in (0.5, 2.0):
            more = 1 + WORLD.cost(tokens, factor).value
            assert more > 1
            batch = factor * best.value
            assert WORLD.loss(5e4, batch, more * tokens / batch) == pytest.approx(min(losses), rel=1e-9)
        low, high = WORLD.band(tokens)
        assert low < best.value < high
        assert [WORLD.cost_of(tokens, m).value for m in (low, high)] == pytest.approx([0.05, 0.05], rel=1e-6)
    ratio = WORLD.best_batch(8e6).value / WORLD.best_batch(1e6).value
    assert math.log(ratio) / math.log(8) == pytest.approx(WORLD.exponent.value)


def test_a_planted_law_is_recovered_where_it_was_measured_and_beyond() -> None:
    found = fit_three_terms(planted())
    assert found.residual < 1e-3
    for tokens in (5e5, 4e6, 3e7):
        assert found.best_batch(tokens).value == pytest.approx(WORLD.best_batch(tokens).value, rel=0.15)
    assert found.cost(2e6, 2.0).value == pytest.approx(WORLD.cost(2e6, 2.0).value, rel=0.2)
    assert (found.sizes, found.batches) == ((2.4e4, 9.5e4), (512.0, 16384.0))


def test_the_interval_of_the_best_batch_holds_the_truth_in_most_noisy_worlds() -> None:
    inside = 0
    for seed in range(12):
        found = fit_three_terms(planted(2e-3, seed), noise=2e-3, draws=60).best_batch(2e6)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= WORLD.best_batch(2e6).value <= found.high
    assert inside >= 8


def test_a_batch_that_never_gets_there_costs_infinitely_much_and_too_few_runs_are_refused() -> None:
    assert WORLD.cost_of(1e9, 1.0).value == math.inf
    assert WORLD.cost_of(1e9, 1.0).to_dict()["value"] is None
    points = planted()
    one_length = [replace(p, steps=2**20 / p.batch) for p in points]
    for few in (points[:7], [p for p in points if p.batch < 2000], one_length):
        with pytest.raises(LawError, match="expected 8 runs with 3 batches and 2 lengths"):
            fit_three_terms(few)
    with pytest.raises(LawError, match="positive numbers"):
        fit_three_terms([*points, replace(points[0], loss=math.nan)])
