"""The batch law's fit recovers planted constants, the paper's among them, and says where it cannot know."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from windtunnel.laws.batch import NAMED_BATCH
from windtunnel.laws.batch_fit import BatchRun, Minimum, find_minima, fit_batch_law, levels, tokens_to_reach
from windtunnel.laws.fit import LawError

SIZES = (9e6, 3.6e7, 1.7e8)
BATCHES = [2.0**k for k in range(16, 23)]


def planted(
    coefficient: float, exponent: float, noise: float = 0.0, seed: int = 0, cost: float = 0.05
) -> list[BatchRun]:
    """Runs in a world where ``cost`` octave² of a wrong batch in log tokens is lost around coefficient / loss^exponent."""
    draw = np.random.default_rng(seed)
    runs = []
    for number, size in enumerate(SIZES):
        losses = np.geomspace(4.2, 2.9, 14) * (1 - 0.04 * number)
        for batch in BATCHES:
            octaves = np.log2(batch / (coefficient / losses**exponent))
            tokens = 1e7 * (5 / losses) ** 9 * (1 - 0.1 * number) * np.exp(cost * octaves**2)
            noisy = tokens * np.exp(noise * draw.standard_normal(len(losses)))
            runs.append(BatchRun(size, batch, tuple(zip(noisy.tolist(), losses.tolist(), strict=True))))
    return runs


def test_the_papers_constants_are_recovered_from_equal_loss_points() -> None:
    paper = NAMED_BATCH["minicpm"]
    found = fit_batch_law(find_minima(planted(paper.coefficient, paper.exponent)))
    assert found.law.exponent == pytest.approx(6.24, rel=0.01)
    assert found.law.coefficient == pytest.approx(1.21e9, rel=0.03)
    assert found.law.tokens(3.5) == pytest.approx(paper.tokens(3.5), rel=0.01)
    for minimum in found.minima:
        assert minimum.edge == ""
        assert minimum.half == minimum.double == pytest.approx(math.expm1(0.05), rel=0.1)


def test_noise_widens_the_interval_that_holds_the_truth() -> None:
    inside = 0
    for seed in range(40):
        found = fit_batch_law(find_minima(planted(1.21e9, 6.24, noise=0.02, seed=seed)))
        assert found.law.exponent == pytest.approx(6.24, abs=1.5)
        assert found.exponent_low is not None
        assert found.exponent_high is not None
        inside += found.exponent_low <= 6.24 <= found.exponent_high
    assert inside >= 30  # 36 expected of a 90 % interval


def test_a_curve_is_read_between_its_lengths_and_nowhere_else() -> None:
    curve = [(1e6, 4.0), (4e6, 3.0), (2e6, 3.5)]
    assert tokens_to_reach(curve, 3.5) == pytest.approx(2e6)
    assert 1e6 < (tokens_to_reach(curve, 3.8) or 0) < 2e6
    assert tokens_to_reach(curve, 4.1) is None
    assert tokens_to_reach(curve, 2.9) is None
    with pytest.raises(LawError, match="expected positive tokens and losses"):
        tokens_to_reach([(1e6, math.nan)], 3.0)


def test_levels_are_losses_that_every_batch_reached() -> None:
    runs = [BatchRun(1e6, 1e4, ((1e6, 4.0), (4e6, 3.0))), BatchRun(1e6, 2e4, ((1e6, 4.4), (4e6, 3.3)))]
    found = levels(runs, 3)
    assert len(found) == 3
    assert all(3.3 < level < 4.0 for level in found)
    assert levels([runs[0], BatchRun(1e6, 4e4, ((1e6, 5.0), (4e6, 4.5)))]) == []


def test_a_best_batch_at_the_end_of_the_grid_is_no_point_of_the_law() -> None:
    minima = find_minima(planted(1.21e11, 6.24))
    assert {m.edge for m in minima} == {"large"}
    with pytest.raises(LawError, match="got 0 of 15 inside the grid; add smaller or larger batches"):
        fit_batch_law(minima)
    with pytest.raises(LawError, match="expected 3 batches of a size or more, got 2"):
        find_minima([run for run in planted(1e9, 6) if run.batch < 2**18])


def test_two_sizes_give_a_law_without_an_interval_and_it_is_json() -> None:
    minima = [Minimum(n, loss, 1e9 / loss**6, 1e8, 0.1, 0.1) for n in (1e6, 2e6) for loss in (3.0, 3.5)]
    found = fit_batch_law([*minima, Minimum(3e6, 3.1, 5.0, 1e8, math.nan, math.nan, "small")])
    assert found.law.exponent == pytest.approx(6)
    assert found.exponent_low is None
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["minima"][-1]["half"] is None
    assert "tokenizer" in found.law.caveat(3.2)
