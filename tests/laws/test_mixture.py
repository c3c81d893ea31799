"""The law of mixtures: left-out errors as by refitting, planted worlds, limits, and the optimum within them."""

from __future__ import annotations

import numpy as np
import pytest

from windtunnel.base.errors import UserError
from windtunnel.laws.mixture import (
    MIXTURE_FORMS,
    best_mixture,
    choose_mixture_law,
    fit_mixture,
    into_limits,
    rank_correlation,
)
from windtunnel.tunnel.mixtures import as_mixture, draw_mixtures, share_limits, stratified

ROWS = {"a": 400, "b": 300, "c": 200, "d": 100}
FREE = dict.fromkeys(ROWS, 1.0)


def drawn(count: int = 24, limits: dict[str, float] | None = None) -> np.ndarray:
    mixtures = draw_mixtures(stratified(ROWS, limits or FREE), limits or FREE, count, 1)
    return np.array([[mix[name] for name in ROWS] for mix in mixtures])


def linear_world(shares: np.ndarray) -> np.ndarray:
    return np.exp(shares @ np.array([0.1, 0.3, 0.2, 0.4]))


def bowl_world(shares: np.ndarray) -> np.ndarray:
    """Lowest at (.4, .3, .2, .1)."""
    return np.exp(0.2 + ((shares - np.array([0.4, 0.3, 0.2, 0.1])) ** 2).sum(-1))


@pytest.mark.parametrize("form", MIXTURE_FORMS)
def test_left_out_losses_are_those_of_fits_without_them(form):
    shares = drawn(12)
    losses = bowl_world(shares) * (1 + np.random.default_rng(2).normal(0, 0.01, len(shares)))
    law = fit_mixture(form, shares.tolist(), losses.tolist())
    for i in range(len(losses)):
        kept = [j for j in range(len(losses)) if j != i]
        others = [fit_mixture(form, shares[kept].tolist(), losses[kept].tolist())]
        if (others[0].strength, others[0].length) == (
            law.strength,
            law.length,
        ):  # the same constants, or it is another law
            # What stays of the difference is that each fit is centred on the mean of its own losses.
            assert law.left_out[i] == pytest.approx(float(others[0].predict(shares[i])[0]), rel=2e-4)


def test_a_linear_world_is_told_from_one_with_a_bowl_and_from_noise():
    shares, draw = drawn(30), np.random.default_rng(3)
    for world, form in ((linear_world, "linear"), (bowl_world, "quadratic")):
        losses = world(shares) * (1 + draw.normal(0, 1e-3, len(shares)))
        laws = [fit_mixture(f, shares.tolist(), losses.tolist()) for f in MIXTURE_FORMS]
        chosen = choose_mixture_law(laws)
        assert chosen.form == form or (form == "quadratic" and chosen.form == "smooth")
        assert chosen.error < 3e-3
        assert (rank_correlation(chosen.left_out, losses.tolist()) or 0) > 0.95
    noise = 1.2 * (1 + draw.normal(0, 1e-2, len(shares)))
    laws = [fit_mixture(f, shares.tolist(), noise.tolist()) for f in MIXTURE_FORMS]
    assert choose_mixture_law(laws).error >= 0.95 * laws[0].error


def test_the_optimum_of_a_bowl_lies_inside_and_that_of_a_plane_at_the_limits():
    shares = drawn(40)
    law = fit_mixture("quadratic", shares.tolist(), bowl_world(shares).tolist())
    found = best_mixture(law, np.ones(4), [shares[0], shares[1]])
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)
    assert found.sum() == pytest.approx(1)
    plane = fit_mixture("linear", shares.tolist(), linear_world(shares).tolist())
    limits = np.array([0.5, 1.0, 0.3, 1.0])
    assert best_mixture(plane, limits, [shares[0]]) == pytest.approx([0.5, 0.2, 0.3, 0.0], abs=2e-3)


def test_draws_keep_the_limits_begin_with_the_stratified_mixture_and_are_the_same_each_time():
    rows, before = {"a": 1000, "b": 50, "c": 300}, {"b": 20}
    limits = share_limits(rows, before, 500, ("a", "b", "c"), 2.0)
    assert limits == {"a": 1.0, "b": pytest.approx((2 * 50 - 20) / 500), "c": 1.0}
    equal = stratified(rows, limits)
    assert equal == pytest.approx({"a": 1000 / 1350, "b": 50 / 1350, "c": 300 / 1350}, abs=1e-3)
    mixtures = draw_mixtures(equal, limits, 50, 7)
    assert mixtures[0] == equal
    assert mixtures == draw_mixtures(equal, limits, 50, 7)
    assert len({tuple(mix.values()) for mix in mixtures}) == 50
    for mix in mixtures:
        assert sum(mix.values()) == pytest.approx(1, abs=1e-9)
        assert all(share <= limits[name] + 1e-3 for name, share in mix.items())
    assert max(mix["c"] for mix in mixtures) > 0.5
    assert as_mixture({"a": 0.5, "b": 0.0, "c": 0.5}) == (("a", 0.5), ("c", 0.5))


def test_what_lies_above_a_limit_goes_where_there_is_room():
    held = into_limits(np.array([0.8, 0.1, 0.1]), np.array([0.5, 0.2, 1.0]))
    assert held.sum() == pytest.approx(1)
    assert held == pytest.approx([0.5, 0.1 + 0.3 * 0.1 / 1.0, 0.1 + 0.3 * 0.9 / 1.0])


def test_too_few_runs_losses_that_are_none_and_too_little_text_are_one_line_each():
    shares = drawn(8)
    with pytest.raises(UserError, match="expected 6 mixtures or more of 4 corpora, got 5"):
        fit_mixture("linear", shares[:5].tolist(), [1.0] * 5)
    with pytest.raises(UserError, match="expected positive losses"):
        fit_mixture("linear", shares.tolist(), [1.0] * 7 + [float("nan")])
    with pytest.raises(
        UserError, match="--cap: expected corpora that fill the stage at 4 times each, got text for 80% of it"
    ):
        share_limits({"a": 10, "b": 10}, {}, 100, ("a", "b"), 4.0)
    assert rank_correlation([1, 2], [1, 2]) is None
