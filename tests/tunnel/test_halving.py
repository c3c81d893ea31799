"""The pruner judges trials after a decay, counts what that costs, and keeps the best of them in whatever order they come."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from windtunnel.tunnel.halving import Ladder, replay, rungs_of
from windtunnel.tunnel.promotion import ByForecast, ByRank, Rung, places_of, rate_column
from windtunnel.tunnel.space import Axis, Choice

RUNGS = rungs_of(1600, 0.2, 32)


def bench():
    path = Path(__file__).parents[2] / "bench" / "pruning.py"
    spec = importlib.util.spec_from_file_location("pruning", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rungs_are_whole_small_trials_and_the_last_is_the_trial_itself():
    assert (Rung(80, 20), Rung(320, 80), Rung(1280, 320)) == RUNGS
    assert rungs_of(10, 0.2, 1) == (Rung(2, 2), Rung(8, 2))  # too short for three different ones
    for steps in (10, 37, 400):
        for warmup in (1, steps // 3):
            rungs = rungs_of(steps, 0.2, warmup)
            assert rungs[-1].trunk + rungs[-1].decay == steps
            assert all(a.trunk < b.trunk for a, b in zip(rungs, rungs[1:], strict=False))
            assert all(rung.trunk > warmup for rung in rungs)


def test_the_tokens_of_a_ladder_are_trunks_once_and_every_decay():
    table = [[float(i)] * 3 for i in range(64)]
    found = replay(table, range(64), RUNGS, per_round=64)
    assert found.kept == 0
    assert found.finished == 4
    trunks, decays = 64 * 80 + 16 * 240 + 4 * 960, 64 * 20 + 16 * 80 + 4 * 320
    assert found.share == (trunks + decays) / (64 * 1600)
    bare = replay(table, range(64), RUNGS, per_round=64, plateau=table)
    assert bare.share == (trunks + 4 * 320) / (64 * 1600)


def test_a_trial_that_was_passed_over_early_goes_on_once_it_belongs_to_the_best():
    ladder = Ladder(RUNGS)
    losses = {0: 1.0, 1: 2.0, **{number: 10.0 + number for number in range(2, 12)}}

    def judge(rung, numbers):
        return {number: losses[number] for number in numbers}

    ladder.climb([0, 1, 2, 3], judge)
    assert sorted(ladder.judged[1]) == [0]
    ladder.climb([4, 5, 6, 7], judge)
    assert sorted(ladder.judged[1]) == [0, 1]
    assert ladder.finished(0) == 1.0
    assert ladder.finished(1) is None
    assert ladder.guess(1) == 2.0


def test_a_diverged_trial_never_goes_on_and_a_given_up_one_is_guessed_by_what_the_others_gained():
    ladder = Ladder(RUNGS)

    def judge(rung, numbers):
        return {number: None if number == 0 else 2.0 + 0.1 * number - 0.5 * rung for number in numbers}

    ladder.climb(range(8), judge)
    assert 0 not in ladder.judged[1]
    assert ladder.guess(0) is None
    assert ladder.finished(1) == pytest.approx(1.1)
    assert ladder.guess(7) == pytest.approx(2.7 - 1.0)
    empty = Ladder(RUNGS)
    empty.climb(range(4), lambda rung, numbers: dict.fromkeys(numbers))
    assert [len(judged) for judged in empty.judged] == [4, 0, 0]


def test_a_ladder_does_not_forget_a_best_that_every_rung_agrees_on():
    draw = random.Random(0)
    for _ in range(100):
        table = [[value := draw.random(), value, value] for _ in range(64)]
        order = draw.sample(range(64), 64)
        found = replay(table, order, RUNGS)
        assert found.kept == min(range(64), key=lambda i: table[i][0])
        assert found.share < 0.36


def test_of_64_planted_trials_the_best_is_kept_with_less_than_a_third_of_the_tokens_where_the_plateau_misleads():
    """Medians over 5 tables in 100 resampled orders each; the docstring of the bench says what is planted."""
    found = bench().measure(tables=5, orders=100)
    for name in ("decay", "forecast"):
        assert found[name]["replays"] == 500
        assert found[name]["median_share_of_tokens"] <= 0.30
        assert found[name]["median_loss"] == 0
        assert found[name]["best_not_kept"] < found["plateau"]["best_not_kept"]


def drifting(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses, shape (64, 3), of trials whose best learning rate falls as they grow longer, and their places, shape (64, 2)."""
    draw = np.random.default_rng(seed)
    place = draw.uniform(-1, 1, (64, 2))
    best = np.array([0.6, 0.2, -0.3])
    noise = draw.normal(0, 0.003, (64, 1)) + draw.normal(0, 0.001, (64, 3))
    return np.array([2.0, 1.7, 1.5]) + 0.2 * (place[:, :1] - best) ** 2 + 0.05 * place[:, 1:] ** 2 + noise, place


def test_where_the_best_rate_drifts_with_the_length_forecasts_keep_the_best_and_ranks_lose_it():
    lost = {"ranks": [], "forecasts": []}
    for seed in range(5):
        losses, place = drifting(seed)
        rule = ByForecast(RUNGS, lambda numbers, place=place: place[list(numbers)], rate=0)
        draw = random.Random(seed)
        for _ in range(20):
            order = draw.sample(range(64), 64)
            for name, found in (
                ("ranks", replay(losses, order, RUNGS)),
                ("forecasts", replay(losses, order, RUNGS, rule=rule)),
            ):
                assert found.share <= 0.30
                lost[name].append(losses[found.kept, 2] / losses[:, 2].min() - 1)
    assert np.mean(np.array(lost["forecasts"]) > 0) < 0.3
    assert np.mean(np.array(lost["ranks"]) > 0) > 0.7
    assert np.mean(lost["forecasts"]) < np.mean(lost["ranks"]) / 10


@pytest.mark.parametrize("seen", [4, 8, 16, 24, 64, 640])
@pytest.mark.parametrize("steps", [100, 469, 10_000])
def test_forecasts_spend_no_more_than_their_budget(seen, steps):
    rungs = rungs_of(steps, 0.2, steps // 50)
    rule = ByForecast(rungs, lambda numbers: np.zeros((len(numbers), 1)))
    ladder = Ladder(rungs, rule)
    quota = [rule.quota(seen, rung) for rung in range(len(rungs))]
    assert quota == sorted(quota, reverse=True)
    assert quota[-1] >= 1
    for first in range(0, seen, 4):
        ladder.climb(range(first, first + 4), lambda rung, numbers: {n: 2.0 + 0.01 * n - 0.1 * rung for n in numbers})
    whole = rungs[-1].trunk + rungs[-1].decay
    assert ladder.steps_spent() <= max(0.3 * seen, 2.5) * whole  # the first two rounds take one trial to its end


def test_a_forecast_is_made_of_what_others_gained_and_never_of_a_diverged_trial():
    rule = ByForecast(RUNGS, lambda numbers: np.array([[n / 32 - 1] for n in numbers]), rate=0)
    ladder = Ladder(RUNGS, rule)

    def judge(rung, numbers):
        return {number: None if number == 5 else 2.0 + 0.01 * number - 0.3 * rung for number in numbers}

    for first in range(0, 64, 4):
        ladder.climb(range(first, first + 4), judge)
    assert 5 not in ladder.judged[1]
    assert ladder.guess(5) is None
    given_up = next(n for n in range(63, 0, -1) if ladder.finished(n) is None)
    assert ladder.guess(given_up) == pytest.approx(2.0 + 0.01 * given_up - 0.6, abs=0.05)
    empty = Ladder(RUNGS, rule)
    empty.climb(range(4), lambda rung, numbers: dict.fromkeys(numbers))
    assert [len(judged) for judged in empty.judged] == [4, 0, 0]


def test_places_follow_the_values_and_the_rate_is_found_behind_choices():
    space = (Choice("optimizer", ("adamw", "muon")), Axis("learning_rate", 0.01, 0.04))
    values = {3: {"optimizer": "muon", "learning_rate": 0.02}}
    place = places_of(space, values)
    assert place([3]).tolist() == [[1.0, pytest.approx(0.0)]]
    values[4] = {"optimizer": "adamw", "learning_rate": 0.04}
    assert place([4]).tolist() == [[-1.0, pytest.approx(1.0)]]
    assert rate_column(space) == 1
    assert rate_column(space[:1]) is None


def test_a_smaller_share_of_ranks_promotes_fewer():
    table = [[float(i)] * 3 for i in range(64)]
    half, quarter = (replay(table, range(64), RUNGS, per_round=64, rule=ByRank(eta)).finished for eta in (2, 4))
    assert (half, quarter) == (16, 4)
