"""Where a law says to spend: with use counted in, with intervals, in either convention; laws fitted to a table; the map."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from windtunnel import cli
from windtunnel.laws.fit import LawError
from windtunnel.laws.loss import NAMED, LossLaw, fit_loss_law
from windtunnel.laws.optimum import optimum, parameters_of, training_flops
from windtunnel.laws.points import Point, read_points
from windtunnel.model.family import FAMILIES
from windtunnel.report.contour import contour_figure, segments

LAW = LossLaw("additive", {"C_N": 40.0, "alpha": 0.35, "C_D": 90.0, "beta": 0.3, "L0": 0.5}, (2e4, 3e6), (1e6, 1e8))


def planted(noise: float = 0.01, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(float(n), float(d), LAW.predict(n, d) * math.exp(noise * rng.normal()), f"{n:.0f} {d:.0f}")
        for n in np.geomspace(2e4, 3e6, 6)
        for d in np.geomspace(1e6, 1e8, 6)
    ]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_law_of_the_paper_answers_a_budget_near_its_printed_ratio(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = float(NAMED[name].source.split("printed with ")[1].split()[0])
    assert cli._run(["law", "predict", "--law", name, "--flops", "1e21", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens_per_parameter"] == pytest.approx(printed, rel=0.07), "the constants are printed with two digits"
    if name == "minicpm-average":
        assert 184 <= round(said["tokens_per_parameter"]) <= 192
    assert said["parameters"] * said["tokens"] * 6 == pytest.approx(1e21)
    assert said["counts"] == "body"


@pytest.mark.parametrize("served", [1e6, 1e9, 1e11])
def test_counting_use_gives_the_best_model_of_a_dense_search(served: float) -> None:
    budget = 1e16
    best = optimum(LAW, budget, inference_tokens=served)
    assert best.training_flops + best.inference_flops == pytest.approx(budget)
    grid = np.geomspace(1e2, budget / 2 / served * (1 - 1e-9), 200_001)
    tokens = (budget - 2 * grid * served) / (6 * grid)
    losses = LAW.losses(grid, np.maximum(tokens, 1e-9))
    assert best.loss == pytest.approx(losses.min(), rel=1e-8)
    assert best.parameters == pytest.approx(grid[np.argmin(losses)], rel=2e-3)
    plain = optimum(LAW, budget)
    assert (plain.parameters, plain.tokens) == LAW.optimum(budget)
    assert best.parameters < plain.parameters
    assert best.tokens_per_parameter > plain.tokens_per_parameter
    with pytest.raises(LawError, match="at least zero"):
        optimum(LAW, budget, inference_tokens=-1)


def test_intervals_of_the_optimum_hold_the_truth_and_survive_a_file() -> None:
    law = fit_loss_law(planted(), delta=0.02, draws=80)
    again = LossLaw.from_dict(json.loads(json.dumps(law.to_dict())))
    assert again == law
    said, truth = optimum(again, 1e16), optimum(LAW, 1e16)
    for key, value in {"parameters": truth.parameters, "tokens": truth.tokens, "loss": truth.loss}.items():
        low, high = said.intervals[key]
        assert low < value < high
    low, high = said.intervals["tokens_per_parameter"]
    assert low < said.tokens_per_parameter < high
    assert optimum(LAW, 1e16).intervals == {}


def test_conventions_are_switched_and_never_mixed_silently() -> None:
    shape = FAMILIES["tiny"].shape(FAMILIES["tiny"].members[0].name, 2048)
    head = 2048 * shape.width
    assert parameters_of(shape, "body+head") - parameters_of(shape, "body") == head
    assert training_flops(shape, 1e6, 128) == 6e6 * shape.body
    assert training_flops(shape, 1e6, 128, counts="body+head") == 6e6 * (shape.body + head)
    assert training_flops(shape, 1e6, 128, flops="exact") == shape.flops_per_token(128).total * 1e6
    for call in (lambda: parameters_of(shape, "all"), lambda: training_flops(shape, 1e6, 128, flops="3ND")):
        with pytest.raises(LawError, match="expected one of"):
            call()


def table(path: Path, points: list[Point], *, cluster: bool = True) -> Path:
    lines = [f"{p.parameters},{p.tokens},{p.loss}" + (f",{p.cluster}" if cluster else "") for p in points]
    path.write_text("\n".join(["n,d,loss" + (",cluster" if cluster else ""), *lines]) + "\n", encoding="utf-8")
    return path


def test_a_table_is_fitted_written_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = table(tmp_path / "runs.csv", planted(0.003)), tmp_path / "law.json"
    assert cli._run(["law", "fit", str(source), "--delta", "0.01", "--draws", "40", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "additive law, 36 points" in text
    assert "alpha" in text
    assert "95 %:" in text
    assert cli._run(["law", "predict", "--law", str(out), "--flops", "1e16", "--inference-tokens", "1G"]) == 0
    text = capsys.readouterr().out
    assert "in use" in text
    assert "90 %: parameters" in text
    assert "N counts non-embedding parameters" in text
    assert (
        cli._run(["law", "fit", str(source), "--form", "best", "--delta", "0.01", "--counts", "body+head", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert set(said["tried"]) == {"additive", "coupled", "skaling"}
    assert said["counts"] == "body+head"
    assert said["form"] != "coupled"


def test_rows_without_a_trunk_are_runs_of_their_own_and_counts_may_have_suffixes(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("n,d,loss\n20k,1M,2.5\n4e4,2.5M,2.1\n", encoding="utf-8")
    first, second = read_points(path)
    assert (first.parameters, first.tokens, second.parameters) == (2e4, 1e6, 4e4)
    assert first.cluster != second.cluster


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n,d,loss\n1e5,1e6,2\n1e6,1e6,1.8\n", "has 5 constants and needs more points, got 2"),
        ("n,d,loss\n" + "".join(f"1e5,{k}e6,{2 - 0.1 * k}\n" for k in range(1, 9)), "expected at least 2 sizes, got 1"),
        ("size,d,loss\n1,2,3\n", "expected rows under the columns n, d, loss"),
        ("n,d,loss\nmany,1e6,2\n", "row 2: expected n as a count"),
        ("n,d,loss\n1e5,1e6,low\n", "row 2: expected a loss as a number, got 'low'"),
        ("n,d,loss\n1e5,1e6,nan\n1e6,1e6,2\n", "leave diverged runs out"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    assert cli._run(["law", "fit", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_design_that_cannot_separate_its_terms_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = [Point(n, 20 * n, LAW.predict(n, 20 * n), f"{n:g}") for n in np.geomspace(2e4, 3e6, 9).tolist()]
    assert cli._run(["law", "fit", str(table(tmp_path / "runs.csv", tied)), "--draws", "0"]) == 0
    text = capsys.readouterr().out
    assert "cannot be told apart" in text or "hardly separate" in text
    assert "no intervals" in text


def test_the_map_follows_the_law() -> None:
    plane = [[float(i) for i in range(5)] for _ in range(4)]
    found = segments(plane, 2.25)
    assert len(found) == 3
    assert all(point[0] == pytest.approx(2.25) for pair in found for point in pair)
    best = [LAW.optimum(c) for c in np.geomspace(1e11, 1e15, 20)]
    drawn = contour_figure(
        LAW.predict, [(p.parameters, p.tokens) for p in planted()], best,
        band=[(n, d / 2, d * 2) for n, d in best], target={"1M": (1e6, 2e7)},
    )  # fmt: skip
    assert drawn.startswith("<svg")
    assert drawn.count("<circle") == 36
    assert "best use of compute" in drawn
    assert ">1M<" in drawn
    assert "nan" not in drawn
