"""Every plain decay of a trunk has its own forecast, sealed before the trunk's first step, and the ledger counts trunks too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.laws.sealed import read_forecast
from windtunnel.ledger import AVERAGE, entries, forecasts
from windtunnel.pipeline import run
from windtunnel.program import Program
from windtunnel.recipe import load_recipe
from windtunnel.report.page import render
from windtunnel.sealing import forecast_branches
from windtunnel.train.stage import Stage

HALF = 'branch.half={at="3072", tokens="768"}'
LATER = 'branch.third={at="1536", tokens="384"}'


@pytest.fixture(scope="module", autouse=True)
def eager_workers() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(desk_module, "has_compiler", lambda: False)
    yield
    patch.undo()


@pytest.fixture
def path(tmp_path: Path, write_made_up: Callable[..., Path], tiny_recipe: Callable[..., str]) -> Path:
    write_made_up(tmp_path / "plain.jsonl", 300)
    (tmp_path / "tiny.toml").write_text(tiny_recipe(), encoding="utf-8")
    return tmp_path / "tiny.toml"


def test_the_forecasts_of_one_trunk_are_blind_until_it_begins_and_one_that_is_asked_for_later_is_not(
    path: Path, tmp_path: Path, trained: list[str]
) -> None:
    home = tmp_path / "home"
    view = run(load_recipe(str(path), [HALF]), home, until="forecast", quiet=True)
    assert "trunk" not in trained
    assert set(view.data["others"]) == {"half"}
    assert {e.branch: (e.kind, e.outcome) for e in entries(home)} == {"same": ("blind", None), "half": ("blind", None)}
    done = run(load_recipe(str(path), [HALF]), home, quiet=True)
    rows = {e.branch: e for e in entries(home) if e.corpus == AVERAGE}
    assert {name: row.tokens for name, row in rows.items()} == {"same": 7680, "half": 3840}
    assert all(row.kind == "blind" and row.scored for row in rows.values())
    assert len({row.trunk for row in rows.values()}) == 1
    data = forecasts(home).data
    assert (data["blind"], data["blind_trunks"]) == (2, 1)
    assert any("they are about 1 trunk, whose branches err together" in str(part) for part in forecasts(home).parts)
    with LabBook(Home(home).labbook, readonly=True) as book:
        keys = {Stage.from_dict(row["config"]).key: row for row in book.runs(program="tiny", study="scaling")}
        for file in (Home(home).program("tiny") / "forecasts").glob("*.json"):
            listed = read_forecast(file).facts["runs"]
            assert sorted(listed) == sorted(keys), "the trunks and every branch whose loss became a point"
        under = {row["name"]: row["forecast"] for row in book.runs(program="tiny", study="")}
        hashes = {name: row.hash for name, row in rows.items()}
        assert under == {"trunk": hashes["same"], **hashes}, (
            "each branch under its own, the trunk under the longest run's"
        )
        outcomes = book.facts("tiny", "outcome").values()
        assert {one["forecast"] for one in outcomes} == set(hashes.values())
        html = render(book, "tiny")
        assert html.index(hashes["same"][:16]) < html.index(hashes["half"][:16]), (
            "the longest run's is the page's first"
        )
    assert done.data["outcome"]["forecast"] == hashes["same"]
    page = (Home(home).program("tiny") / "report.html").read_text()
    assert "Every forecast of this home" in page
    assert "Of 2 blind forecasts with an outcome" in page
    assert "<td>tiny/half</td><td>blind</td>" in page
    # The size has been trained by now.
    run(load_recipe(str(path), [HALF, LATER]), home, until="forecast", quiet=True)
    assert next(e for e in entries(home) if e.branch == "third").kind == "rehearsal"


def test_only_decays_by_the_rule_of_the_proxies_are_foretold(path: Path) -> None:
    others = [
        'branch.linear={tokens="20%", form="linear"}',
        'branch.short={tokens="10%"}',
        'branch.low={tokens="20%", floor=0.01}',
        'branch.mixed={tokens="20%", mixture={plain=2}}',
    ]
    program = Program(load_recipe(str(path), [*others, HALF]))
    assert forecast_branches(program) == ["same", "half"]


def test_proxies_decay_as_a_first_branch_that_ends_early_does(path: Path) -> None:
    path.write_text(
        path.read_text().replace("[branch.same]", '[branch.early]\nat = "3072"\ntokens = "768"\n[branch.same]')
    )
    program = Program(load_recipe(str(path)))
    assert program.decay().share == pytest.approx(0.2)
    assert forecast_branches(program) == ["same", "early"]


def test_a_share_that_was_rounded_in_a_short_branch_is_still_that_of_a_long_one(path: Path) -> None:
    """49 of 244 steps are 20.08 %: of 977 steps that is 1.2 steps more than the 195 that a fifth has."""
    path.write_text(
        path.read_text()
        .replace("[branch.same]", '[branch.early]\nat = "24960"\ntokens = "6272"\n[branch.same]')
        .replace('tokens = "7680"', 'tokens = "125056"')
    )
    program = Program(load_recipe(str(path)))
    steps = {name: (program.branch(name).own_steps, program.branch(name).steps) for name in ("early", "same")}
    assert steps == {"early": (49, 244), "same": (195, 977)}
    assert forecast_branches(program) == ["same", "early"]


def test_the_share_of_a_short_branch_is_taken_as_written_not_as_its_steps_round_it(path: Path) -> None:
    """Of 122 steps a fifth is 24, 19.7 %; of 488 it is 98, 20.1 %, 2 steps more than the rounded share would give."""
    path.write_text(
        path.read_text()
        .replace("[branch.same]", '[branch.early]\nat = "12500"\ntokens = "3125"\n[branch.same]')
        .replace('tokens = "7680"', 'tokens = "62500"')
    )
    program = Program(load_recipe(str(path)))
    steps = {name: (program.branch(name).own_steps, program.branch(name).steps) for name in ("early", "same")}
    assert steps == {"early": (24, 122), "same": (98, 488)}
    assert program.decay().share == 0.2
    assert forecast_branches(program) == ["same", "early"]
