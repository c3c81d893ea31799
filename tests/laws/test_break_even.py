"""Where a lead turns: planted crossings are found inside and beyond what was measured, and nothing is said where noise hides it."""

from __future__ import annotations

import math
import random

import pytest

from windtunnel.laws.break_even import REACH, break_even
from windtunnel.laws.fit import LawError

LENGTHS = (1e6, 2e6, 4e6)


def planted(crossing: float, slope: float, noise: float = 0.0, seeds: int = 3) -> list[list[float]]:
    """Leads that are a line over the logarithm of the length, with noise of their own for each seed and length."""
    draw = random.Random(int(crossing) + seeds)
    return [[slope * math.log(x / crossing) + noise * draw.gauss(0, 1) for x in LENGTHS] for _ in range(seeds)]


@pytest.mark.parametrize("crossing", [1.2e6, 3e6, 4e6, 9e6, 35e6])
@pytest.mark.parametrize("slope", [0.5, -0.5])
def test_a_planted_crossing_is_found_with_its_side_and_its_reach(crossing, slope):
    found = break_even(LENGTHS, planted(crossing, slope))
    assert found.outcome == ("overtakes" if slope > 0 else "is overtaken")
    assert found.at == pytest.approx(crossing, rel=1e-6)
    assert found.reach == pytest.approx(crossing / 4e6)
    noisy = break_even(LENGTHS, planted(crossing, slope, 0.01))
    assert noisy.at is not None
    assert (noisy.low or 0) < noisy.at < (noisy.high or math.inf)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw, held = random.Random(0), 0
    for _ in range(400):
        leads = [[0.5 * math.log(x / 6e6) + 0.1 * draw.gauss(0, 1) for x in LENGTHS] for _ in range(4)]
        found = break_even(LENGTHS, leads)
        low, high = found.low or 0.0, found.high or math.inf
        held += found.outcome not in ("ahead", "behind") and low <= 6e6 <= high
    assert 0.85 < held / 400 < 0.97


@pytest.mark.parametrize(("lead", "outcome"), [(0.7, "ahead"), (-0.7, "behind")])
def test_without_a_crossing_within_reach_one_side_leads_throughout(lead, outcome):
    steady = break_even(LENGTHS, [[lead + 0.01 * seed, lead, lead - 0.01 * seed] for seed in range(3)])
    assert (steady.outcome, steady.at, steady.reach) == (outcome, None, None)
    beyond = break_even(LENGTHS, planted(4e6 * REACH * 1.1, 0.5, 0.001))
    assert beyond.outcome == "behind"


def test_noise_that_hides_the_lead_and_a_single_seed_tell_nothing():
    assert break_even(LENGTHS, planted(3e6, 0.01, 1.0)).outcome == "cannot tell"
    alone = break_even(LENGTHS, planted(3e6, 0.5, seeds=1))
    assert (alone.outcome, alone.low, alone.high) == ("cannot tell", None, None)
    assert alone.at == pytest.approx(3e6)


def test_a_lead_that_is_not_finite_is_refused():
    with pytest.raises(LawError, match="expected finite leads at two lengths or more, got 3 lengths"):
        break_even(LENGTHS, [[1.0, math.nan, 1.0]])
