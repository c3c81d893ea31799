"""Whether a search has gone on long enough: the gap that it says is left is the gap that a longer search finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from windtunnel.tunnel.enough import Gap, gap_of, places, remaining_gap
from windtunnel.tunnel.search import Trial, propose, search
from windtunnel.tunnel.space import DEFAULT_SPACE, space_of

SPACE = DEFAULT_SPACE[:2]


def planted(draw: np.random.Generator, axes: int):
    """A bowl with correlated axes, walls of unequal steepness and its minimum inside the unit cube."""
    centre, slant = draw.uniform(0.2, 0.8, axes), 0.25 * draw.standard_normal((axes, axes)) + np.eye(axes)
    size = draw.uniform(0.7, 1.7, axes)
    curvature = slant @ slant.T * size[:, None] * size[None, :]
    skew, depth = draw.uniform(-0.5, 0.8, axes), 10 ** draw.uniform(-1.3, -0.3)

    def loss(x):
        z = x - centre
        return 1.5 + depth * np.einsum("...i,ij,...j", z, curvature, z) * (1 + z @ skew)

    return loss, depth * 10 ** draw.uniform(-2.5, -1)


def crowding(loss, number: int, axes: int, noise: float, draw: np.random.Generator):
    """A search in four-trial rounds that crowds around its best fifth, as a Bayesian one does."""
    x = draw.random((max(4, 2 * axes), axes))
    y = loss(x) + noise * draw.standard_normal(len(x))
    while len(x) < number:
        best = x[np.argsort(y)[: max(2, len(x) // 5)]]
        near = best[draw.integers(len(best), size=4)] + max(0.04, best.std(0).mean()) * draw.standard_normal((4, axes))
        new = np.where(draw.random((4, 1)) < 0.15, draw.random((4, axes)), near).clip(0, 1)
        x, y = np.concatenate([x, new]), np.concatenate([y, loss(new) + noise * draw.standard_normal(4)])
    return x[:number], y[:number]


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_interval_covers_what_a_search_left_to_run_four_times_longer_finds_at_about_its_nominal_rate(known):
    """Planted searches in one to six dimensions; nominal 90 %, so that of 120 12 ± 3.3 lie outside, of 60 6 ± 2.3."""
    inside, ratios = [], []
    for number in range(60 if known else 120):
        draw = np.random.default_rng(number)
        axes = (1, 2, 4, 6)[number % 4]
        trials = max((12, 16, 32)[number % 3], 2 * axes + 2)
        loss, noise = planted(draw, axes)
        x, y = crowding(loss, 4 * trials, axes, noise, draw)
        gap = gap_of(x[:trials], y[:trials], noise if known else None)
        realised = float(loss(x[np.argmin(y[:trials])]) - loss(x).min())
        inside.append(gap.low <= realised <= gap.high)
        ratios.append(gap.value / max(realised, noise / 10))
    assert 0.83 <= np.mean(inside) <= 0.985
    assert 0.5 < np.median(ratios) < 4


def test_more_trials_leave_a_smaller_gap_and_ask_for_fewer_further_ones():
    before, after = [], []
    for number in range(24):
        draw = np.random.default_rng(number)
        loss, noise = planted(draw, 3)
        x, y = crowding(loss, 64, 3, noise, draw)
        few, many = gap_of(x[:12], y[:12], noise), gap_of(x, y, noise)
        before.append((few.high / noise, few.more))
        after.append((many.high / noise, many.more))
    assert np.median([high for high, _ in after]) < 0.7 * np.median([high for high, _ in before])
    assert np.mean([more for _, more in after]) < np.mean([more for _, more in before])


def test_with_hardly_any_noise_the_gap_of_a_quadratic_is_known_within_a_tenth():
    draw = np.random.default_rng(0)
    x = draw.random((20, 2))
    loss = 2 + (x[:, 0] - 0.3) ** 2 + 0.5 * (x[:, 1] - 0.6) ** 2
    gap = gap_of(x, loss, 1e-4)
    assert gap.value == pytest.approx(loss.min() - 2, rel=0.1)
    assert 0.9 * (loss.min() - 2) < gap.high < 1.5 * (loss.min() - 2)
    assert not gap.enough
    assert gap.more > 0
    assert replace(gap, value=0.5e-4).enough


def test_an_estimate_is_the_same_every_time_and_a_diverged_trial_or_too_few_say_nothing():
    points = propose(SPACE, (), 12, 3)
    trials = [Trial(i, v, 2 + math.log(v["learning_rate"] / 0.02) ** 2) for i, v in enumerate(points)]
    assert remaining_gap(SPACE, trials, 0.01) == remaining_gap(SPACE, trials, 0.01)
    assert remaining_gap(SPACE, trials[:5], 0.01) is None
    diverged = [*trials, Trial(12, points[0], None), Trial(13, points[1], math.nan)]
    assert remaining_gap(SPACE, diverged, 0.01) == remaining_gap(SPACE, trials, 0.01)
    assert isinstance(remaining_gap(SPACE, trials * 20, 0.01), Gap)


def test_choices_have_a_coordinate_for_each_further_option():
    space = space_of({"learning_rate": [0.01, 1.0], "optimizer": ["adamw", "muon"], "qk_norm": [True, False]})
    rows = places(space, [{"learning_rate": 0.1, "optimizer": "muon", "qk_norm": True}])
    assert rows.tolist() == [[pytest.approx(0.5), 1.0, 0.0]]


def test_a_search_that_may_stop_ends_when_its_gap_is_under_the_noise_and_not_far_from_the_optimum():
    draw = np.random.default_rng(1)
    noise, wobble = 0.02, {}

    def evaluate(points):
        for number, _ in points:
            wobble.setdefault(number, noise * draw.standard_normal())
        return [true(values) + wobble[number] for number, values in points]

    def true(values):
        return 2 + 0.2 * math.log(values["learning_rate"] / 0.02) ** 2 + 0.05 * math.log(values["init_std"] / 0.1) ** 2

    def enough(space, done):
        gap = remaining_gap(space, done, noise)
        return "enough" if gap and gap.enough else ""

    found = search(SPACE, 200, 1, evaluate, enough=enough)
    assert found.stopped == "enough"
    assert 8 <= len(found.trials) < 100
    assert true(found.best.values) - 2 < 2 * noise
