"""Schedules are pure functions of the step and give the numbers of the paper and of its released code."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windtunnel.train.schedule import FORMS, Schedule, decay

PAPER = Schedule(warmup=2000, stable_end=261_000, decay_steps=18_500, floor=0.0, half_life=5000)
"""The released 2.4B model: stable up to 261,000, exponential with a half-life of 5,000 steps (arXiv 2404.06395, 6.2)."""


def test_the_released_models_rate_falls_from_001_to_77e_4_in_18500_steps_and_passes_ten_percent_at_16610():
    assert 0.01 * PAPER.factor(261_000) == 0.01
    assert 0.01 * PAPER.factor(279_500) == pytest.approx(7.7e-4, rel=2e-3)
    assert PAPER.factor(261_000 + 5000) == pytest.approx(0.5, rel=1e-12)
    assert PAPER.factor(261_000 + 10_000) == pytest.approx(0.25, rel=1e-12)
    assert PAPER.factor(261_000 + 16_609) > 0.1 > PAPER.factor(261_000 + 16_610)


def test_a_linear_decay_goes_to_ten_percent_and_stays_there_as_in_the_released_code():
    schedule = Schedule(warmup=10, stable_end=900, decay_steps=100, form="linear", floor=0.1)
    for step in range(900, 1001):
        assert schedule.factor(step) == pytest.approx(0.1 + 0.9 * (1000 - step) / 100, rel=1e-12)
    assert schedule.factor(1001) == schedule.factor(5000) == pytest.approx(0.1)


def test_the_cosine_schedule_is_the_released_half_cosine_with_its_floor():
    schedule = Schedule(warmup=100, stable_end=100, decay_steps=900, floor=0.1, kind="cosine")
    for step in (100, 325, 550, 775, 1000):
        p = (step - 100) / 900
        assert schedule.factor(step) == pytest.approx(0.1 + 0.9 / 2 * (1 + math.cos(math.pi * p)), rel=1e-12)
    assert schedule.factor(100) == 1.0
    assert schedule.factor(550) == pytest.approx(0.55)
    assert schedule.factor(1000) == schedule.factor(2000) == pytest.approx(0.1)


def test_a_looping_cosine_is_periodic_and_equals_the_plain_one_up_to_its_period():
    plain, loop = (Schedule(warmup=100, decay_steps=1000, floor=0.1, kind=kind) for kind in ("cosine", "cosine-loop"))
    for step in (50, 100, 400, 1000):
        assert loop.factor(step) == plain.factor(step)
    assert loop.factor(1450) == pytest.approx(loop.factor(550), rel=1e-12)
    assert loop.factor(1900) == pytest.approx(1.0)
    assert loop.factor(2800) == pytest.approx(0.1)


def test_one_minus_sqrt_and_the_cosine_decay_at_hand_computed_points():
    assert decay("1-sqrt", 0.25, 0.0) == pytest.approx(0.5)
    assert decay("1-sqrt", 0.25, 0.1) == pytest.approx(0.55)
    assert decay("cosine", 0.5, 0.0) == pytest.approx(0.5)
    assert decay("cosine", 0.25, 0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert decay("exponential", 0.5, 0.01) == pytest.approx(0.1)


def test_warmup_is_linear_and_ends_at_one():
    schedule = Schedule(warmup=8)
    assert [schedule.factor(step) for step in range(1, 10)] == [
        1 / 8,
        2 / 8,
        3 / 8,
        4 / 8,
        5 / 8,
        6 / 8,
        7 / 8,
        1.0,
        1.0,
    ]
    assert Schedule(warmup=0).factor(1) == 1.0


SCHEDULES = st.builds(
    Schedule, warmup=st.integers(0, 20), stable_end=st.integers(20, 60), decay_steps=st.integers(1, 50),
    form=st.sampled_from(FORMS), floor=st.floats(0, 0.9), half_life=st.none() | st.floats(0.5, 100),
    kind=st.sampled_from(["wsd", "cosine"]),
)  # fmt: skip


@given(SCHEDULES)
def test_a_rate_rises_to_one_and_then_never_rises_again_nor_leaves_its_bounds(schedule):
    factors = [schedule.factor(step) for step in range(1, 150)]
    top = max(1, schedule.warmup)
    assert all(a <= b for a, b in zip(factors[: top - 1], factors[1:top], strict=True))
    assert factors[top - 1] == 1.0 or (schedule.kind == "cosine" and schedule.warmup == 0)
    assert all(a >= b - 1e-12 for a, b in zip(factors[top - 1 :], factors[top:], strict=False))
    assert all(0 <= value <= 1 for value in factors)
    assert all(value >= schedule.floor - 1e-12 for value in factors[top:])


@given(SCHEDULES, st.integers(1, 150))
def test_a_rate_depends_on_the_step_alone(schedule, step):
    forward = [schedule.factor(s) for s in range(1, 151)]
    backward = [schedule.factor(s) for s in range(150, 0, -1)][::-1]
    assert forward == backward
    assert Schedule(**schedule.to_dict()).factor(step) == forward[step - 1]


@given(SCHEDULES)
def test_a_decay_ends_at_its_floor_unless_a_half_life_leads_elsewhere(schedule):
    end = schedule.stable_end + schedule.decay_steps
    if schedule.half_life is None or schedule.kind == "cosine":
        assert schedule.factor(end) == pytest.approx(schedule.floor, abs=1e-12)
    else:
        assert schedule.factor(end) == pytest.approx(
            max(schedule.floor, 0.5 ** (schedule.decay_steps / schedule.half_life))
        )


@given(SCHEDULES, st.integers(1, 20))
def test_a_trunk_and_the_branch_from_it_have_the_same_rates_up_to_the_branch_point(schedule, step):
    trunk = Schedule(warmup=schedule.warmup)
    if schedule.kind == "wsd":
        assert trunk.factor(step) == schedule.factor(step)
