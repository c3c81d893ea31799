"""The decay that a curve law chooses: against the planted truth, within what the runs can speak for, and when it cannot tell."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from windtunnel import cli
from windtunnel.curve_runs import read_curves
from windtunnel.laws.curve_fit import CurveModel, fit_curves
from windtunnel.laws.curve_law import Curve, CurveLaw
from windtunnel.laws.design import DecayRule, design, longest_share, lowest_floor, rates_of
from windtunnel.laws.fit import LawError
from windtunnel.train.schedule import FORMS, Schedule

LOGS = Path(__file__).parents[1] / "data" / "public-logs" / "multi-power-law" / "25M"
TRUTH = CurveLaw("power", {"L0": 2.0, "A": 0.5, "alpha": 0.5, "B": 40.0, "tau": 20.0, "beta": 0.4})
PEAK, WARMUP, STEPS = 5e-3, 40, 800


def rates(share: float, floor: float = 0.1, form: str = "linear", steps: int = STEPS) -> np.ndarray:
    return rates_of(DecayRule(share, form, floor).schedule(steps, WARMUP), PEAK, steps)  # pyright: ignore[reportArgumentType]


def curve(name: str, run: np.ndarray, noise: float, seed: int) -> Curve:
    at = np.arange(80, len(run) + 1, 10)
    wobble = np.exp(noise * np.random.default_rng(seed).normal(size=len(at)))
    return Curve(name, run, at, TRUTH.losses(run, at) * wobble)


@cache
def planted(noise: float) -> tuple[CurveModel, list[Curve]]:
    flat = rates_of(Schedule(WARMUP), PEAK, STEPS)
    runs = {"flat": flat, "long": rates(0.4), "short": rates(0.15), "half": rates(0.3, steps=400)}
    curves = [curve(name, run, noise, i) for i, (name, run) in enumerate(runs.items())]
    return fit_curves(curves, kernels=("exponential", "power"), fade=0.0, draws=6), curves


def test_the_chosen_decay_is_nearly_the_best_one_of_the_planted_world() -> None:
    model, curves = planted(2e-4)
    found = design(model, curves, STEPS, warmup=WARMUP)
    truly = {
        (share, form): TRUTH.final(rates(share, 0.1, form)) for share in (0.05, 0.1, 0.2, 0.4, 0.8) for form in FORMS
    }
    reached = TRUTH.final(rates(found.chosen.share, found.chosen.floor, found.chosen.form))
    assert reached <= min(truly.values()) + 1e-3
    gained = TRUTH.final(rates(0.1)) - reached
    assert found.tells
    assert found.gain.low90 < gained < found.gain.high90
    assert found.expected[1] < reached < found.expected[2]
    assert found.recommended is found.chosen


def test_noisy_curves_cannot_tell_and_keep_the_usual_decay() -> None:
    model, curves = planted(3e-2)
    found = design(model, curves, STEPS, warmup=WARMUP, usual=DecayRule(0.3))
    assert not found.tells
    assert found.recommended is found.usual
    low, high = found.as_good
    assert low <= found.chosen.share <= high
    model, curves = planted(2e-4)
    chosen = design(model, curves, STEPS, warmup=WARMUP).chosen
    again = design(model, curves, STEPS, warmup=WARMUP, usual=chosen)
    assert (again.gain.gain, again.tells) == (0.0, False)


def test_candidates_stay_near_what_was_trained_unless_asked_otherwise() -> None:
    flat = rates_of(Schedule(WARMUP), PEAK, STEPS)
    curves = [
        curve("flat", flat, 2e-4, 0),
        curve("short", rates(0.1), 2e-4, 1),
        curve("other", rates(0.1, steps=600), 2e-4, 2),
    ]
    model = fit_curves(curves, kernels=("power",), draws=3)
    near = design(model, curves, STEPS, warmup=WARMUP)
    assert longest_share(curves) == pytest.approx(0.1, abs=0.005)
    assert lowest_floor(curves) == pytest.approx(0.1, abs=0.02)
    assert max(share for share, _, _ in near.shares) <= 0.2
    assert near.chosen.floor >= 0.1
    far = design(model, curves, 3 * STEPS, warmup=WARMUP, anywhere=True)
    assert max(share for share, _, _ in far.shares) > 0.9
    assert far.chosen.floor == 0.0
    assert any("3× the longest run" in note for note in far.notes)
    assert any("a floor of 0 is extrapolation" in note for note in far.notes)


def test_on_the_public_curves_the_law_cannot_tell_its_choice_from_the_usual_decay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = [str(LOGS / f"{name}.csv") for name in ("cosine_24000", "constant_24000", "wsdcon_9")]
    assert cli._run(["law", "schedule", *tables, "--warmup", "2160", "--length", "24000 steps"]) == 0
    out = capsys.readouterr().out
    assert "cosine, 20 % of the updates" in out
    assert "the law cannot tell the two apart: keep the usual decay" in out
    assert "5 % to 50 %" in out


def test_a_table_gives_back_the_rates_of_its_run(tmp_path: Path) -> None:
    run = rates(0.3)
    run[500:] *= 0.4  # a step down
    at = np.arange(60, STEPS + 1, 10)
    rows = [f"{step},{run[step - 1]},{3.0 - step / 1e4}" for step in at]
    (tmp_path / "run.csv").write_text("step,lr,loss\n" + "\n".join(rows))
    made = read_curves([tmp_path / "run.csv"], WARMUP).curves[0]
    assert made.rates[:500] == pytest.approx(run[:500], rel=1e-6)
    assert made.rates[510:] == pytest.approx(run[510:], rel=1e-6)
    assert (made.name, len(made.losses)) == ("run", len(at))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,lr,loss\n10,1,2\n", "begins at step 10: what the learning rate did before is not known"),
        ("step,loss\n1,2\n", "expected the columns step, lr and loss, found no 'lr'"),
        ("step,lr,loss\n1,x,2\n", "expected numbers under step, lr and loss"),
        ("step,lr,loss\n2,1,2\n1,1,2\n", "rising steps"),
        ("step,lr,loss\n1,1,2\n2,1,2\n", "expected at least 8 losses"),
        ("step,lr,loss\n" + "".join(f"{i},1,{'nan' if i == 5 else 2}\n" for i in range(1, 12)), "leave diverged runs out"),
        ("step,lr,loss\n" + "".join(f"{i},1,{3 - i / 20}\n" for i in range(1, 12)), "expected at least two curves"),
    ],
)  # fmt: skip
def test_tables_that_teach_nothing_are_one_line(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.csv").write_text(text)
    assert cli._run(["law", "schedule", str(tmp_path / "run.csv"), "--length", "100 steps"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("rule", ["linear", "linear:10:0.1", "zigzag:10%:0.1", "linear:10%:x", "linear:0%:0.1"])
def test_a_wrong_rule_is_one_line(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["law", "schedule", "x.csv", "--length", "100 steps", "--against", rule]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_shorter_than_its_warmup_is_refused() -> None:
    model, curves = planted(2e-4)
    with pytest.raises(LawError, match=re.escape("expected at least 50 updates")):
        design(model, curves, 45, warmup=WARMUP)
