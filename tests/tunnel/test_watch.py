"""What a person sees of a search: trial, parameters, loss, time left, and the best trial so far."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from windtunnel.tunnel import watch
from windtunnel.tunnel.fleet import Job
from windtunnel.tunnel.watch import Screen

WORD = {"step": 4, "steps": 8, "loss": 3.25, "tokens_per_second": 41_000.0, "eta": 12.0}


@pytest.fixture
def job(tmp_path, make_trial):
    return lambda name: Job(replace(make_trial(8), name=name), tmp_path / name, {})


def scored(nats: float) -> dict:
    return {"scores": {"tiny": {"nats": nats, "bytes": 1.0, "tokens": 1}}}


@pytest.mark.parametrize("live", [False, True])
def test_each_line_has_trial_parameters_loss_and_time_left_and_the_best_trial_stays_over_rounds(job, monkeypatch, live):
    monkeypatch.setattr(watch, "_PLAIN_SECONDS", -1.0)
    screen = Screen()
    out = io.StringIO()
    screen.console = Console(file=out, force_terminal=live, width=200, highlight=False)
    screen._live = live
    first = [job("trial-000"), job("trial-001"), job("trial-002")]
    with screen.task("search: trials 1–3 of 6", first):
        for one, nats in zip(first, (1.5, 1.25, math.nan), strict=True):
            screen.started(one)
            screen.progress(one, WORD)
            if screen._progress is not None:
                screen._progress.refresh()
            screen.done(one, scored(nats), "")
    second = [job("trial-003")]
    with screen.task("search: trials 4–6 of 6", second):
        screen.started(second[0])
        screen.progress(second[0], WORD)
        if screen._progress is not None:
            screen._progress.refresh()
        screen.done(second[0], {"failed": "it diverged"}, "it diverged")
    said = out.getvalue()
    assert "trial-003 · 23.7k" in said
    for words in ("loss 3.250", "12 s left", "best so far 1.2500 nats per byte (trial-001)", "trial-003: it diverged"):
        assert words in said
    with screen.task("scaling: trunks", [job("proxy")]):
        assert screen._best is None
