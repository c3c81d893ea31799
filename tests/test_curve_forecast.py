"""The verb ``law curve``: sealed before the run, blind only for what was never trained, scored as a whole curve afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from windtunnel import cli
from windtunnel import desk as desk_module
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.curve_forecast import curve, study_of
from windtunnel.curve_runs import curve_of
from windtunnel.home import Home
from windtunnel.laws.sealed import read_forecast
from windtunnel.ledger import AVERAGE, entries, forecasts
from windtunnel.manage import report
from windtunnel.recipe import Recipe, load_recipe

LENGTHS = '["5120", "10240", "15360"]'


@pytest.fixture(scope="module", autouse=True)
def eager_workers() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(desk_module, "has_compiler", lambda: False)
    yield
    patch.undo()


@pytest.fixture
def recipe(tmp_path: Path, write_made_up: Callable[..., Path], tiny_recipe: Callable[..., str]) -> Recipe:
    write_made_up(tmp_path / "plain.jsonl", 300)
    (tmp_path / "tiny.toml").write_text(tiny_recipe(tokens="15360"), encoding="utf-8")
    return load_recipe(str(tmp_path / "tiny.toml"), [f"tunnel.tokens={LENGTHS}"])


def test_a_curve_is_sealed_before_its_run_and_scored_after_it(
    recipe: Recipe, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    before = curve(recipe, home, schedule="cosine", quiet=True)
    assert before.data["kind"] == "blind"
    assert (before.data["outcome"], before.data["score"]) == (None, None)
    assert not any(name.startswith("curve") for name in trained)
    (path,) = (Home(home).program("tiny") / "forecasts").glob("curve-*.json")
    sealed = read_forecast(path)
    said = sealed.facts["curve"]
    assert len(said["value"]) == len(said["low90"]) == len(said["steps"])
    assert said["steps"][-1] == 120
    proxies = study_of(LabBook(home / "labbook.sqlite", readonly=True), "tiny", recipe.mixture).proxies
    assert {p.parameters for p in proxies} == {p.parameters for p in sealed.forecast.points}

    after = curve(recipe, home, schedule="cosine", train=True, quiet=True)
    assert after.data["hash"] == sealed.hash, "the forecast is made once"
    assert trained[-1] == before.data["run"]
    score, outcome = after.data["score"], after.data["outcome"]
    with LabBook(home / "labbook.sqlite") as book:
        (row,) = book.runs(program="tiny", study="curve")
        seen = curve_of(book, row, said["stretch"], whole=True)
        assert seen is not None
        value = np.interp(seen.steps, said["steps"], said["value"])
        assert score["mean_error"] == pytest.approx(float(np.abs(value / seen.losses - 1).mean()))
        bits = {s["corpus"]: s["value"] for s in book.scores(row["id"]) if s["name"] == "bits_per_byte"}
    assert outcome / math.log(2) == pytest.approx(bits["plain"])
    entry = next(e for e in entries(home) if e.branch == before.data["run"] and e.corpus == AVERAGE)
    assert (entry.kind, entry.curve) == ("blind", score)
    assert entry.outcome == pytest.approx(bits["plain"])
    assert "whole curve: mean error" in _text(forecasts(home))
    svg = Path(after.data["figure"]).read_text()
    assert svg.count('class="trunk"') == 1
    assert "as trained" in svg
    report(home, "tiny")
    page = (Home(home).program("tiny") / "report.html").read_text()
    assert "Along the run the forecast was " in page
    assert page.count("<title>Forecast of the whole loss curve of") == 2, "for a page and for a phone"
    assert sealed.hash[:16] in page
    # A second schedule at that size is a rehearsal now: the size has been trained.
    again = curve(recipe, home, schedule="linear:50%:0.1", quiet=True)
    assert again.data["kind"] == "rehearsal"
    # One byte more and it counts no longer.
    path.write_bytes(path.read_bytes().replace(b'"blind"', b'"blinD"'))
    with pytest.raises(ArtefactError, match="changed after it was frozen"):
        curve(recipe, home, schedule="cosine", quiet=True)
    arguments = ["law", "curve", str(tmp_path / "tiny.toml"), "--home", str(home), "--schedule", "square:10%"]
    assert cli._run(arguments) == 2
    assert "--schedule: expected FORM:SHARE:FLOOR" in capsys.readouterr().err


def test_the_recipes_own_run_and_a_branch_of_the_same_schedule_score_it(
    recipe: Recipe, tmp_path: Path, trained: list[str]
) -> None:
    home = tmp_path / "home"
    own = curve(recipe, home, quiet=True)
    linear = curve(recipe, home, schedule="linear:25%:0.1", quiet=True)
    with pytest.raises(UserError, match="windtunnel run tiny trains it"):
        curve(recipe, home, train=True, quiet=True)
    grown = load_recipe(
        str(tmp_path / "tiny.toml"), [f"tunnel.tokens={LENGTHS}", 'branch.line={tokens="25%",form="linear"}']
    )
    from windtunnel.pipeline import run

    run(grown, home, until="line", quiet=True)
    rows = {e.branch: e for e in entries(home) if e.curve is not None}
    assert set(rows) == {own.data["run"], linear.data["run"]}
    for entry in rows.values():
        assert entry.kind == "blind"
        assert entry.outcome is not None
        assert entry.curve is not None
        assert entry.curve["points"] > 40, "the trunk's part of the curve is scored too"


def test_a_recipe_without_proxies_or_with_changing_batches_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a \[tunnel\]"):
        curve(recipe.model_copy(update={"tunnel": None}), tmp_path / "home")
    changing = load_recipe(str(tmp_path / "tiny.toml"), ['trunk.batch_schedule=[{after="5120",batch="256"}]'])
    with pytest.raises(UserError, match="expected one batch along the run"):
        curve(changing, tmp_path / "home")


@pytest.mark.parametrize(("wrong", "words"), [({"size": "7X"}, "--size"), ({"tokens": "many"}, "--tokens")])
def test_a_wrong_size_or_length_is_refused_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path, wrong: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        curve(recipe, tmp_path / "fresh", schedule="cosine", **wrong)
    assert not (tmp_path / "fresh").exists()


def _text(view: object) -> str:
    from rich.console import Console

    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return re.sub(r"\s+", " ", console.export_text())
