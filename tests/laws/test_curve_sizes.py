"""Curve laws over model size: planted constants come back, an unseen schedule at an unseen size lies in its band."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from windtunnel.laws.curve import Timeline
from windtunnel.laws.curve_fit import scale_of
from windtunnel.laws.curve_law import Curve, CurveLaw
from windtunnel.laws.curve_sizes import End, Proxy, SizedForecast, _model, forecast_sizes
from windtunnel.laws.design import DecayRule, rates_of
from windtunnel.laws.fit import LawError
from windtunnel.laws.points import Point
from windtunnel.train.schedule import Schedule

SIZES, LENGTHS, WARMUP, PEAK = (24e3, 53e3, 95e3), (300, 600, 1200), 24, 0.03
COSINE = rates_of(Schedule(WARMUP, decay_steps=1200, kind="cosine"), PEAK, 1200)
TARGET = 320e3


def planted(size: float) -> CurveLaw:
    """Floor 1.5 + 2 N^-.2, progress N^.1, annealing N^.05, all but the floor counted from 53k."""
    x = math.log(size / 53e3)
    constants = {
        "L0": 1.5 + 1.6 * math.exp(-0.2 * x),
        "A": 2.0 * math.exp(0.1 * x),
        "alpha": 0.6,
        "B": 14 * math.exp(0.05 * x),
    }
    return CurveLaw("exponential", {**constants, "tau": 40.0}, fade=0.1)


def study(noise: float = 0.0, seed: int = 0, sizes: tuple[float, ...] = SIZES) -> tuple[list[Proxy], list[End]]:
    """A trunk and three decays of each size; held-out loss is .35 of the training loss."""
    rng = np.random.default_rng(seed)
    proxies: list[Proxy] = []
    ends: list[End] = []
    for n in sizes:
        law, level = planted(n), noise / 2 * rng.normal()
        runs = [("trunk", rates_of(Schedule(WARMUP), PEAK, 960), 100, 0.0)]
        for length in LENGTHS:
            rates = rates_of(DecayRule(0.2, "exponential", 0.1).schedule(length, WARMUP), PEAK, length)
            runs.append((str(length), rates, round(0.8 * length), noise / 2 * rng.normal()))
        for name, rates, first, own in runs:
            at = np.unique(np.linspace(first, len(rates), 40 if name == "trunk" else 12).round().astype(np.int64))
            losses = law.losses(rates, at) * np.exp(level + own + noise * rng.normal(size=len(at)))
            proxies.append(Proxy(n, f"t{n:g}", Curve(f"{name} {n:g}", rates, at, losses)))
            if name != "trunk":
                held = 0.35 * law.final(rates) * math.exp(level + own)
                ends.append(End(Point(n, 1024.0 * len(rates), held, f"t{n:g}"), rates))
    return proxies, ends


def said(noise: float = 0.0, size: float = TARGET, rates: np.ndarray = COSINE, **options: object) -> SizedForecast:
    proxies, ends = study(noise)
    return forecast_sizes(proxies, ends, size, 1024.0 * len(rates), rates, kernels=("exponential",), **options)  # type: ignore[arg-type]


def test_a_cosine_at_a_size_never_trained_is_foretold_from_decays_of_small_runs() -> None:
    found, law = said(), planted(TARGET)
    truth = law.losses(COSINE, found.steps[20:])
    assert found.value[20:] == pytest.approx(truth, rel=0.01)
    assert found.final.value == pytest.approx(0.35 * law.final(COSINE), rel=0.01)
    constants = found.fits[0].law.constants()
    assert constants["alpha"] == pytest.approx(0.6, abs=0.05)
    assert constants["tau"] == pytest.approx(40, rel=0.1)
    assert found.fits[0].ratio == pytest.approx(math.log(0.35), abs=0.002)
    assert found.low90[-1] < found.value[-1] < found.high90[-1]
    assert json.loads(json.dumps(found.to_dict()))["laws"][0]["kernel"] == "exponential"


def test_derivatives_over_all_sizes_agree_with_finite_differences() -> None:
    proxies, _ = study()
    scale = scale_of([p.curve for p in proxies])
    lines = {p.parameters: [Timeline.of(p.curve.rates, p.curve.steps)] for p in proxies}
    model = _model("power", lines, scale, 50e3)
    theta = np.array([0.5, 0.4, -1.5, -0.2, 0.1, -0.6, -1.0, 0.05, 3.0, -1.2])
    _, slopes = model(theta[None])
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-6
        numeric = (model((theta + step)[None])[0][0] - model((theta - step)[None])[0][0]) / 2e-6
        assert slopes[0, :, i] == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "curve_coverage.py"
    spec = importlib.util.spec_from_file_location("curve_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_band_holds_in_planted_worlds_of_another_kernel() -> None:
    """Four of the forty worlds of bench/curve_coverage.py, one for each unseen schedule; its kernel is never fitted."""
    made, inside, covered = bench(), [], []
    for draw, schedule in enumerate(made.UNSEEN.values()):
        rng = np.random.default_rng(100 + draw)
        found, curve, outcome = made.simulate(made.world(rng), rng, 4 * 95e3, schedule, kernels=("power",))
        low, high = (np.interp(curve.steps, found.steps, part) for part in (found.low90, found.high90))
        covered.append(float(((low <= curve.losses) & (curve.losses <= high)).mean()))
        inside.append(found.final.expected.low90 <= outcome <= found.final.expected.high90)
        assert abs(found.final.value / outcome - 1) < 0.05
    assert sum(inside) >= 3
    assert np.mean(covered) > 0.8


def test_the_interval_grows_with_size_noise_and_how_unlike_the_decay_is() -> None:
    usual = rates_of(DecayRule(0.2, "exponential", 0.1).schedule(1200, WARMUP), PEAK, 1200)
    near, far = said(0.003, 150e3, usual), said(0.003, 900e3, usual)
    assert near.final.expected.half_width < far.final.expected.half_width
    unlike = said(0.003, 150e3, COSINE)
    assert near.final.expected.half_width < unlike.final.expected.half_width
    assert any("of the decay is unlike" in note for note in unlike.notes)
    assert any("9.47× the largest size" in note for note in far.notes)


def test_two_sizes_or_branches_without_a_score_are_refused() -> None:
    proxies, ends = study(sizes=SIZES[:2])
    with pytest.raises(LawError, match="at least 3 sizes, got 2"):
        forecast_sizes(proxies, ends, TARGET, 1e6, COSINE)
    proxies, ends = study()
    more = [*proxies, replace(proxies[0], parameters=2e5, cluster="x")]
    with pytest.raises(LawError, match="expected scored branches of every size"):
        forecast_sizes(more, ends, TARGET, 1e6, COSINE)
