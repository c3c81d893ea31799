"""Decisions between two recipes: how often equal arms are told apart, how often planted differences are found, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from windtunnel.laws.decision import (
    SeedNoise,
    Thresholds,
    decide,
    detectable,
    follow,
    noise_at,
    registry,
    runs_needed,
)
from windtunnel.laws.fit import LawError

SD = 0.003


def play(effect: float, worlds: int, *, known: float, shared: float = 0.5, looks: int = 3, seed: int = 0) -> list[str]:
    """Final outcomes of decisions that follow the advice for more runs: A better by ``effect``; arms of a seed correlated."""
    rng, thresholds, said = np.random.default_rng(seed), Thresholds(0.005), []
    for _ in range(worlds):
        noise = SeedNoise(SD * math.sqrt(rng.chisquare(known) / known), known) if known else None
        pairs: list[tuple[float, float]] = []
        for _ in range(24):
            common = math.sqrt(shared) * rng.normal()
            own = math.sqrt(1 - shared) * rng.normal(size=2)
            pairs.append((2.0 * math.exp(SD * (common + own[0])), 2.0 * math.exp(effect + SD * (common + own[1]))))
        said.append(follow(pairs, thresholds, noise=noise, looks=looks).outcome)
    return said


@pytest.mark.parametrize(("known", "shared"), [(0.0, 0.0), (6.0, 0.0), (6.0, 0.5), (0.0, 0.8)])
def test_equal_arms_are_told_apart_no_more_often_than_agreed(known: float, shared: float) -> None:
    """At a nominal 5 % over all looks: the binomial interval of the share must reach down to it, and 10 of 100 are too many."""
    said = play(0.0, 1000, known=known, shared=shared, seed=7)
    picks = sum(outcome in ("A", "B") for outcome in said)
    low = stats.binomtest(picks, 1000).proportion_ci(0.95).low
    assert low <= 0.05
    assert max(sum(o in ("A", "B") for o in said[i : i + 100]) for i in range(0, 1000, 100)) <= 10
    assert said.count("too close") > 500, "and most of them are seen to be equal"


def test_planted_differences_are_found_the_more_often_the_larger_they_are() -> None:
    curve = {
        effect: play(effect, 200, known=6.0, seed=3).count("A") / 200 for effect in (0.0, 0.0025, 0.005, 0.01, 0.02)
    }
    shares = list(curve.values())
    assert shares == sorted(shares)
    assert curve[0.005] > 0.5
    assert curve[0.01] > 0.95
    assert curve[0.02] == 1.0
    assert play(0.01, 200, known=6.0, seed=3).count("B") == 0
    assert play(-0.02, 50, known=6.0, seed=4) == ["B"] * 50


def test_looks_go_on_with_as_many_pairs_as_were_asked_for_and_end_with_an_answer_or_the_pairs() -> None:
    pairs = [(2.0 + 0.004 * (i % 2), 2.006 + 0.004 * (i % 3)) for i in range(40)]
    first = follow(pairs[:3], Thresholds(0.002))
    assert (first.outcome, first.look, first.pairs) == ("more", 1, 3)
    second = follow(pairs, Thresholds(0.002), looks=2)
    assert (second.look, second.pairs) == (2, 3 + first.more)
    assert follow(pairs, Thresholds(0.002)).outcome == "A"
    with pytest.raises(LawError, match=r"decision.looks: expected one or more"):
        follow(pairs, Thresholds(0.002), looks=0)


def test_the_first_look_is_the_paired_t_test_at_half_the_level() -> None:
    rng = np.random.default_rng(1)
    a, b = (dict(enumerate(2 * np.exp(SD * rng.normal(size=6)))) for _ in range(2))
    found = decide(a, b, Thresholds(alpha=0.05))
    test = stats.ttest_rel(np.log(list(b.values())), np.log(list(a.values())))
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.975)))
    assert (found.outcome in ("A", "B")) == (test.pvalue < 0.025)
    assert sum(Thresholds().spent(k) for k in range(1, 60)) <= 0.05


def test_detectable_differences_are_found_with_the_stated_power() -> None:
    known = 6.0
    sd = math.sqrt(2) * SD
    effect = detectable(sd, 6, Thresholds(), known=known)
    rng, hits = np.random.default_rng(5), 0
    for _ in range(1000):
        noise = SeedNoise(SD * math.sqrt(rng.chisquare(known) / known), known)
        a, b = (dict(enumerate(np.exp(SD * rng.normal(size=6) + shift))) for shift in (0.0, effect))
        hits += decide(a, b, Thresholds(), noise=noise).outcome == "A"
    assert hits / 1000 == pytest.approx(0.8, abs=0.06)


def test_more_runs_are_asked_for_until_the_interval_is_narrow_enough() -> None:
    a, b = {0: 2.0, 1: 2.01, 2: 1.99}, {0: 2.004, 1: 2.004, 2: 2.0}
    found = decide(a, b, Thresholds(0.002))
    assert found.outcome == "more"
    assert found.pairs + found.more == runs_needed(found.sd, max(0.001, abs(found.mean)), 0.05 / 4)
    alone = decide({0: 2.0}, {0: 2.1}, Thresholds())
    assert (alone.outcome, alone.more) == ("more", 2)
    assert math.isinf(alone.half_width)


def test_the_registry_pools_groups_of_one_size_and_lends_to_near_ones() -> None:
    rng = np.random.default_rng(0)
    groups = [list(level * np.exp(SD * rng.normal(size=4))) for level in (2.0, 3.0, 2.5, 2.2, 4.0, 2.1)]
    known = registry({1e5: groups, 1e6: [[2.0]]})
    assert set(known) == {1e5}
    assert known[1e5].sd == pytest.approx(SD, rel=0.4)
    assert known[1e5].freedom == 18
    lent = noise_at(known, 3e5)
    assert lent is not None
    assert (lent.sd, lent.freedom) == (known[1e5].sd, 9)
    assert noise_at(known, 1e6) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decide({1: 2.0}, {2: 2.0}, Thresholds()), "seeds that both arms have run"),
        (lambda: decide({1: 2.0}, {1: math.nan}, Thresholds()), "a diverged run lost"),
        (lambda: decide({1: 2.0}, {1: 2.0}, Thresholds(), look=0), "expected a look from 1 on"),
        (lambda: Thresholds(least=0.0), "expected a share above 0"),
        (lambda: Thresholds(alpha=0.7), "below .5"),
    ],
)
def test_arms_that_cannot_be_compared_are_one_line(call, words: str) -> None:
    with pytest.raises(LawError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
