"""Curve laws: the formulas against brute force and published figures, the fit against planted laws and unseen schedules."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from windtunnel.laws.curve import CONSTANTS, KERNELS, Scale, Timeline, constants_of, model_for, theta_of
from windtunnel.laws.curve_fit import AVERAGED, CurveModel, decay_difference, fit_curves
from windtunnel.laws.curve_law import PUBLISHED, Curve, CurveLaw
from windtunnel.laws.fit import LawError

LOGS = Path(__file__).parents[1] / "data" / "public-logs" / "multi-power-law"
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
UNSEEN = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
PLANTED = {
    "integral": {"L0": 2.0, "A": 0.5, "alpha": 0.5},
    "exponential": {"L0": 2.0, "A": 0.5, "alpha": 0.5, "B": 30.0, "tau": 60.0},
    "power": {"L0": 2.0, "A": 0.5, "alpha": 0.5, "B": 40.0, "tau": 20.0, "beta": 0.4},
    "multipower": {"L0": 2.0, "A": 0.5, "alpha": 0.5, "B": 40.0, "C": 2.0, "beta": 0.5, "gamma": 0.6},
    "functional": {"L0": 2.0, "A": 0.5, "alpha": 0.5, "B": 40.0, "C": 30.0, "beta": 0.5},
}


def wsd(total: int, start: int, *, warmup: int = 50, peak: float = 5e-3, floor: float = 0.1) -> np.ndarray:
    """Learning rates: linear warmup, constant, linear decay from ``start`` to ``floor``."""
    step = np.arange(1, total + 1)
    down = 1 - (1 - floor) * np.clip((step - start) / max(1, total - start), 0, 1)
    return peak * np.minimum(step / warmup, 1) * down


def brute(law: CurveLaw, rates: np.ndarray, t: int) -> float:
    """The formula of ``curve`` after t updates, one change at a time."""
    c, s = law.constants, float(rates[:t].sum())
    loss, before = 0.0, 0.0
    for k, rate in enumerate(rates[:t]):
        n, area = t - k, float(rates[k:t].sum())
        if law.kernel == "exponential":
            grown = 1 - math.exp(-n / c["tau"])
        elif law.kernel == "power":
            grown = 1 - (1 + n / c["tau"]) ** -c["beta"]
        elif law.kernel == "integral":
            grown = 0.0
        else:
            grown = 1 - (1 + c["C"] * rate ** -c.get("gamma", 0.0) * area) ** -c["beta"]
        loss += c.get("B", 0.0) * s**-law.fade * (rate - before) * grown
        before = rate
    return c["L0"] + c["A"] * s ** -c["alpha"] + loss


@pytest.mark.parametrize("fade", [0.0, 0.1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_agree_with_the_formula_term_by_term(kernel: str, fade: float) -> None:
    law, rates = CurveLaw(kernel, PLANTED[kernel], fade), wsd(400, 250)
    at = np.array([60, 200, 251, 300, 400])
    truth = np.array([brute(law, rates, int(t)) for t in at])
    assert law.losses(rates, at, exact=True) == pytest.approx(truth, rel=1e-9)
    assert law.losses(rates, at) == pytest.approx(truth, abs=1e-4)
    close = law.losses(rates, np.arange(10, 401, 2))
    assert close == pytest.approx([brute(law, rates, int(t)) for t in np.arange(10, 401, 2)], abs=3e-4)


def test_the_exponential_kernel_is_the_recursion_of_the_annealing_law() -> None:
    law, rates, memory = CurveLaw("exponential", PLANTED["exponential"]), wsd(300, 200), math.exp(-1 / 60)
    c, area, momentum, previous, total = law.constants, 0.0, 0.0, 0.0, 0.0
    expected = []
    for rate in rates:
        area += rate
        momentum = memory * momentum + (previous - rate)
        total, previous = total + momentum, rate
        expected.append(c["L0"] + c["A"] * area ** -c["alpha"] - c["B"] * (1 - memory) * total)
    assert law.losses(rates, np.arange(1, 301), exact=True) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pace", [30.0, 3.0, 0.3])
def test_the_functional_law_is_the_convolution_of_the_squared_rate_with_its_kernel(pace: float) -> None:
    """Noise of a functional scaling law (arXiv 2509.19189): sum of eta_k^2 K(S_t - S_k), K = G', summed directly.

    K falls, so the sums that take each update's noise at its beginning and at its end hold the law between them; their
    distance is the error of the discretisation, which goes with C eta.
    """
    law, rates = CurveLaw("functional", {**PLANTED["functional"], "C": pace}), wsd(400, 250)
    c, ends = law.constants, np.cumsum(rates)
    at = np.array([60, 200, 251, 300, 350, 400])
    noise = law.losses(rates, at, exact=True) - c["L0"] - c["A"] * ends[at - 1] ** -c["alpha"]

    def convolved(where: float) -> np.ndarray:  # 0: the integral before the update, 1: after it
        since = [ends[t - 1] - (ends[:t] - (1 - where) * rates[:t]) for t in at]
        kernels = (c["beta"] * c["C"] * (1 + c["C"] * s) ** (-c["beta"] - 1) for s in since)
        return c["B"] * np.array([(rates[:t] ** 2 * k).sum() for t, k in zip(at, kernels, strict=True)])

    early, middle, late = (convolved(where) for where in (0.0, 0.5, 1.0))
    assert (early < noise).all()
    assert (noise < late).all()
    assert ((late - early) / noise < 1.5 * pace * rates.max()).all()
    assert middle == pytest.approx(noise, rel=(pace * rates.max()) ** 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_derivatives_agree_with_finite_differences(kernel: str) -> None:
    rates, at, scale = wsd(300, 200), np.arange(20, 301, 20), Scale(5e-3, 1.2, 300)
    model = model_for(kernel, [Timeline.of(rates, at), Timeline.of(rates[:250], at[:10])], scale, fade=0.1)
    theta = theta_of(kernel, PLANTED[kernel], scale, fade=0.1)
    _, slopes = model(theta[None])
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-6
        numeric = (model((theta + step)[None])[0][0] - model((theta - step)[None])[0][0]) / 2e-6
        assert slopes[0, :, i] == pytest.approx(numeric, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_constants_and_parameters_are_one_to_one(kernel: str) -> None:
    scale = Scale(5e-3, 1.2, 300)
    back = constants_of(kernel, theta_of(kernel, PLANTED[kernel], scale, fade=0.1), scale, fade=0.1)
    assert back == pytest.approx(PLANTED[kernel], rel=1e-9)
    law = CurveLaw(kernel, PLANTED[kernel], 0.1, intervals={"L0": (1.9, 2.1)})
    assert CurveLaw.from_dict(json.loads(json.dumps(law.to_dict()))) == law
    with pytest.raises(LawError, match="expected a curve law"):
        CurveLaw.from_dict({**law.to_dict(), "colour": 1})


def test_parameters_that_ran_away_in_a_fit_still_make_a_law() -> None:
    scale, rates = Scale(0.03, 7.0, 300), wsd(300, 200, peak=0.03)
    theta = np.array([0.5, -1.0, 9.0, -50.0, 60.0, 9.0, -400.0])
    law = CurveLaw("multipower", constants_of("multipower", theta, scale))
    assert law.constants["gamma"] == -4
    assert np.isfinite(law.final(rates))


# -- published curves ------------------------------------------------------------------------------------------------------


def public_rates(name: str) -> np.ndarray:
    """The learning rate of every update of a published run (README of the tables)."""
    warmup, peak, end = 2160, 3e-4, 3e-5
    total = int(name.split("_")[-1]) if name[:2] != "ws" else 16000 if "con" in name else 24000
    step = np.arange(1, total)
    rates = np.full(len(step), peak)
    if name.startswith("cosine"):
        rates = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
    elif name.startswith("wsdcon"):
        rates[step >= 8000] = int(name.split("_")[1]) * 1e-5
    elif name.startswith("wsdld"):
        rates = peak + (end - peak) * np.clip((step - 20000) / 4000, 0, 1)
    elif name.startswith("wsd"):
        rates = peak * (end / peak) ** np.clip((step - 20000) / 4000, 0, 1)
    return np.where(step < warmup, peak * step / (warmup - 1), rates)


def public_curve(size: str, name: str) -> Curve:
    with (LOGS / size / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = np.array([int(row["step"]) for row in rows])
    rates = public_rates(name)
    shown = np.array([float(row["lr"]) for row in rows])
    at = steps + 1 if name.startswith("wsdcon") else steps  # these tables show the step from 8,000 one row early
    assert np.abs(rates[np.minimum(at, len(rates)) - 1] - shown).max() < 1e-9 or name.startswith("wsdcon")
    return Curve(name, rates, steps, np.array([float(row["loss"]) for row in rows]))


SECONDS: dict[str, float] = {}
"""How long each of the public fits took here."""


@cache
def public_model(size: str) -> CurveModel:
    begun = time.perf_counter()
    found = fit_curves([public_curve(size, name) for name in FITTED])
    SECONDS[size] = time.perf_counter() - begun
    return found


def test_the_fit_to_three_public_curves_ends_with_a_law_of_every_kernel_and_says_how_long_it_took(capsys) -> None:
    model = public_model("25M")
    assert [fit.law.kernel for fit in model.fits] == list(AVERAGED)
    assert sum(model.weights) == pytest.approx(1.0)
    for fit in model.fits:
        assert all(math.isfinite(value) for value in fit.law.constants.values())
        assert fit.law.residual < 0.01
    with capsys.disabled():
        points = sum(len(public_curve("25M", name).steps) for name in FITTED)
        print(f"\nfit_curves on {', '.join(FITTED)} of 25M ({points} points): {SECONDS['25M']:.1f} s")


@pytest.mark.parametrize(("size", "error"), [("25M", 0.00376), ("100M", 0.00435)])
def test_published_constants_reach_the_published_error_on_unseen_schedules(size: str, error: float) -> None:
    law = PUBLISHED[f"multipower-{size}"]
    errors = []
    for name in UNSEEN:
        curve = public_curve(size, name)
        # Every change of the learning rate on its own, except in the one run of 70,000 changes (checked for that below).
        exact = name != "cosine_72000"
        errors.append(np.abs(law.losses(curve.rates, curve.steps, exact=exact) - curve.losses).mean())
    assert np.mean(errors) == pytest.approx(error, abs=6e-6)


def score_unseen(size: str) -> tuple[float, int, float, float]:
    """Mean absolute error, end losses inside the interval, its mean width, and the error at the end of WSD."""
    model = public_model(size)
    errors, inside, widths, ends = [], 0, [], {}
    for name in UNSEEN:
        curve = public_curve(size, name)
        said = model.predict(curve.rates, curve.steps)
        value, low, high = said.end
        errors.append(float(np.abs(said.value - curve.losses).mean()))
        ends[name] = value - float(curve.losses[-1])
        inside += low <= curve.losses[-1] <= high
        widths.append(high - low)
    return float(np.mean(errors)), inside, float(np.mean(widths)), ends["wsd_20000_24000"]


def test_laws_fitted_to_three_public_curves_forecast_the_six_they_were_chosen_on() -> None:
    error, inside, width, wsd_end = score_unseen("25M")
    assert error <= 0.0045
    assert inside >= 5
    assert width < 0.035
    assert abs(wsd_end) < 0.008


def test_the_single_score_on_the_larger_model_stays_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen on 25M, frozen, scored once: the error held, the interval (three of six) and the bias on WSD (.008) did not."""
    error, inside, width, wsd_end = score_unseen("100M")
    assert error == pytest.approx(0.0039, abs=3e-4)
    assert error <= 0.0045
    assert inside >= 5, "with the least error that was added after that score, and so no test of it"
    assert width < 0.03
    assert wsd_end == pytest.approx(-0.0099, abs=5e-4)
    monkeypatch.setattr("windtunnel.laws.curve_fit.LEAST_ERROR", 0.0)
    _, inside, width, _ = score_unseen("100M")
    assert inside == 3
    assert width == pytest.approx(0.0176, abs=1e-3)


def test_a_law_without_the_learning_rates_changes_is_far_worse() -> None:
    model = fit_curves([public_curve("25M", name) for name in FITTED], kernels=("integral",), draws=1)
    curves = [public_curve("25M", name) for name in UNSEEN]
    assert np.mean([np.abs(model.predict(c.rates, c.steps).value - c.losses).mean() for c in curves]) > 0.02


# -- fits -------------------------------------------------------------------------------------------------------------------


def planted_curves(kernel: str, noise: float = 0.0, seed: int = 0) -> tuple[CurveLaw, list[Curve]]:
    law, rng = CurveLaw(kernel, PLANTED[kernel]), np.random.default_rng(seed)
    curves = []
    for name, rates in {"constant": wsd(800, 800), "decay": wsd(800, 400), "short": wsd(500, 300)}.items():
        at = np.arange(60, len(rates) + 1, 10)
        curves.append(Curve(name, rates, at, law.losses(rates, at) * np.exp(noise * rng.normal(size=len(at)))))
    return law, curves


@pytest.mark.parametrize("kernel", AVERAGED)
def test_a_planted_law_is_found_and_forecasts_a_schedule_never_seen(kernel: str) -> None:
    law, curves = planted_curves(kernel)
    model = fit_curves(curves, kernels=(kernel,), fade=0.0, draws=2)
    found = model.best
    rates = wsd(900, 810, floor=0.02)
    assert found.residual < 4e-4
    assert found.final(rates) == pytest.approx(law.final(rates), abs=4e-3)
    assert found.constants["alpha"] == pytest.approx(law.constants["alpha"], abs=0.05)


def test_the_average_follows_the_law_that_forecasts_curves_left_out() -> None:
    _, curves = planted_curves("exponential", noise=5e-4)
    model = fit_curves(curves, kernels=("integral", "exponential"), fade=0.0, draws=4)
    assert model.weights[1] > 0.8
    assert sum(model.weights) == pytest.approx(1.0)
    said = model.predict(wsd(900, 700))
    assert (said.low90 < said.value).all()
    assert (said.value < said.high90).all()


def test_a_decay_gains_over_none_and_a_schedule_over_itself_does_not() -> None:
    _, curves = planted_curves("power", noise=5e-4)
    model = fit_curves(curves, kernels=("exponential", "power"), draws=4)
    decayed, flat = wsd(800, 640), wsd(800, 800)
    gain = model.contrast(decayed, flat)
    assert gain.tells
    assert gain.low90 > 0
    assert model.contrast(flat, decayed).gain == pytest.approx(-gain.gain)
    same = model.contrast(decayed, decayed)
    assert (same.gain, same.low90, same.high90) == (0.0, 0.0, 0.0)
    assert not same.tells
    assert decay_difference(decayed, decayed) == 0
    assert 0.3 < decay_difference(decayed, flat) <= 1


def test_means_over_stretches_keep_the_curve_and_drop_the_noise() -> None:
    law, rates = CurveLaw("power", PLANTED["power"]), wsd(2000, 1500)
    clean = law.losses(rates, np.arange(1, 2001))
    noisy = clean * np.exp(0.02 * np.random.default_rng(0).normal(size=2000))
    noisy[300] = np.nan
    curve = Curve.averaged("noisy", rates, noisy, skip=200, points=60)
    assert len(curve.steps) == 60
    assert curve.steps[0] > 200
    assert curve.losses == pytest.approx(clean[curve.steps - 1], rel=0.015)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda c: [c[0], Curve("twin", c[0].rates, c[0].steps, c[0].losses)], "the learning rate never falls"),
        (lambda c: c[:1], "expected at least two curves"),
        (lambda c: [c[0], c[0]], "names of their own"),
        (lambda c: [Curve("x", c[0].rates, c[0].steps, np.full(len(c[0].steps), np.nan))], "leave diverged runs out"),
        (lambda c: [Curve("x", c[0].rates[:100], c[0].steps, c[0].losses)], "expected rising steps between 1 and 100"),
        (lambda c: [Curve("x", c[0].rates, c[0].steps[:3], c[0].losses[:3])], "expected at least 8 losses"),
    ],
)
def test_curves_that_teach_nothing_are_refused_in_one_line(break_it, words: str) -> None:
    _, curves = planted_curves("power")
    with pytest.raises(LawError, match=re.escape(words)) as caught:
        fit_curves(break_it(curves))
    assert "\n" not in str(caught.value)


def test_every_constant_has_a_row() -> None:
    assert set(CONSTANTS) == set(KERNELS) == set(PLANTED)
