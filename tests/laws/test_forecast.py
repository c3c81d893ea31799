"""A forecast covers what it forecasts, prefers the form that predicts held-out proxies, and cannot be changed afterwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from windtunnel.base.errors import ArtefactError
from windtunnel.laws.fit import LawError
from windtunnel.laws.forecast import Forecast, Interval, forecast, freeze, read_forecast, score, unlike_setting
from windtunnel.laws.heldout import seed_noise
from windtunnel.laws.loss import LossLaw
from windtunnel.laws.points import Point
from windtunnel.laws.sealed import interval_score

SIZES, LENGTHS, TARGET = (0.024e6, 0.053e6, 0.095e6), (1.6e6, 3.2e6, 6.4e6), (0.319e6, 6.4e6)
COUPLED = LossLaw("coupled", {"N_c": 5e5, "D_c": 1.2e7, "alpha_N": 0.2, "alpha_D": 0.22}, (1, 1), (1, 1))
ADDITIVE = LossLaw("additive", {"C_N": 30.0, "alpha": 0.36, "C_D": 60.0, "beta": 0.32, "L0": 0.55}, (1, 1), (1, 1))
SKALING = LossLaw("skaling", {"A": 600.0, "a": 0.6, "B": 6000.0, "b": 0.6, "k": 0.4, "E": 0.35}, (1, 1), (1, 1))
FACTS = {
    "runs": ["0" * 64, "1" * 64], "corpus": "notes", "heldout": "notes-heldout", "branch": "decay",
    "branch_is": "the decay on the trunk's own data", "batch": 2048, "base_lr": 0.01, "kind": "blind",
}  # fmt: skip


def proxies(law: LossLaw, noise: float, seeds: int, rng: np.random.Generator) -> list[Point]:
    points: list[Point] = []
    for n in SIZES:
        for seed in range(seeds):
            shared = noise * math.sqrt(0.5) * rng.normal()
            for d in LENGTHS:
                loss = law.predict(n, d, force=True) * math.exp(shared + noise * math.sqrt(0.5) * rng.normal())
                points.append(Point(n, d, loss, f"{n}-{seed}", seed))
    return points


def one(seed: int = 0, law: LossLaw = COUPLED, noise: float = 0.002, seeds: int = 2) -> Forecast:
    return forecast(proxies(law, noise, seeds, np.random.default_rng(seed)), *TARGET)


def test_ninety_percent_intervals_cover_planted_worlds_and_beat_both_naive_forecasts() -> None:
    """A small version of bench/forecast_coverage.py, whose 300 draws a cell set the constants."""
    rng = np.random.default_rng(5)
    inside, errors, widths, largest, line = [], [], [], [], []
    for draw in range(36):
        law = (COUPLED, ADDITIVE, SKALING)[draw % 3]
        noise = (0.0015, 0.003)[draw % 2]
        said = forecast(proxies(law, noise, 2, rng), *TARGET)
        outcome = law.predict(*TARGET, force=True) * math.exp(noise * rng.normal())
        result = score(said, outcome)
        inside.append(result["inside_90"])
        errors.append(abs(result["relative_error"]))
        widths.append(said.expected.half_width)
        largest.append(abs(result["naive"]["largest"]["relative_error"]))
        line.append(abs(result["naive"]["line"]["relative_error"]))
    assert sum(inside) >= 28
    assert np.mean(errors) < 0.012
    assert np.mean(widths) < 0.03
    assert np.mean(errors) < 0.5 * np.mean(line) < np.mean(largest)


def test_the_form_that_predicts_held_out_proxies_gets_the_weight() -> None:
    for law, wanted, unwanted in ((COUPLED, "coupled", "additive"), (ADDITIVE, "additive", "coupled")):
        said = one(law=law, noise=0.0005, seeds=3)
        weights = {f.law.form: f.weight for f in said.forms}
        assert sum(weights.values()) == pytest.approx(1)
        assert weights[wanted] > weights[unwanted]


def test_without_noise_the_forecast_is_close_and_its_interval_narrow() -> None:
    for law in (COUPLED, ADDITIVE, SKALING):
        said = one(law=law, noise=1e-5, seeds=3)
        assert said.value == pytest.approx(law.predict(*TARGET, force=True), rel=0.01)
        assert said.expected.half_width < 0.03


def test_the_interval_grows_with_the_distance_in_size() -> None:
    points = proxies(COUPLED, 0.002, 2, np.random.default_rng(1))
    widths = [forecast(points, n, 6.4e6).expected.half_width for n in (0.15e6, 0.319e6, 0.94e6)]
    assert widths == sorted(widths)
    assert widths[2] > 1.5 * widths[0]
    # A form that misses the largest size without noise stays honest beyond it, in proportion to the distance.
    clean = proxies(ADDITIVE, 1e-5, 3, np.random.default_rng(1))
    near, far = (forecast(clean, n, 6.4e6, forms=("coupled",)) for n in (0.15e6, 0.94e6))
    missed = abs(list(near.forms[0].held_out.values())[-1])
    assert missed > 0.005
    assert near.expected.half_width > 0.5 * missed
    assert far.expected.half_width > 2 * missed
    assert far.expected.half_width > 2.5 * near.expected.half_width


def test_intervals_are_nested_and_noisier_proxies_give_wider_ones() -> None:
    calm, noisy = one(noise=0.001), one(noise=0.006)
    for e in (calm.expected, noisy.expected, *calm.naive.values()):
        assert e.low90 < e.low50 < e.value < e.high50 < e.high90
    assert noisy.expected.half_width > calm.expected.half_width


def test_beyond_ten_times_the_coupled_form_is_left_out_unless_forced() -> None:
    points = proxies(COUPLED, 0.002, 2, np.random.default_rng(2))
    far = forecast(points, 1.2e6, 6.4e6)
    assert {f.law.form for f in far.forms} == {"additive", "skaling"}
    assert any("no floor" in w for w in far.warnings)
    assert any("12.6× the largest" in w for w in far.warnings)
    assert "coupled" in {f.law.form for f in forecast(points, 1.2e6, 6.4e6, force=True).forms}
    with pytest.raises(LawError, match="no form may extrapolate"):
        forecast(points, 1.2e6, 6.4e6, forms=("coupled",))


def test_a_setting_unlike_the_proxies_is_named_with_its_factor_and_one_alike_is_not() -> None:
    proxies = [(4096, 0.01), (4096, 0.01)]
    assert unlike_setting(4096, 0.01, proxies) == []
    batch, rate = unlike_setting(16384, 0.005, proxies)
    assert batch == "the target's batch of 16.4k tokens is 4× that of the proxies, for which the law is"
    assert rate == "the target's base learning rate of 0.005 is 0.5× that of the proxies, for which the law is"
    (both,) = unlike_setting(4096, 0.01, [*proxies, (2048, 0.01)])
    assert "1× to 2×" in both
    assert not any("batch" in warning for warning in one().warnings)


def test_naive_forecasts_are_the_largest_proxy_and_the_line_through_the_last_two() -> None:
    said = one(noise=0.0, seeds=1)
    last, before = (math.log(COUPLED.predict(n, 6.4e6, force=True)) for n in (SIZES[2], SIZES[1]))
    slope = (last - before) / math.log(SIZES[2] / SIZES[1])
    assert said.naive["largest"].value == pytest.approx(math.exp(last))
    assert said.naive["line"].value == pytest.approx(math.exp(last + slope * math.log(TARGET[0] / SIZES[2])))


def test_seed_noise_is_pooled_and_leans_on_its_prior_when_repeats_are_few() -> None:
    rng = np.random.default_rng(0)
    assert seed_noise(proxies(COUPLED, 0.01, 1, rng)).freedom == 4
    many = seed_noise(proxies(COUPLED, 0.01, 40, rng))
    assert many.sd == pytest.approx(0.01, rel=0.15)
    assert many.freedom == 4 + 3 * 39
    assert seed_noise(proxies(COUPLED, 0.0, 2, rng)).sd < 0.0025


def test_designs_that_cannot_carry_a_forecast_are_refused() -> None:
    points = proxies(COUPLED, 0.001, 1, np.random.default_rng(0))
    with pytest.raises(LawError, match="at least 3 sizes, got 2"):
        forecast(points[:6], *TARGET)
    with pytest.raises(LawError, match="at least 6, got 3"):
        forecast(points[::3], *TARGET)
    with pytest.raises(LawError, match=r"forecast\.tokens"):
        forecast(points, 1e6, math.inf)
    with pytest.raises(LawError, match="finite positive loss"):
        forecast([replace(points[0], loss=math.inf), *points[1:]], *TARGET)


def test_a_frozen_forecast_comes_back_whole_and_is_never_overwritten(tmp_path: Path) -> None:
    said = one()
    path = tmp_path / "deep" / "forecast.json"
    seal = freeze(said, path, FACTS)
    back = read_forecast(path)
    assert back.hash == seal
    assert len(seal) == 64
    assert back.forecast == said
    assert FACTS.items() <= back.facts.items()
    assert back.facts["time"].endswith("+00:00")
    with pytest.raises(ArtefactError, match="never overwritten"):
        freeze(said, path, FACTS)
    assert read_forecast(path).hash == seal


def test_any_flipped_byte_is_noticed_and_both_hashes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "forecast.json"
    seal = freeze(one(), path, FACTS)
    whole = path.read_bytes()
    stated = whole.index(seal.encode())
    for position in [*np.linspace(0, len(whole) - 1, 60).astype(int), stated + 5]:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match="expected .*hash.*found [0-9a-f]{64}") as caught:
            read_forecast(path)
        if not stated - 8 <= position < stated + 65:
            assert seal in str(caught.value)
    # The same content with other spaces is a change too.
    path.write_text(json.dumps(json.loads(whole)))
    with pytest.raises(ArtefactError, match="expected hash"):
        read_forecast(path)
    with pytest.raises(ArtefactError, match="expected a forecast file"):
        read_forecast(tmp_path / "none.json")


@pytest.mark.parametrize("key", ["runs", "corpus", "heldout", "branch", "branch_is", "batch", "base_lr", "kind"])
def test_a_forecast_without_its_facts_is_not_frozen(tmp_path: Path, key: str) -> None:
    path = tmp_path / "forecast.json"
    with pytest.raises(LawError, match=rf"forecast\.{key}"):
        freeze(one(), path, {k: v for k, v in FACTS.items() if k != key})
    assert not path.exists()
    with pytest.raises(LawError, match="'blind' or 'rehearsal'"):
        freeze(one(), path, {**FACTS, "kind": "guess"})


def test_scores_by_hand() -> None:
    said = replace(
        one(), expected=Interval(1.5, 1.48, 1.52, 1.45, 1.55),
        naive={"largest": Interval(1.7, 1.6, 1.8, 1.5, 1.9), "line": Interval(1.4, 1.38, 1.42, 1.35, 1.45)},
    )  # fmt: skip
    result = score(said, 1.6)
    assert result["relative_error"] == pytest.approx(-0.0625)
    assert (result["inside_50"], result["inside_90"]) == (False, False)
    assert result["gap_share"] == pytest.approx(-1.0)
    # 0.10 wide, missed by 0.05 above: 0.10 + 20 * 0.05.
    assert result["interval_score"] == pytest.approx(1.1)
    assert result["naive"]["largest"]["interval_score"] == pytest.approx(0.4)
    assert result["naive"]["line"]["relative_error"] == pytest.approx(-0.125)
    assert interval_score(said.expected, 1.5) == pytest.approx(0.1)
    assert score(said, 1.51)["inside_50"]
    for bad in (math.nan, 0.0, -1.0):
        with pytest.raises(LawError, match="diverged run is no outcome"):
            score(said, bad)
