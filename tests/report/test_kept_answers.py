"""Answers of single commands in the report: the same figures as in the terminal, and no section where nothing was asked."""

from __future__ import annotations

import re
from contextlib import closing
from functools import partial
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from windtunnel import cli
from windtunnel.base.labbook import LabBook
from windtunnel.decay_now import FACT as AVERAGED
from windtunnel.laws.curve_fit import fit_curves
from windtunnel.manage import status
from windtunnel.program_report import write_program_report
from windtunnel.views import View

NAME, PROXY = "harbour", "harbour/proxy-0.1M-seed1"
SECTIONS = ("now",)


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


def test_where_nothing_was_asked_there_is_no_section(home_of_curves: Path) -> None:
    with LabBook(home_of_curves / "labbook.sqlite") as book:
        for row in book.runs(program=NAME, study="scaling", kind="decay"):
            book.forget_run(row["id"])  # no decay, no law of curves
    assert not set(SECTIONS) & set(page(home_of_curves, fit=True))


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
