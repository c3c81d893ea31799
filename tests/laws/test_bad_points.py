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
