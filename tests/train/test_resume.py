"""Kill -9 at any moment and run again: the loss series, the weights and the scores are those of the run nobody killed.

Children are forked from a parent that has compiled the step once; a few real processes are started from nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from windtunnel.base.artefact import read_json
from windtunnel.base.runtime import Runtime, has_compiler, prepare
from windtunnel.train import metrics
from windtunnel.train.folder import RESULT, checkpoint_path, steps_saved
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Stage

STEPS, EVERY = 40, 4
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    """Compiled where there is a compiler, on one thread: a process that has started no thread pool can be forked."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    runtime = Runtime(threads=1, compiled=has_compiler())
    prepare(runtime)
    return Workshop(runtime)


@pytest.fixture(autouse=True)
def flush_each_step(monkeypatch) -> None:
    """Every step's metrics are on disk when the kill comes, so that replayed steps meet their earlier lines."""
    monkeypatch.setattr(metrics, "_FLUSH_SECONDS", -1.0)


@pytest.fixture
def stage(make_trunk) -> Stage:
    return make_trunk(STEPS, (13,), save_every=EVERY, score=("tiny",), score_tokens=600)


def outcome(run: Path, step: int = STEPS) -> tuple[Any, ...]:
    """All that must agree: the series, the bytes of weights and moments, the scores."""
    files = sorted(checkpoint_path(run, step).glob("*.safetensors"))
    result = read_json(run / RESULT)
    kept = {name: result[name] for name in ("step", "tokens", "skipped", "scores", "loss", "flops")}
    return list(read_metrics(run)), [file.read_bytes() for file in files], kept


@pytest.fixture(scope="module")
def reference(workshop) -> dict[str, Any]:
    return {}


def uninterrupted(reference: dict[str, Any], workshop: Workshop, stage: Stage, corpora: dict[str, Any], folder: Path):
    """The run that nobody killed, and how long it takes."""
    if not reference:
        run_stage(stage, folder / "warm", corpora, workshop)
        begun = time.monotonic()
        run_stage(stage, folder / "whole", corpora, workshop)
        reference.update(seconds=time.monotonic() - begun, outcome=outcome(folder / "whole"))
    return reference["outcome"], reference["seconds"]


def forked(work: Callable[[], None], *, after: float | None = None) -> int:
    """Runs ``work`` in a forked child, killed ``after`` seconds if that is given; returns its exit code (−9: killed)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_inside_a_save(number: int, calls: int) -> None:
    """Arms this process to die at the ``calls``-th file-system call of its ``number``-th save."""
    from windtunnel.train import loop

    real, saves, count = loop.save, [0], [0]

    def save(*arguments, **options):
        saves[0] += 1
        if saves[0] != number:
            return real(*arguments, **options)
        for name in ("fsync", "replace", "rename", "mkdir", "open"):
            setattr(os, name, wrap(getattr(os, name)))
        real(*arguments, **options)
        return os.kill(os.getpid(), signal.SIGKILL)  # just after it, if it has fewer calls

    def wrap(call):
        def counted(*arguments, **options):
            count[0] += 1
            if count[0] == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    loop.save = save


def test_killed_at_random_moments_and_inside_saves_a_run_ends_bit_for_bit_like_the_one_nobody_killed(
    tmp_path, workshop, reference, stage, tiny_corpus
):
    corpora, draw, kills, inside = {"tiny": tiny_corpus}, random.Random(20), 0, 0
    expected, seconds = uninterrupted(reference, workshop, stage, corpora, tmp_path)
    case = 0
    # A kill that comes after the end is none: how many there are is a matter of luck and load, so go on until enough hit.
    while kills < 20 or inside < 5:
        run, case = tmp_path / f"case-{case}", case + 1
        assert case <= 60, f"only {kills} kills hit a running process, {inside} of them inside a save"

        def work(run=run):
            run_stage(stage, run, corpora, workshop)

        def work_and_die(run=run, save=draw.randint(1, 5), calls=draw.randint(1, 14)):
            kill_inside_a_save(save, calls)
            run_stage(stage, run, corpora, workshop)

        for attempt in range(2):
            if (case + attempt) % 2:
                code = forked(work_and_die)
                inside += code == -signal.SIGKILL
            else:
                code = forked(work, after=draw.uniform(0.02, 0.9) * seconds)
            kills += code == -signal.SIGKILL
        assert forked(work) == 0
        assert outcome(run) == expected, case
        assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


def test_two_and_more_resumes_in_one_run_also_at_its_edges(tmp_path, workshop, reference, stage, tiny_corpus):
    """After the first and the last step, twice between the same two checkpoints, and at the end of warmup."""
    corpora = {"tiny": tiny_corpus}
    expected, _ = uninterrupted(reference, workshop, stage, corpora, tmp_path)

    def until(step: int) -> Callable[[], None]:
        def work() -> None:
            from windtunnel.train import loop

            real, count = loop.train_step, [max(steps_saved(tmp_path / "run"), default=0)]

            def counted(*arguments, **options):
                report = real(*arguments, **options)
                count[0] += 1
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return report

            loop.train_step = counted
            run_stage(stage, tmp_path / "run", corpora, workshop)

        return work

    for step in (1, 2, 3, 6, 7, 7, 13, 14, 38, STEPS):
        assert forked(until(step)) == -signal.SIGKILL
    assert forked(until(STEPS + 1)) == 0
    assert outcome(tmp_path / "run") == expected


def test_a_result_that_is_there_is_taken_and_one_that_was_lost_is_made_again_without_training(
    tmp_path, workshop, reference, stage, tiny_corpus, monkeypatch
):
    corpora = {"tiny": tiny_corpus}
    expected, _ = uninterrupted(reference, workshop, stage, corpora, tmp_path)
    run_stage(stage, tmp_path / "run", corpora, workshop)
    (tmp_path / "run" / RESULT).unlink()
    from windtunnel.train import loop

    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("trained again"))
    run_stage(stage, tmp_path / "run", corpora, workshop)
    assert outcome(tmp_path / "run") == expected


def job_file(folder: Path, stage: Stage, corpus) -> Path:
    message = {"stage": stage.to_dict(), "run": str(folder / "run"), "corpora": {"tiny": str(corpus.path)}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(message), encoding="utf-8")
    return folder / "job.json"


def worker(job: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "windtunnel.tunnel.worker", *options, "--job", str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_three_real_processes_killed_and_started_again_end_like_one_that_nobody_killed(
    tmp_path, make_trunk, tiny_corpus, threads
):
    stage = make_trunk(120, (13,), save_every=10, score=("tiny",), score_tokens=600)
    options, draw = ("--threads", str(threads)), random.Random(threads)
    assert worker(job_file(tmp_path / "whole", stage, tiny_corpus), *options).wait() == 0
    job = job_file(tmp_path / "killed", stage, tiny_corpus)
    for kill in range(3):
        process = worker(job, *options)
        wanted = 20 + 30 * kill
        while max(steps_saved(tmp_path / "killed" / "run"), default=0) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert worker(job, *options).wait() == 0
    assert outcome(tmp_path / "killed" / "run", 120) == outcome(tmp_path / "whole" / "run", 120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_stops_a_real_process_after_the_running_step_with_a_checkpoint_and_the_next_one_goes_on(
    tmp_path, make_trunk, tiny_corpus, number, eager
):
    stage = make_trunk(2000, save_every=5000)
    process = worker(job_file(tmp_path, stage, tiny_corpus), "--eager", "--threads", "1")
    assert process.stdout is not None
    assert "progress" in json.loads(process.stdout.readline())
    process.send_signal(number)
    *_, word = [json.loads(text) for text in process.stdout]
    assert process.wait() == 0
    saved = steps_saved(tmp_path / "run")
    assert word["code"] == 75
    assert word["error"].startswith(
        f"trunk: stopped after step {saved[-1]} of 2000; a checkpoint of step {saved[-1]} is saved"
    )
    assert [step for step, _ in read_metrics(tmp_path / "run")] == list(range(1, saved[-1] + 1))
    shorter = stage.with_steps(saved[-1] + 3)
    run_stage(shorter, tmp_path / "run", {"tiny": tiny_corpus}, Workshop(eager))
    run_stage(shorter, tmp_path / "whole", {"tiny": tiny_corpus}, Workshop(eager))
    assert list(read_metrics(tmp_path / "run")) == list(read_metrics(tmp_path / "whole"))
