"""The load of experts over time: read in tokens of the branch's own, drawn for any number of experts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from windtunnel.base.labbook import LabBook
from windtunnel.report.experts import load_figure, read_loads


def book_with(path: Path, experts: int, start: dict) -> LabBook:
    """A branch of ten steps of 2 rows of 8 tokens, whose expert e got (1 + e) parts of the tokens, and a run without experts."""
    book = LabBook(path / "labbook.sqlite")
    config = {"batch": 2, "steps": 30, "plan": {"row": 8}, "start": start, "shape": {"experts": experts}}
    whole = experts * (experts + 1) / 2
    with book:
        for name in ("mixture", "plain"):
            book.put_run(f"p/{name}", program="p", kind="moe", name=name, status="done", folder=name, config=config)
        for step in range(21, 31):
            loads = {f"load_{e}": experts * (1 + e) / whole for e in range(experts)}
            values = {**loads, "load_cv": 1.0 if step < 30 else 0.25, "load_max": 2.0}
            book.put_metrics("p/mixture", [(step, key, value) for key, value in values.items()])
    return book


@pytest.mark.parametrize("experts", [2, 8, 32])
def test_loads_stand_over_the_tokens_of_the_branch_and_all_are_drawn(tmp_path, experts):
    book = book_with(tmp_path, experts, {"stage": "s", "step": 20})
    (loads,) = read_loads(book, book.runs(program="p"))
    assert loads.name == "mixture"
    assert [tokens for tokens, _ in loads.experts[0]] == [16 * i for i in range(1, 11)]
    assert sum(curve[-1][1] for curve in loads.experts) == pytest.approx(experts)
    assert loads.at_end == (0.25, 2.0)
    for width in (720, 340):
        svg = load_figure(loads, width)
        assert len(re.findall(r"<path[^>]*class=\"l\d", svg)) == experts
        assert not re.search(r"nan|inf", svg.replace("infinity", ""))
    book.close()


def test_a_fresh_branch_counts_from_nothing_and_lost_steps_are_left_out(tmp_path):
    book = book_with(tmp_path, 2, {"stage": "s", "step": 20, "fresh": True})
    with book:
        book.put_metrics("p/mixture", [(30, "load_0", math.nan)])
    (loads,) = read_loads(book, book.runs(program="p"))
    assert [tokens for tokens, _ in loads.experts[1]][-1] == 30 * 16
    assert len(loads.experts[0]) == len(loads.experts[1]) - 1
    book.close()
