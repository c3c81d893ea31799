"""What programs of other seeds agree on: gains on held-out pairs with Student's interval, and what counts as learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.preference_study import over_seeds

ACCURACY = {
    "hard": ((0.50, 0.60), (0.52, 0.60), (0.48, 0.60)),
    "noisy": ((0.50, 0.70), (0.50, 0.45), (0.50, 0.60)),
    "easy": ((0.90, 0.99), (0.91, 0.99), (0.92, 0.99)),
    "narrow": ((0.84, 0.885), (0.84, 0.886), (0.84, 0.887)),
    "still": ((0.60, 0.61), (0.60, 0.61), (0.60, 0.61)),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    book = LabBook(Home(tmp_path).labbook)
    with book:
        for seed in range(3):
            for name, kind in (("chat", "sft"), ("aligned", "dpo")):
                run = f"p{seed}/{name}-0123456789"
                book.put_run(
                    run,
                    program=f"p{seed}",
                    kind=kind,
                    name=name,
                    status="done",
                    folder=f"runs/{name}-0123456789",
                    config={},
                )
            pairs: dict[str, Any] = {
                source: {
                    "before": {"accuracy": runs[seed][0], "count": 400},
                    "after": {"accuracy": runs[seed][1], "count": 400},
                }
                for source, runs in ACCURACY.items()
            }
            book.put_fact(f"p{seed}", "model", "aligned-0123456789", {"answering": {"preferences": pairs}})
            book.put_fact(f"p{seed}", "model", "chat-0123456789", {"answering": {}})
    book.close()
    return tmp_path


def test_gains_are_paired_by_run_with_students_interval_and_judged_by_the_stated_bar(home: Path) -> None:
    data = over_seeds(home, ["p0", "p1", "p2/aligned"]).data
    rows = {row["source"]: row for row in data["sources"]}
    for source, runs in ACCURACY.items():
        gains = [after - before for before, after in runs]
        assert rows[source]["gain"] == pytest.approx(sum(gains) / 3)
        if source != "still":
            interval = stats.t.interval(0.95, 2, loc=sum(gains) / 3, scale=stats.sem(gains))
            assert rows[source]["half"] == pytest.approx((interval[1] - interval[0]) / 2)
    assert rows["hard"]["of_error"] == pytest.approx(0.1 / 0.5)
    verdicts = {source: row["verdict"] for source, row in rows.items()}
    assert verdicts == {
        "hard": "learnt", "noisy": "not learnt", "easy": "too easy before", "narrow": "learnt", "still": "not learnt",
    }  # fmt: skip
    # What counts is also judged together: each source alike, the interval over runs of their mean.
    counted = [runs for source, runs in ACCURACY.items() if source != "easy"]
    means = [sum(runs[seed][1] - runs[seed][0] for runs in counted) / 4 for seed in range(3)]
    assert data["all"]["gain"] == pytest.approx(sum(means) / 3)
    assert data["all"]["half"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(means))
    assert (data["all"]["verdict"], data["all"]["pairs"]) == ("not learnt", 1600)


def test_one_run_has_no_interval_and_settles_nothing(home: Path) -> None:
    (row, *_) = over_seeds(home, ["p0"]).data["sources"]
    assert (row["half"], row["verdict"]) == (None, "cannot tell")
    with pytest.raises(
        UserError, match="expected a run that learnt from pairs, got 'chat'; see: windtunnel model tree"
    ):
        over_seeds(home, ["p0/chat"])
