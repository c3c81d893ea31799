"""A forecast is blind if its corpus and size were never trained when law and intervals were fixed: read to the letter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from windtunnel.base.labbook import LabBook
from windtunnel.blindness import kind_of, kind_of_adaptation, read_all, trained_before
from windtunnel.laws.forecast import forecast, freeze
from windtunnel.laws.points import Point
from windtunnel.laws.sealed import Forecast
from windtunnel.model.shape import Shape
from windtunnel.train.stage import Stage

FACTS = {
    "runs": ["b" * 64],
    "heldout": {"tiny": {}},
    "branch": "same",
    "branch_is": "the decay",
    "batch": 128,
    "base_lr": 0.01,
}


def said(factor: float = 1.0) -> Forecast:
    points = [
        Point(n, d, factor * (0.4 + 5 * n**-0.21 + 9 * d**-0.24), f"t{n:g}")
        for n in (2e4, 5e4, 1e5)
        for d in (1e6, 2e6, 4e6)
    ]
    return forecast(points, 4e5, 8e6)


@pytest.fixture
def book(tmp_path: Path) -> LabBook:
    return LabBook(tmp_path / "labbook.sqlite")


@pytest.fixture
def put(book: LabBook) -> Callable[..., None]:
    def write(stage: Stage, status: str = "done", program: str = "other", study: str = "") -> None:
        with book:
            book.put_run(f"{program}/{stage.folder_name}", program=program, kind=stage.kind, name=stage.name, study=study,
                         status=status, folder=stage.folder_name, config=stage.to_dict())  # fmt: skip

    return write


def test_nothing_trained_is_blind_and_any_run_of_size_and_corpus_that_has_begun_is_not(
    book: LabBook, put: Callable[..., None], make_trunk: Callable[..., Stage], make_trial: Callable[..., Stage]
) -> None:
    target = make_trunk(20)
    assert kind_of(book, target, said(), []) == "blind"
    put(make_trial(12), status="waiting", study="search")
    assert kind_of(book, target, said(), []) == "blind", "what never began was not trained"
    for status in ("running", "failed", "done"):
        put(make_trial(12), status=status, study="search")
        assert kind_of(book, target, said(), []) == "rehearsal", "a trial counts as a trunk does"
    assert len(trained_before(book, target)) == 1


def test_the_size_is_n_and_the_corpus_its_content(
    book: LabBook, put: Callable[..., None], make_trunk: Callable[..., Stage]
) -> None:
    target = make_trunk(20)
    put(replace(target, corpora=(("tiny", "f" * 64),)))
    put(replace(target, shape=replace(target.shape, ff=96)))
    assert kind_of(book, target, said(), []) == "blind", "same name of another text, same width and layers of another N"
    # Another shape with as many parameters, on the same text under another name and beside another.
    other = Shape(**{**target.shape.to_dict(), "heads": 1, "kv_heads": 1, "head_dim": 32})
    assert other.body == target.shape.body
    put(replace(target, shape=other, corpora=(("renamed", target.corpora[0][1]), ("more", "e" * 64))))
    assert kind_of(book, target, said(), []) == "rehearsal"


def test_a_second_seed_is_blind_only_if_the_law_was_fixed_before_the_first_was_trained(
    book: LabBook, put: Callable[..., None], make_trunk: Callable[..., Stage], tmp_path: Path
) -> None:
    first = make_trunk(20)
    folder = tmp_path / "forecasts"
    facts = {**FACTS, "corpus": dict(first.corpora), "target": first.key}
    freeze(said(), folder / "first.json", {**facts, "kind": kind_of(book, first, said(), [])})
    (folder / "adapt-1.json").write_text("{}")  # another kind of file
    put(first)
    second = replace(first, seed=6)
    sealed = read_all(folder)
    assert [one.facts["kind"] for one in sealed] == ["blind"]
    assert kind_of(book, second, said(), sealed) == "blind", "word for word what was fixed before"
    assert kind_of(book, second, said(1.01), sealed) == "rehearsal", "fitted anew"
    elsewhere = replace(second, corpora=(("tiny", first.corpora[0][1]), ("more", "e" * 64)))
    assert kind_of(book, elsewhere, said(), sealed) == "rehearsal", "fixed for another text"


def test_an_adaptation_is_blind_while_only_its_own_short_branches_have_read_the_new_text_at_that_size(
    book: LabBook, put: Callable[..., None], make_trunk: Callable[..., Stage]
) -> None:
    parent = make_trunk(20)
    put(parent)
    target = replace(parent, name="adapted", corpora=(*parent.corpora, ("new", "f" * 64)))
    short = replace(target, name="adapt-5", steps=5)
    put(short)
    assert kind_of_adaptation(book, target, parent, [short]) == "blind"
    assert kind_of_adaptation(book, target, parent, []) == "rehearsal", "a run that the forecast does not list"
    wider = replace(target, name="wide", shape=replace(target.shape, layers=target.shape.layers + 1))
    put(wider)
    assert kind_of_adaptation(book, target, parent, [short]) == "blind", "another size"
    put(replace(target, name="trial", steps=9), study="search")
    assert kind_of_adaptation(book, target, parent, [short]) == "rehearsal"
