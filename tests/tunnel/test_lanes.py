"""Lanes train what one process trains, end together, and lose nothing when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from windtunnel.base.errors import Stopped
from windtunnel.corpus.loader import Loader
from windtunnel.train.checkpoint import load_model
from windtunnel.train.folder import checkpoint_path, steps_saved
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Muon
from windtunnel.tunnel.fleet import Fleet, Job

STEPS = 24


class Silent:
    def __init__(self):
        self.said = []

    def started(self, job): ...
    def progress(self, job, word): ...
    def done(self, job, result, reason): ...
    def say(self, text):
        self.said.append(text)


@pytest.fixture
def lanes(tmp_path):
    with Fleet(1, tmp_path / "workers.log", devices="cpu", eager=True, lanes=2) as fleet:
        yield fleet


@pytest.fixture
def job(tiny_corpus):
    return lambda stage, run: Job(stage, run, {"tiny": tiny_corpus.path})


def outcome(run: Path, step: int):
    files = sorted(checkpoint_path(run, step).glob("*.safetensors"))
    return list(read_metrics(run)), [(file.name, file.read_bytes()) for file in files]


def series(run: Path) -> np.ndarray:
    return np.array([values["loss"] for _, values in read_metrics(run)])


@pytest.mark.parametrize(
    ("batch", "muon"),
    [(5, False), pytest.param(4, True, marks=pytest.mark.slow)],
    ids=["unequal parts", "whole matrices for Muon"],
)
def test_two_lanes_train_what_one_process_trains_and_the_one_reads_their_checkpoint(
    tmp_path, lanes, job, make_trunk, tiny_corpus, eager, check_noise, batch, muon
):
    stage = make_trunk(STEPS, (10, 15), batch=batch, score=("tiny",), score_tokens=600)
    stage = replace(stage, optimizer=Muon()) if muon else stage
    results = lanes.run([job(stage, tmp_path / "two")], Silent())
    assert "failed" not in results[str(tmp_path / "two")], results
    one = run_stage(stage, tmp_path / "one", {"tiny": tiny_corpus}, Workshop(eager))
    a, b = series(tmp_path / "one"), series(tmp_path / "two")
    assert len(a) == len(b) == STEPS
    assert np.max(np.abs(a - b) / a) <= (1e-4 if muon else 1e-5)  # Muon makes matrices orthogonal in bf16
    (first, _), (second, _) = (load_model(checkpoint_path(tmp_path / name, 10)) for name in ("one", "two"))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3, msg=name)
    # Each lane's rows are a part of their own, though its gradient is averaged only once all parts are there.
    rows = Loader(stage.plan, {"tiny": tiny_corpus}).rows(15 * batch, batch)
    check_noise(tmp_path / "two", 16, rows, [list(range(batch // 2)), list(range(batch // 2, batch))])
    scores = results[str(tmp_path / "two")]["scores"]["tiny"]
    assert scores["nats"] == pytest.approx(one["scores"]["tiny"]["nats"], rel=1e-4 if muon else 1e-5)
    assert scores["tokens"] == one["scores"]["tiny"]["tokens"]


def test_whichever_lane_is_killed_the_run_ends_bit_for_bit_like_the_one_nobody_killed(tmp_path, lanes, job, make_trunk):
    stage = make_trunk(200, (13,), save_every=10)
    lanes.run([job(stage, tmp_path / "whole")], Silent())
    for victim in (0, 1):
        run, watcher = tmp_path / f"killed-{victim}", Silent()
        killed = []

        def kill_once(run=run, victim=victim, killed=killed) -> bool:
            if not killed and max(steps_saved(run), default=0) >= 10:
                workers = [
                    p for p in psutil.Process().children(recursive=True) if "windtunnel.tunnel.worker" in p.cmdline()
                ]
                chosen = next(p for p in workers if ("--meeting" in p.cmdline()) == bool(victim))
                killed.append(chosen.pid)
                os.kill(chosen.pid, signal.SIGKILL)
            return False

        results = lanes.run([job(stage, run)], watcher, stopping=kill_once)
        assert killed
        assert "failed" not in results[str(run)]
        assert any("trying it again" in text for text in watcher.said), watcher.said
        assert outcome(run, 200) == outcome(tmp_path / "whole", 200)


def test_a_stop_ends_all_lanes_at_one_step_and_none_outlives_the_fleet(tmp_path, job, make_trunk):
    stage, run = make_trunk(50_000, save_every=60_000), tmp_path / "run"
    with Fleet(1, tmp_path / "workers.log", devices="cpu", eager=True, lanes=2) as lanes:
        with pytest.raises(Stopped):
            lanes.run([job(stage, run)], Silent(), stopping=lambda: len(list(read_metrics(run))) >= 5)
        known = psutil.Process().children(recursive=True)
    (saved,) = steps_saved(run)
    assert saved >= 5
    _, alive = psutil.wait_procs(known, timeout=30)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("victim", [0, 1])
def test_no_lane_waits_for_one_that_ended_before_all_had_met(tmp_path, monkeypatch, victim):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "windtunnel.tunnel.worker", "--threads", "1", "--devices", "cpu", "--eager"]
    with subprocess.Popen([*command, "--lanes", "2"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as first:
        both = [psutil.Process(first.pid)]
        while len(both) < 2:
            time.sleep(0.05)
            both += [p for p in both[0].children() if "--meeting" in p.cmdline()]
        both[victim].kill()
        _, alive = psutil.wait_procs([both[1 - victim]], timeout=60)
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    if victim:
        assert not list(tmp_path.iterdir())
