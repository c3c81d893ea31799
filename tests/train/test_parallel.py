"""Two processes with sharded weights train what one process trains, and read each other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from windtunnel.base.artefact import read_json, read_manifest
from windtunnel.corpus.loader import Loader
from windtunnel.train.checkpoint import load_model
from windtunnel.train.folder import RESULT, checkpoint_path, steps_saved
from windtunnel.train.growth import Balance
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Stage

STEPS = 50


def start(folder: Path, stage: Stage, corpus, finish: Path | None = None) -> subprocess.Popen:
    message = {"stage": stage.to_dict(), "run": str(folder), "corpora": {"tiny": str(corpus.path)}}
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({**message, "finish": str(finish) if finish else None}), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        sys.executable,
        *launch,
        "-m",
        "windtunnel.tunnel.worker",
        "--eager",
        "--devices",
        "cpu",
        "--threads",
        "1",
    ]
    return subprocess.Popen(
        [*command, "--job", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def said(process: subprocess.Popen) -> list[dict]:
    """What the ranks said, after the process has ended well."""
    out, err = process.communicate(timeout=300)
    words = [json.loads(text) for text in out.splitlines() if text.startswith("{")]
    assert words, err[-2000:]
    return words


def train(folder: Path, stage: Stage, corpus) -> dict:
    words = said(start(folder, stage, corpus))
    assert sum("result" in word for word in words) == 1, words  # one rank speaks
    return words[-1]["result"]


def series(run: Path) -> np.ndarray:
    return np.array([values["loss"] for _, values in read_metrics(run)])


def close(run: Path, other: Path, step: int) -> None:
    """The weights of two checkpoints, whoever wrote them."""
    (a, _), (b, _) = load_model(checkpoint_path(run, step)), load_model(checkpoint_path(other, step))
    for (name, first), second in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("tied", "batch", "changes"), [pytest.param(True, 5, (), marks=pytest.mark.slow), (False, 4, ((20, 12),))]
)
def test_fifty_steps_of_two_processes_have_the_losses_of_one_which_reads_their_checkpoint(
    tmp_path, eager, make_trunk, tiny_corpus, check_noise, tied, batch, changes
):
    """A batch of 5 gives the ranks 2 and 3 rows; documents end in the rows, so that scored tokens differ by rank too.

    With the other one the batch grows to 12, three micro-batches of 2 rows on each rank.
    """
    stage = make_trunk(
        STEPS, (20, 31), batch=batch, batch_changes=changes, score=("tiny",), score_tokens=600, dynamics_every=9
    )
    stage = replace(stage, shape=replace(stage.shape, tied=tied))
    corpora = {"tiny": tiny_corpus}
    one = run_stage(stage, tmp_path / "one", corpora, Workshop(eager))
    two = train(tmp_path / "two", stage, tiny_corpus)
    a, b = series(tmp_path / "one"), series(tmp_path / "two")
    assert len(a) == len(b) == STEPS
    assert np.max(np.abs(a - b) / a) <= 1e-5
    matrix = "move/layers.0.mlp.up.weight"
    for name in ("cosine", "max", "d1", "norm/hidden", "cosine/hidden", "max/hidden", matrix):
        pairs = [[v[f"pair_{name}"] for _, v in read_metrics(tmp_path / w) if "pair_d1" in v] for w in ("one", "two")]
        assert len(pairs[0]) == 5
        np.testing.assert_allclose(*pairs, rtol=2e-2, atol=2e-3)
    assert two["scores"]["tiny"]["nats"] == pytest.approx(one["scores"]["tiny"]["nats"], rel=1e-5)
    assert two["scores"]["tiny"]["tokens"] == one["scores"]["tiny"]["tokens"]
    names = {file.name for file in checkpoint_path(tmp_path / "two", STEPS).iterdir()}
    assert {"weights-0.safetensors", "weights-1.safetensors", "optimizer-1.json"} <= names
    assert not [n for n in names if n.endswith((".pt", ".pkl", ".distcp", ".metadata"))]
    close(tmp_path / "one", tmp_path / "two", STEPS)

    if changes:
        rows = Loader(stage.plan, corpora).rows(stage.batches.sequences(31), 12)
        check_noise(tmp_path / "two", 32, rows, [[i, i + 1, i + 6, i + 7] for i in (0, 2, 4)])

    # One process reads what two wrote: the last checkpoint is hidden, so that it goes on from step 31.
    run = tmp_path / "two"
    (run / RESULT).unlink()
    checkpoint_path(run, STEPS).rename(tmp_path / "hidden")
    run_stage(stage, run, corpora, Workshop(eager))
    assert np.max(np.abs(series(run) - b) / b) <= 1e-5
    assert read_manifest(checkpoint_path(run, STEPS)).config["world"] == 1


def test_two_go_on_from_a_checkpoint_of_one_and_a_stop_is_agreed_by_both_at_one_step(
    tmp_path, eager, make_trunk, tiny_corpus
):
    stage, corpora = make_trunk(5000, save_every=6000), {"tiny": tiny_corpus}
    run_stage(stage.with_steps(3), tmp_path / "run", corpora, Workshop(eager))
    (tmp_path / "run" / RESULT).unlink()
    process = start(tmp_path / "run", stage, tiny_corpus)
    deadline = time.monotonic() + 120
    while len(list(read_metrics(tmp_path / "run"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    word = said(process)[-1]
    assert word.get("code") == 75, word
    saved = steps_saved(tmp_path / "run")
    assert saved[0] == 3
    assert len(saved) == 2
    manifest = read_manifest(checkpoint_path(tmp_path / "run", saved[1]))
    assert (manifest.config["step"], manifest.config["world"]) == (saved[1], 2)
    assert f"stopped after step {saved[1]} of 5000" in word["error"]
    run_stage(stage.with_steps(min(saved[1], 40)), tmp_path / "one", corpora, Workshop(eager))
    a, b = series(tmp_path / "one"), series(tmp_path / "run")
    assert np.max(np.abs(a - b[: len(a)]) / a) <= 1e-5


@pytest.mark.slow
def test_a_finish_ends_all_ranks_at_one_step(tmp_path, make_trunk, tiny_corpus):
    stage = make_trunk(5000, save_every=6000)
    (tmp_path / "finish.json").write_text("{}", encoding="utf-8")
    result = said(start(tmp_path / "run", stage, tiny_corpus, tmp_path / "finish.json"))[-1]["result"]
    assert result["step"] < 5000
    assert steps_saved(tmp_path / "run") == [result["step"]]
    assert read_json(tmp_path / "run" / RESULT)["step"] == result["step"]


def test_slices_of_another_world_size_never_reach_a_checkpoint(tmp_path, eager, make_trunk, tiny_corpus):
    stage = make_trunk(4)
    left = tmp_path / "run" / "checkpoints" / ".slices-4"
    left.mkdir(parents=True)
    (left / "weights-7.json").write_text("{}", encoding="utf-8")
    run_stage(stage, tmp_path / "run", {"tiny": tiny_corpus}, Workshop(eager))
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 3])
def test_experts_need_not_divide_among_processes(tmp_path, eager, make_trunk, tiny_corpus, experts):
    stage = make_trunk(6, (4,), balance=Balance())
    stage = replace(stage, shape=replace(stage.shape, experts=experts, top_k=2))
    run_stage(stage, tmp_path / "one", {"tiny": tiny_corpus}, Workshop(eager))
    train(tmp_path / "two", stage, tiny_corpus)
    np.testing.assert_allclose(series(tmp_path / "two"), series(tmp_path / "one"), atol=1e-4)
    close(tmp_path / "one", tmp_path / "two", 6)
