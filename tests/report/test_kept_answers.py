"""Answers of single commands in the report: the same figures as in the terminal, and no section where nothing was asked."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from windtunnel import cli
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.decay_now import FACT as AVERAGED
from windtunnel.decisions import decide_between
from windtunnel.home import FACTS, Home
from windtunnel.laws.curve_fit import fit_curves
from windtunnel.manage import status
from windtunnel.pretrain.config import BranchConfig
from windtunnel.program_report import write_program_report
from windtunnel.report.decisions import read_decisions
from windtunnel.schedule_design import schedule
from windtunnel.views import View

NAME, PROXY = "harbour", "harbour/proxy-0.1M-seed1"
Add = Callable[..., None]
SECTIONS = ("schedule", "now", "decisions")


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def terminal(view: View) -> str:
    console = Console(width=500)
    with console.capture() as out:
        for part in view.parts:
            console.print(part)
    return words(out.get())


@pytest.fixture(autouse=True)
def _quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form of law and few resampled fits: these tests compare texts."""
    quick = partial(fit_curves, kernels=("exponential",), draws=2)
    for module in ("schedule_design", "decay_now"):
        monkeypatch.setattr(f"windtunnel.{module}.fit_curves", lambda curves, *, unit, **_: quick(curves, unit=unit))


def page(home: Path, share: bool = False, program: str = NAME, fit: bool = False) -> dict[str, str]:
    """The sections of a fresh report as a reader sees their words, figures too."""
    with closing(LabBook(home / "labbook.sqlite", readonly=True)) as book:
        path = write_program_report(book, home, program, home / "page.html", share=share, fit=fit)
    html = path.read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', html, re.DOTALL)
    return {name: words(unescape(re.sub(r"<[^>]*>", " ", body))) for name, body in sections}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"[+−]?\d[\d,]*\.\d+", text))


def noisy(level: float, seeds: range, sd: float = 0.002) -> dict[int, float]:
    return {seed: level * math.exp(sd * np.random.default_rng([seed, round(1000 * level)]).normal()) for seed in seeds}


def test_where_nothing_was_asked_there_is_no_section(home_of_curves: Path) -> None:
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        for row in book.runs(program=NAME, study="scaling", kind="decay"):
            book.forget_run(row["id"])  # no decay, no law of curves
    assert not set(SECTIONS) & set(page(home_of_curves, fit=True))


def test_a_decision_shows_what_the_terminal_said(home_of_curves: Path, add_arm: Add) -> None:
    add_arm("a", noisy(1.500, range(2), 0.004))
    add_arm("b", noisy(1.507, range(2), 0.004))
    first = terminal(decide_between(home_of_curves, "a-0", "b-0", least=0.002))
    add_arm("a", noisy(1.500, range(2, 9), 0.004))
    add_arm("b", noisy(1.507, range(2, 8), 0.004))
    said = terminal(decide_between(home_of_curves, "b-1", "a-1"))
    text = page(home_of_curves)["decisions"]
    assert "harbour/b-1 against harbour/a-1" in text, "as it was asked last"
    for one in re.findall(
        r"on wiki.*?over all looks|seed noise.*?\)|look \d, .*?%\]|\w+ is better.*?\d|with \d pairs.*?five", said
    ):
        assert one in text, one
    assert numbers(said) <= numbers(text)
    assert "look 1, 2 pairs" in text
    signs = [re.findall(r"look 1, 2 pairs: B − A = ([+−])", one) for one in (first, text)]
    assert sorted(signs) == [["+"], ["−"]], "B is the other arm now"


def test_a_decision_stays_as_it_was_whatever_is_trained_later(home_of_curves: Path, add_arm: Add) -> None:
    add_arm("a", noisy(1.50, range(4)))
    add_arm("b", noisy(1.56, range(4)))
    before = terminal(decide_between(home_of_curves, "a-0", "b-0"))
    shown = page(home_of_curves)["decisions"]
    add_arm("a", noisy(1.80, range(4, 12)))
    after = terminal(decide_between(home_of_curves, "a-0", "b-0"))
    assert after == f"{before} trained since and no part of this look: 8 of A, 0 of B"
    assert page(home_of_curves)["decisions"] == shown


def test_a_decision_of_an_earlier_version_is_completed_when_it_is_asked_again(
    home_of_curves: Path, add_arm: Add
) -> None:
    add_arm("a", noisy(1.50, range(4)))
    add_arm("b", noisy(1.56, range(4)))
    said = terminal(decide_between(home_of_curves, "a-0", "b-0"))
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        ((name, fact),) = book.facts(NAME, "decision").items()
        old = {key: fact[key] for key in ("least", "alpha", "fixed", "decided")}
        looks = [{key: value for key, value in look.items() if key != "noise"} for look in fact["looks"]]
        book.put_fact(NAME, "decision", name, {**old, "looks": looks})
    assert "decisions" not in page(home_of_curves)
    assert terminal(decide_between(home_of_curves, "a-0", "b-0")) == said
    assert "A is better: harbour/a-0" in page(home_of_curves)["decisions"]


def test_a_decision_between_programs_stands_in_both_and_in_none_to_share(home_of_curves: Path, add_arm: Add) -> None:
    add_arm("a", noisy(1.50, range(4)))
    add_arm("b", noisy(1.56, range(4)), program="other")
    decide_between(home_of_curves, "a-0", "b-0")
    assert "other/b-0" in page(home_of_curves)["decisions"]
    assert "other/b-0" in page(home_of_curves, program="other")["decisions"]
    assert "decisions" not in page(home_of_curves, share=True)
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        assert not read_decisions(book, "third")


def test_a_chosen_decay_shows_what_the_terminal_said_and_is_kept_for_a_rebuild(home_of_curves: Path) -> None:
    view = schedule(home_of_curves, [PROXY], "3000 steps")
    text, said = page(home_of_curves)["schedule"], terminal(view)
    for one in re.findall(
        r"decay for.*?rate \S+|best by the law.*?peak|expected gain.*?\)|shares that.*?to \d+ %|by form.*?note", said
    ):
        assert one.removesuffix(" note") in text, one
    assert numbers(said) <= numbers(text)
    advice = re.search(r"take it: (.*?floor = \S+)", said)
    assert advice
    assert advice[0] in text
    BranchConfig.model_validate(tomllib.loads(f"it = {{{advice[1]}}}")["it"])
    kept = [row for row in read_json(Home(home_of_curves).program(NAME) / FACTS) if row[0] == "design"]
    assert len(kept) == 1
    assert terminal(schedule(home_of_curves, [PROXY], "3000 steps")) == said
    schedule(home_of_curves, [PROXY], "3000 steps", against="cosine:20%:0.1")
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        assert len(book.facts(NAME, "design")) == 2, "another question has an answer of its own"


def test_a_home_that_cannot_be_written_still_gets_its_answer(
    home_of_curves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("labbook.sqlite", "the disk is full")

    monkeypatch.setattr("windtunnel.schedule_design.keep_fact", full)
    said = terminal(schedule(home_of_curves, [PROXY], "3000 steps"))
    assert "best by the law" in said
    assert "not kept for the report: labbook.sqlite: the disk is full" in said
    assert "schedule" not in page(home_of_curves)


def test_a_decay_now_shows_what_status_says(home_of_curves: Path) -> None:
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        (trunk,) = book.runs(program=NAME, study="", kind="trunk")
        averaged = {
            "step": 2500,
            "steps": [2000, 2500],
            "newest": 2.1927,
            "averages": {"2": 2.1573},
            "best": 2,
            "drop": -0.0161,
        }
        book.put_fact(NAME, AVERAGED, Path(trunk["folder"]).name, averaged)
    text = page(home_of_curves, fit=True)["now"]
    said = [
        str(part).strip()
        for part in status(home_of_curves).parts
        if "decayed now" in str(part) or "mean of" in str(part)
    ]
    assert len(said) == 2
    for one in said:
        assert numbers(one) <= numbers(text)
        what, gives, after, change = re.fullmatch(r"(.*?): (.*) after (.*), (.*)", one).groups()  # type: ignore[union-attr]
        assert f"{what} {gives} {after} {change}" in text
    assert "note: the trunk is" in text


def test_the_report_at_the_end_of_a_run_fits_no_law_that_is_not_kept(home_of_curves: Path) -> None:
    assert "now" not in page(home_of_curves)
    status(home_of_curves)
    assert "decayed now" in page(home_of_curves)["now"]
    assert cli._run(["report", NAME, "--home", str(home_of_curves)]) == 0
