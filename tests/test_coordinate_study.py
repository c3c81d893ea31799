"""The coordinate check as a command: real data and models, a figure, JSON, and a fact in the lab book."""

from __future__ import annotations

import re
import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from windtunnel import coordinate_study
from windtunnel.base.artefact import read_json
from windtunnel.base.devices import Crew
from windtunnel.base.errors import Stopped, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.coordinate_study import coordinates
from windtunnel.finishing import VERBS
from windtunnel.home import Home
from windtunnel.recipe import load_recipe
from windtunnel.report.cost import read_cost
from windtunnel.report.page import render

RECIPE = """
name = "tiny"
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.2M"
row = 32
[trunk]
tokens = "7680"
batch = "128"
"""


@pytest.fixture
def quick(monkeypatch):
    """In this process and with fewer steps: a process of its own loads torch for longer than this trains."""
    monkeypatch.setattr(coordinate_study, "finishing", lambda verb, **job: VERBS[verb](job))
    monkeypatch.setattr(coordinate_study, "STEPS", (0, 1, 2))
    monkeypatch.setattr(coordinate_study, "SEEDS", (0, 1))


def test_a_branch_of_experts_is_checked_beside_the_trunk_as_it_is_trained(tmp_path, write_made_up, quick, monkeypatch):
    monkeypatch.setattr(coordinate_study, "SEEDS", (0,))
    monkeypatch.setattr(coordinate_study, "STEPS", (0, 1))
    write_made_up(tmp_path / "plain.jsonl", 300)
    branch = '[branch.wide]\nkind = "moe"\ntokens = "20%"\nexperts = { count = 3, top_k = 2, bias = 0.01 }\n'
    (tmp_path / "tiny.toml").write_text(RECIPE + branch, encoding="utf-8")
    view = coordinates(load_recipe(tmp_path / "tiny.toml"), tmp_path / "home", quiet=True)
    kinds = ("tied", "untied", "2 of 3 experts, tied", "2 of 3 experts, untied")
    assert list(view.data["checks"]) == [f"mup, {kind}" for kind in kinds]
    experts = view.data["checks"]["mup, 2 of 3 experts, tied"]
    assert "layers.0.mlp.router update" in experts["quantities"]
    assert all(check["bars"] == coordinate_study.BARS for check in view.data["checks"].values())
    shown = Console(width=200, record=True, file=StringIO())
    shown.print(*view.parts)
    assert "sizes at init" in (text := shown.export_text())
    assert "mup, 2 of 3 experts, untied" in text


def test_a_check_that_has_ended_is_not_made_again_and_its_cost_is_booked_once(
    tmp_path, write_made_up, quick, monkeypatch, capsys
):
    monkeypatch.setattr(coordinate_study, "SEEDS", (0,))
    monkeypatch.setattr(coordinate_study, "STEPS", (0, 1))
    write_made_up(tmp_path / "plain.jsonl", 300)
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    made: list[str] = []

    def two_then_stop(verb, **job):
        if len(made) == 2:
            raise Stopped("stopped; the same command continues")
        made.append(verb)
        return VERBS[verb](job)

    def call() -> dict:
        recipe = load_recipe(tmp_path / "tiny.toml")
        return coordinates(recipe, tmp_path / "home", quiet=False, crew=Crew("1")).data

    def booked() -> int:
        book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
        runs = (book.fact("tiny", "cost", "coordinates") or {"runs": 0})["runs"]
        book.close()
        return runs

    monkeypatch.setattr(coordinate_study, "finishing", two_then_stop)
    with pytest.raises(Stopped):
        call()
    assert re.search(r"coordinates: [34]\d %, about", capsys.readouterr().err), "experts take more than half of it"
    assert booked() == 2 * 4
    monkeypatch.setattr(coordinate_study, "finishing", lambda verb, **job: made.append(verb) or VERBS[verb](job))
    data = call()
    assert "coordinates: 2 of 4 checks were made before" in capsys.readouterr().err
    assert (len(made), data["cost"]["runs"], booked()) == (4, 16, 16)
    assert (call()["checks"], len(made), booked()) == (data["checks"], 4, 16)
    other = load_recipe(tmp_path / "tiny.toml", ["optimizer.lr=0.02"])
    assert coordinates(other, tmp_path / "home", quiet=True).data["checks"] != data["checks"], (
        "another rate, other checks"
    )
    assert len(made) == 8


def test_a_check_that_fails_leaves_those_that_run_beside_it_and_names_the_reason(
    tmp_path, write_made_up, quick, monkeypatch
):
    monkeypatch.setattr(coordinate_study, "SEEDS", (0,))
    monkeypatch.setattr(coordinate_study, "STEPS", (0, 1))
    write_made_up(tmp_path / "plain.jsonl", 300)
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    lock, made, both = threading.Lock(), [], threading.Barrier(2)

    def one_fails(verb, **job):
        with lock:
            made.append(verb)
            mine = len(made)
        both.wait(60)
        if mine == 1:
            raise WindtunnelError("a check failed")
        time.sleep(0.5)  # the other one has been refused by now
        return VERBS[verb](job)

    monkeypatch.setattr(coordinate_study, "finishing", one_fails)
    with pytest.raises(WindtunnelError, match="a check failed"):
        coordinates(load_recipe(tmp_path / "tiny.toml"), tmp_path / "home", quiet=True, crew=Crew("2"))
    assert len(made) == 2, "nothing begins after a failure"
    assert len(list((tmp_path / "home" / "programs" / "tiny" / "studies").glob("coordinates-*.json"))) == 1


def test_the_check_of_a_recipe_is_drawn_recorded_and_reported_dense_and_with_experts_tied_and_untied(
    tmp_path, write_made_up, quick
):
    write_made_up(tmp_path / "plain.jsonl", 300)
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    view = coordinates(load_recipe(tmp_path / "tiny.toml"), tmp_path / "home", quiet=True)
    checks = view.data["checks"]
    assert list(checks) == ["mup, tied", "mup, untied", "mup, 2 of 4 experts, tied", "mup, 2 of 4 experts, untied"]
    for check in checks.values():
        assert check["widths"] == [32, 64, 128, 256]
        assert check["steps"] == [0, 1, 2]
        stream = [abs(s["value"]) for s in check["slopes"] if s["kind"] == "stream" and s["step"]]
        assert max(stream) < 0.3  # a missing multiplier shows as 0.6 and more
    studies = Home(tmp_path / "home").program("tiny") / "studies"
    assert read_json(studies / "coordinates.json") == checks
    assert (studies / "coordinates.svg").read_text(encoding="utf-8").startswith("<svg xmlns=")
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    assert book.fact("tiny", "coordinates", "width") == checks
    # Two seeds of four widths, dense and with experts, tied and untied, two steps of 128 tokens each.
    assert (view.data["cost"]["runs"], view.data["cost"]["tokens"]) == (32, 32 * 2 * 128)
    cost = read_cost(book, "tiny")
    assert cost is not None
    assert [(part.name, part.tokens, part.tunnel) for part in cost.parts] == [("Coordinate check", 32 * 2 * 128, True)]
    assert cost.share(cost.parts[0]) == pytest.approx(view.data["cost"]["flops"] / view.data["cost"]["target"])
    page = render(book, "tiny")
    book.close()
    section = page.split('<section id="coordinates">')[1].split("</section>")[0]
    for name, check in checks.items():
        failed = len(check["failures"])
        verdict = f"{failed} too steep" if failed else "flat"
        assert f"<td>{name}</td>" in section
        assert section.count(f">{name}: {verdict}</text>") == 2  # for a page and for a phone
