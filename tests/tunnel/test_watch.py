"""What a person sees of a search: trial, parameters, loss, time left, and the best trial so far."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from windtunnel.base.units import si
from windtunnel.train.stage import Muon, Start
from windtunnel.tunnel import watch
from windtunnel.tunnel.fleet import Job
from windtunnel.tunnel.watch import Screen

WORD = {"step": 4, "steps": 8, "loss": 3.25, "tokens_per_second": 41_000.0, "eta": 12.0}


@pytest.fixture
def job(tmp_path, make_trial):
    def made(name: str, rate: float = 0.01, std: float = 0.1) -> Job:
        stage = make_trial(8)
        values = {
            "optimizer": replace(stage.optimizer, learning_rate=rate),
            "parametrization": replace(stage.parametrization, init_std=std),
        }
        return Job(replace(stage, name=name, **values), tmp_path / name, {})

    return made


def scored(nats: float) -> dict:
    return {"scores": {"tiny": {"nats": nats, "bytes": 1.0, "tokens": 1}}}


@pytest.mark.parametrize("live", [False, True])
def test_each_line_has_trial_size_values_loss_and_time_left_and_the_best_trial_stays_over_rounds(
    job, monkeypatch, live
):
    monkeypatch.setattr(watch, "_PLAIN_SECONDS", -1.0)
    screen = Screen()
    out = io.StringIO()
    screen.console = Console(file=out, force_terminal=live, width=240, highlight=False)
    screen._live = live
    first = [job("trial-000"), job("trial-001", 0.0123456, 0.08), job("trial-002", 0.02)]
    with screen.task("search: trials 1–3 of 6", first):
        for one, nats in zip(first, (1.5, 1.25, math.nan), strict=True):
            screen.started(one)
            screen.progress(one, WORD)
            if screen._progress is not None:
                screen._progress.refresh()
            screen.done(one, scored(nats), "")
    second = [job("trial-003", 0.005)]
    with screen.task("search: trials 4–6 of 6", second):
        screen.started(second[0])
        screen.progress(second[0], WORD)
        if screen._progress is not None:
            screen._progress.refresh()
        screen.done(second[0], {"failed": "it diverged"}, "it diverged")
    said = out.getvalue()
    assert "trial-003 · 23.7k · lr 0.005, std 0.1" in said
    best = "best so far 1.2500 nats per byte (trial-001 · 23.7k · lr 0.0123, std 0.08)"
    for words in ("loss 3.250", "12 s left", best, "trial-003: it diverged"):
        assert words in said
    with screen.task("scaling: trunks", [job("proxy", 0.3)]):
        assert screen._best is None
        assert screen._words(job("proxy", 0.3).stage) == "proxy · 23.7k"


def test_a_line_names_what_the_trials_of_its_study_differ_in_and_nothing_else(job):
    screen = Screen(quiet=True)
    trial = job("trial-000")
    muon = replace(trial.stage, optimizer=Muon(), shape=replace(trial.stage.shape, qk_norm=True))
    with screen.task("search: trials 1–2 of 2", [trial, replace(trial, stage=muon)]):
        assert screen._words(muon).endswith("qk on, opt muon")
        assert screen._words(trial.stage).endswith("qk off, opt adamw")
        assert "lr" not in screen._words(muon)
        assert screen._words(replace(muon, kind="trunk")) == f"trial-000 · {si(muon.shape.body)}"


def test_how_far_a_stage_is_counts_its_tokens_where_its_steps_differ_in_length(job):
    screen, trial = Screen(quiet=True), job("trial-000")
    branch = replace(
        trial.stage, kind="moe", start=Start("0" * 64, 4), steps=12, batch=2, batch_changes=((6, 8), (10, 4))
    )
    one = replace(trial, stage=branch)  # 2 steps of 2 rows, 4 of 8, 2 of 4
    with screen.task("branches", [one]):
        for step, share in ((4, 0), (6, 4 / 44), (10, 36 / 44), (12, 1)):
            screen.progress(one, {**WORD, "step": step, "steps": 12})
            assert screen._done[str(one.run)] == pytest.approx(share * branch.flops)
