"""The forecast ledger: every sealed forecast is scored against its run, misses too, and what was touched never counts."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from windtunnel import cli
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.laws.forecast import forecast, freeze
from windtunnel.laws.points import Point
from windtunnel.laws.sealed import SEALED, interval_score, read_forecast
from windtunnel.ledger import AVERAGE, coverage, entries, forecasts
from windtunnel.sealing import keep

LN2 = math.log(2)
KEY = "0123456789" + "a" * 54
FACTS = {
    "runs": ["b" * 64], "corpus": {"wiki": "c"}, "heldout": {"wiki": {}}, "branch": "same", "branch_is": "the decay",
    "batch": 2048, "base_lr": 0.01, "target": KEY, "mixture": {"wiki": 0.75, "code": 0.25},
}  # fmt: skip
EARLY, TRAINED, AFTER = "2026-01-01T00:00:00+00:00", 1_770_000_000.0, "2026-06-01T00:00:00+00:00"


def loss(n: float, d: float) -> float:
    return 0.4 + 5.0 * n**-0.21 + 9.0 * d**-0.24


def said(factor: float = 1.0) -> Any:
    sizes, lengths = (2e4, 5e4, 1e5), (1e6, 2e6, 4e6)
    return forecast([Point(n, d, factor * loss(n, d), f"t{n:g}") for n in sizes for d in lengths], 4e5, 8e6)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose program 'p' has the finished target 'same': wiki 1.2 and code .8 of the planted loss."""
    with LabBook(tmp_path / "labbook.sqlite") as book:
        run = f"p/same-{KEY[:10]}"
        book.put_run(run, program="p", kind="decay", name="same", status="done", folder=f"programs/p/runs/same-{KEY[:10]}",
                     config={}, started=TRAINED, ended=TRAINED + 60)  # fmt: skip
        for corpus, factor in (("wiki", 1.2), ("code", 0.8)):
            book.put_score(run, corpus, "nats_per_byte", factor * loss(4e5, 8e6), "nats per UTF-8 byte", 100)
    return tmp_path


def seal(home: Path, name: str, *, kind: str = "blind", factor: float = 1.1, when: str = EARLY, **facts: Any) -> Path:
    path = Home(home).program("p") / "forecasts" / f"{name}.json"
    freeze(said(factor), path, {**FACTS, "kind": kind, "time": when, **facts})
    with LabBook(home / "labbook.sqlite") as book:
        book.put_fact("p", SEALED, read_forecast(path).hash, {})
    return path


def test_an_outcome_is_scored_in_bits_beside_the_naive_forecasts(home: Path) -> None:
    seal(home, "same-1", per_corpus={"wiki": said(1.2).to_dict(), "code": said(0.8).to_dict()})
    rows = {entry.corpus: entry for entry in entries(home)}
    outcome = (0.75 * 1.2 + 0.25 * 0.8) * loss(4e5, 8e6) / LN2
    average = rows[AVERAGE]
    assert average.outcome == pytest.approx(outcome)
    assert average.expected is not None
    assert average.error == pytest.approx(average.expected.value / outcome - 1)
    largest = average.naive["largest"].value
    assert average.gap_share == pytest.approx((average.expected.value - outcome) / (largest - outcome))
    assert average.scores["forecast"] == interval_score(average.expected, outcome)
    assert set(average.scores) == {"forecast", "largest", "line"}
    assert average.reach == pytest.approx(4)
    assert rows["wiki"].outcome == pytest.approx(1.2 * loss(4e5, 8e6) / LN2)
    assert all(entry.inside for entry in rows.values())
    data = forecasts(home).data
    assert (data["blind"], data["inside_90"], data["blind_by_corpus"], data["inside_90_by_corpus"]) == (1, 1, 2, 2)


def test_misses_rehearsals_and_open_forecasts_are_shown_and_only_blind_outcomes_count(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(home, "same-1")
    seal(home, "same-2", factor=2.0)  # another forecast of the same target, and a miss
    seal(home, "same-3", kind="rehearsal")
    seal(home, "same-4", target="f" * 64)  # not trained yet
    seal(home, "same-5", when=AFTER)  # frozen when the run had ended
    rows = entries(home)
    assert [row.kind for row in rows].count("blind") == 3
    assert [row.kind for row in rows].count("late") == 1
    assert coverage([row for row in rows if row.kind == "blind"]) == {"scored": 2, "inside_90": 1, "trunks": 1}
    assert cli._run(["forecast", "--list", "--home", str(home)]) == 0
    out = capsys.readouterr().out
    assert "of 2 blind forecasts with an outcome, 1 lie inside" in out
    for word in ("MISS", "rehearsal", "late", "not yet"):
        assert word in out


def test_an_edited_file_is_shown_as_changed_and_never_counts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = seal(home, "same-1")
    path.write_bytes(path.read_bytes().replace(b'"kind":"blind"', b'"kind":"blinD"'))
    assert cli._run(["forecast", "--list", "--home", str(home), "--json"]) == 0
    assert '"blind": 0' in capsys.readouterr().out
    (row,) = entries(home)
    assert (row.kind, row.scored) == ("changed", False)
    assert "changed after it was frozen: expected hash" in row.note
    assert cli._run(["forecast", "--list", "--home", str(home)]) == 0
    assert (
        sum(
            "note: p/same: this forecast was changed" in " ".join(text.split())
            for text in capsys.readouterr().out.splitlines()
        )
        == 1
    )


def test_a_better_forecast_sealed_afterwards_with_an_early_date_never_counts(home: Path) -> None:
    honest = seal(home, "same-1", factor=1.3)
    forged = honest.with_name("same-2.json")
    freeze(said(1.0), forged, {**FACTS, "kind": "blind", "time": EARLY})
    kinds = {entry.hash: entry.kind for entry in entries(home)}
    assert kinds == {read_forecast(honest).hash: "blind", read_forecast(forged).hash: "changed"}
    with LabBook(home / "labbook.sqlite") as book:  # nor does the program take it over when it runs again
        content = read_forecast(forged)
        keep(book, "p", "forecast", f"same-{KEY[:10]}", {"hash": content.hash, "facts": content.facts})
    assert {entry.kind for entry in entries(home)} == {"blind", "changed"}


def test_a_copy_of_a_forecast_counts_once(home: Path) -> None:
    path = seal(home, "same-1")
    path.with_name("same-copy.json").write_bytes(path.read_bytes())
    assert len(entries(home)) == 1


def test_a_home_without_the_files_reads_the_lab_book(home: Path) -> None:
    path = seal(home, "same-1", when=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(TRAINED - 9)))
    sealed = read_forecast(path)
    with LabBook(home / "labbook.sqlite") as book:
        book.put_fact(
            "p", "forecast", "same", {"hash": sealed.hash, "facts": sealed.facts, "forecast": sealed.forecast.to_dict()}
        )
    assert [row.hash for row in entries(home)] == [sealed.hash], "the same forecast is not listed twice"
    path.unlink()
    (row,) = entries(home)
    assert (row.hash, row.kind, row.scored) == (sealed.hash, "blind", True)


def test_an_empty_home_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LabBook(tmp_path / "labbook.sqlite").close()
    assert cli._run(["forecast", "--list", "--home", str(tmp_path)]) == 0
    assert "no forecast has been sealed here yet" in capsys.readouterr().out
