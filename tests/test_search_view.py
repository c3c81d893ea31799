"""What a search says of itself when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from windtunnel.base.artefact import write_json
from windtunnel.base.errors import ArtefactError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.program import Program
from windtunnel.recipe import load_recipe
from windtunnel.search_view import search_view
from windtunnel.tunnel.space import DEFAULT_SPACE, to_dicts

CHOICES = {"learning_rate": 0.02, "init_std": 0.1, "scale_emb": 12.0, "scale_depth": 1.4}


def shown(home: Path, **changes: object) -> str:
    program = Program(load_recipe("quickstart"))
    losses = [1.9, 1.7, None, 1.8]
    fact = {
        "choices": CHOICES, "edges": ["scale_emb (high)"], "size": "0.02M", "space": to_dicts(DEFAULT_SPACE),
        "trials": [{"number": i, "loss": loss, **CHOICES} for i, loss in enumerate(losses)],
        "gap": {"value": 0.011, "high": 0.02, "noise": 0.004, "more": 57},
        "check": {"size": "0.1M", "rates": [0.01, 0.02, 0.04], "losses": [1.71, 1.69, None], "carries_over": True},
        **changes,
    }  # fmt: skip
    write_json(Home(home).search("quickstart", program.search_key), fact)
    console = Console(width=200, record=True)
    with LabBook(Home(home).labbook) as book:
        book.put_fact("quickstart", "target", "cost", {"flops": 4e12, "tokens": 1})
        for i, study in enumerate(("search", "search", "check", "scaling")):
            book.put_run(f"quickstart/{i}", program="quickstart", kind="trial", name=study, study=study, status="done", folder=str(i),
                         config={"batch": 4, "steps": 10, "plan": {"row": 32}}, tokens=1280, flops=1e11, seconds=2.0)  # fmt: skip
    console.print(search_view(Home(home), book, program))
    book.close()
    return console.export_text()


def test_the_best_trials_come_first_and_choice_gap_edge_and_check_are_said(tmp_path):
    text = shown(tmp_path)
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines if line.strip()[:1].isdigit()] == [
        ["2", "1.7000"],
        ["4", "1.8000"],
        ["1", "1.9000"],
    ]
    assert "4 trials on 0.02M, 1 diverged, failed or given up" in text
    assert "chosen: learning_rate 0.02, init_std 0.1, scale_emb 12, scale_depth 1.4" in text
    assert "on the edge of the space: scale_emb (high)" in text
    assert (
        "left to find in 4 axes: 0.011 nats per byte, 0.02 at most (90 %); seed noise 0.004; about 57 more trials"
        in text
    )
    assert (
        "the search with its check: 3 runs, 3.84k tokens, 300B FLOPs, 6.0 s of training, 7.5 % of the target run"
        in text
    )
    assert "0.01: 1.7100, 0.02: 1.6900, 0.04: diverged; the chosen one is best there too" in text
    assert lines[-1] == "windtunnel report quickstart draws the loss over each parameter"


def test_what_is_not_known_is_left_out(tmp_path):
    text = shown(tmp_path, edges=[], gap=None, check={})
    assert "left to find" not in text
    assert "edge" not in text
    assert "best there" not in text


def test_without_a_search_there_is_no_record(tmp_path):
    with pytest.raises(ArtefactError):
        search_view(Home(tmp_path), LabBook(tmp_path / "labbook.sqlite"), Program(load_recipe("quickstart")))
