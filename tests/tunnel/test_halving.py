"""The pruner judges trials after a decay, counts what that costs, and keeps the best of them in whatever order they come."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from windtunnel.tunnel.halving import Ladder, Rung, replay, rungs_of

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
    assert found["decay"]["replays"] == 500
    assert found["decay"]["median_share_of_tokens"] <= 0.30
    assert found["decay"]["median_loss"] == 0
    assert found["decay"]["best_not_kept"] < found["plateau"]["best_not_kept"]
