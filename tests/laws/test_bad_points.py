"""Points that cannot carry a law: the command says so in one line; an answer beyond the points names the factor."""

from __future__ import annotations

from pathlib import Path

import pytest

from windtunnel import cli
from windtunnel.laws.forecast import forecast
from windtunnel.laws.points import Point

GOOD = [(n, d, 0.4 + 5 * n**-0.25 + 9 * d**-0.25) for n in (1e4, 3e4, 1e5) for d in (1e5, 3e5, 1e6)]


def table(rows: list[tuple[float, ...]]) -> str:
    return "n,d,loss\n" + "".join(",".join(f"{value!r}" for value in row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (table(GOOD[:4]), "the additive law has 5 constants and needs more points, got 4"),
        (table([(1e4, 1e5 * i, 3 - i / 10) for i in range(1, 9)]),
         "points: expected at least 2 sizes, got 1; train proxies of more sizes"),
        (table([*GOOD, (2e5, 1e5, float("nan"))]), "expected a finite positive loss, got nan; leave diverged runs out"),
        (table([*GOOD, (1e4, 1e5, 9.0)]), "expected seeds to agree within 10 %"),
        ("n,d\n1,2\n", "expected rows under the columns n, d, loss"),
        (table([*GOOD, (1e4, 1e5, 3.0)]).replace("3.0", "high"), "expected a loss as a number, got 'high'"),
    ],
)  # fmt: skip
def test_a_law_from_bad_points_is_one_line(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.csv").write_text(text)
    assert cli._run(["law", "fit", str(tmp_path / "runs.csv"), "--draws", "0"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_beyond_the_points_the_factor_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_text(table(GOOD))
    law = tmp_path / "law.json"
    assert cli._run(["law", "fit", str(tmp_path / "runs.csv"), "--draws", "0", "--out", str(law)]) == 0
    capsys.readouterr()
    assert cli._run(["law", "predict", "--law", str(law), "--parameters", "700k", "--tokens", "5M"]) == 0
    out = capsys.readouterr().out
    assert "N = 700k is 7× the largest fitted (100k)" in out
    assert "D = 5M is 5× the largest fitted (1M)" in out
    points = [Point(n, d, loss, f"t{n}") for n, d, loss in GOOD]
    warnings = forecast(points, 3e5, 1e6).warnings
    assert "N = 300k is 3× the largest fitted (100k)" in warnings
    assert not [text for text in forecast(points, 1e5, 1e6).warnings if "largest fitted" in text]


def test_a_run_that_diverged_to_a_finite_loss_is_named_and_ordinary_noise_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = [(n, d, loss * (1 + 0.003 * (-1) ** i)) for i, (n, d, loss) in enumerate(GOOD)]
    for rows, named in (([*noisy, (3e4, 6e5, 1.75 * GOOD[5][2])], 1), (noisy, 0)):
        (tmp_path / "runs.csv").write_text(table(rows))
        assert cli._run(["law", "fit", str(tmp_path / "runs.csv"), "--draws", "0"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("leave it out if it diverged") == named
    points = [Point(n, d, loss, f"t{n}") for n, d, loss in [*noisy, (3e4, 6e5, 1.75 * GOOD[5][2])]]
    (warning,) = [text for text in forecast(points, 3e5, 1e6).warnings if "diverged" in text]
    assert "N = 30k, D = 600k" in warning
    assert "above the law" in warning


def test_a_law_without_a_floor_is_not_asked_beyond_ten_times_its_sizes_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.csv").write_text(table(GOOD))
    law = tmp_path / "law.json"
    assert (
        cli._run(["law", "fit", str(tmp_path / "runs.csv"), "--form", "coupled", "--draws", "0", "--out", str(law)])
        == 0
    )
    capsys.readouterr()
    far = ["law", "predict", "--law", str(law), "--parameters", "2M", "--tokens", "1M"]
    assert cli._run(far) == 2
    error = capsys.readouterr().err
    assert "20×, at most 10×" in error
    assert len(error.splitlines()) == 1
    assert cli._run([*far, "--force"]) == 0
    assert cli._run([*far[:5], "900k", *far[6:]]) == 0


def test_a_forecast_from_single_trunks_says_that_its_noise_is_assumed() -> None:
    once = [Point(n, d, loss, f"t{n}") for n, d, loss in GOOD]
    twice = [*once, *(Point(n, d, loss * 1.001, f"u{n}", 1) for n, d, loss in GOOD)]
    said = [
        any("is assumed, not measured" in w for w in forecast(points, 3e5, 1e6).warnings) for points in (once, twice)
    ]
    assert said == [True, False]
