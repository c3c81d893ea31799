"""The fleet loses no job: dead and silent workers are replaced, and no worker outlives its driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from windtunnel.base.artefact import write_json
from windtunnel.base.devices import gpu_numbers
from windtunnel.base.errors import Stopped, WindtunnelError
from windtunnel.train.folder import checkpoint_path, steps_saved
from windtunnel.tunnel import fleet as fleet_module
from windtunnel.tunnel.fleet import Fleet, Job

STUB = """
import json, os, sys, threading, time
from pathlib import Path
stop = threading.Event()
jobs, ready = [], threading.Semaphore(0)

def read():
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            stop.set()
        else:
            jobs.append(message)
            ready.release()
    os._exit(0)

def say(**message):
    print(json.dumps(message), flush=True)

threading.Thread(target=read, daemon=True).start()
say(ready=True)
while True:
    ready.acquire()
    job = jobs.pop(0)
    run, what = Path(job["run"]), job["stage"]["name"].split(".")[0]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "tries").open("a") as tries:
        tries.write(f"{os.getpid()}\\n")
    number = len((run / "tries").read_text().splitlines())
    stop.clear()
    if what == "die" or (what == "die-once" and number == 1):
        os._exit(7)
    if what == "error" or (what == "error-once" and number == 1):
        say(error="OSError: a passing trouble", code=1)
    elif what == "diverge":
        say(error="it diverged at step 7", code=4)
    elif what == "full":
        say(error="run: the disk or quota is full", code=2)
    elif what == "hang":
        time.sleep(1000)
    elif what == "stopped-alone" and number == 1:
        say(error="stopped after step 3", code=75)
    elif what == "slow" and stop.wait(60):
        say(error="stopped after step 5", code=75)
    else:
        if what == "garbage":
            print("a library prints this", flush=True)
        if what == "trunk":
            say(progress={"step": 1, "steps": 2, "loss": 1.0, "tokens_per_second": 1.0, "eta": 0.0})
            folder = run / "checkpoints" / "step-000000004"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            time.sleep(0.4)
        say(result={"step": job["stage"]["steps"], "pid": os.getpid(), "at": time.monotonic()}, wall=0.1)
"""


class Notes:
    """A watcher that only writes down."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.order: list[tuple[str, str]] = []
        self.reasons: dict[str, str] = {}

    def started(self, job: Job) -> None:
        self.order.append(("started", job.stage.name))

    def progress(self, job: Job, word) -> None:
        pass

    def done(self, job: Job, result, reason: str) -> None:
        self.order.append(("done", job.stage.name))
        self.reasons[job.stage.name] = reason

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Fleets start a small script in place of workers."""
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    real = subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-S", str(tmp_path / "stub.py")], **options)

    monkeypatch.setattr(fleet_module.subprocess, "Popen", popen)


@pytest.fixture
def job(tmp_path, make_trial):
    def make(name: str, parent: Path | None = None, **changes) -> Job:
        return Job(replace(make_trial(8, **changes), name=name), tmp_path / "runs" / name, {}, parent)

    return make


def tries(job: Job) -> int:
    return len((job.run / "tries").read_text(encoding="utf-8").splitlines())


def test_every_job_is_done_once_by_a_bounded_number_of_workers_that_stay(stub, job, tmp_path):
    jobs, notes = [job(f"ok.{i}") for i in range(9)], Notes()
    with Fleet(3, tmp_path / "log") as fleet:
        results = fleet.run(jobs, notes)
        again = fleet.run([job("ok.again")], notes)
    assert set(results) == {str(j.run) for j in jobs}
    assert all(tries(j) == 1 for j in jobs)
    pids = {result["pid"] for result in results.values()}
    assert 1 <= len(pids) <= 3
    assert next(iter(again.values()))["pid"] in pids
    assert len(notes.order) == 20


def test_a_worker_that_dies_is_replaced_and_its_job_tried_again_once_and_then_given_up_with_the_reason(
    stub, job, tmp_path
):
    jobs, notes = [job("die-once"), job("die"), job("ok.1"), job("ok.2")], Notes()
    with Fleet(2, tmp_path / "workers.log") as fleet:
        results = fleet.run(jobs, notes)
    assert "failed" not in results[str(jobs[0].run)]
    assert results[str(jobs[1].run)] == {"failed": "the worker ended with code 7 (see workers.log)"}
    assert [tries(j) for j in jobs] == [2, 2, 1, 1]
    assert notes.reasons["die"] == "the worker ended with code 7 (see workers.log)"
    assert sum("trying it again once" in text for text in notes.said) == 2


def test_a_passing_trouble_is_tried_again_a_divergence_is_a_result_and_a_full_disk_ends_all(stub, job, tmp_path):
    jobs, notes = [job("error-once"), job("error"), job("diverge"), job("garbage")], Notes()
    with Fleet(2, tmp_path / "log") as fleet:
        results = fleet.run(jobs, notes)
        assert "failed" not in results[str(jobs[0].run)]
        assert results[str(jobs[1].run)] == {"failed": "OSError: a passing trouble"}
        assert results[str(jobs[2].run)] == {"failed": "it diverged at step 7", "diverged": True}
        assert "failed" not in results[str(jobs[3].run)]
        assert [tries(j) for j in jobs] == [2, 2, 1, 1]
    with Fleet(1, tmp_path / "log") as fleet, pytest.raises(WindtunnelError, match="quota is full") as error:
        fleet.run([job("full")], notes)
    assert error.value.exit_code == 2


def test_a_worker_that_falls_silent_is_replaced_even_while_others_talk(stub, job, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "_SILENCE", 1.0)
    jobs, notes = [job("hang", seed=1), *[job(f"ok.{i}") for i in range(4)]], Notes()
    with Fleet(2, tmp_path / "log") as fleet:
        results = fleet.run(jobs, notes)
    assert results[str(jobs[0].run)] == {"failed": "no word for 1 s"}
    assert tries(jobs[0]) == 2
    assert all("failed" not in results[str(j.run)] for j in jobs[1:])
    assert all(tries(j) == 1 for j in jobs[1:])  # no job was given to a worker that was being killed


def test_a_branch_starts_as_soon_as_its_checkpoint_is_there_while_the_trunk_still_runs(stub, job, tmp_path):
    trunk = job("trunk")
    branch = job("ok.branch", checkpoint_path(trunk.run, 4))
    notes = Notes()
    with Fleet(2, tmp_path / "log") as fleet:
        results = fleet.run([branch, trunk], notes)
    assert notes.order.index(("started", "trunk")) < notes.order.index(("started", "ok.branch"))
    assert results[str(branch.run)]["at"] < results[str(trunk.run)]["at"]


def test_branches_of_a_trunk_that_failed_are_given_up_with_its_reason_and_a_missing_parent_is_named(
    stub, job, tmp_path
):
    trunk = job("diverge")
    branch, saved = (job(f"ok.branch{at}", checkpoint_path(trunk.run, at)) for at in (4, 2))
    write_json(checkpoint_path(trunk.run, 2) / "manifest.json", {})
    other, notes = job("ok.other"), Notes()
    with Fleet(1, tmp_path / "log") as fleet:
        results = fleet.run([branch, trunk, saved, other], notes)
        reason = "the run that it grows from failed (it diverged at step 7)"
        assert results[str(branch.run)] == {"failed": reason, "diverged": True}
        assert "failed" not in results[str(other.run)]
        assert "failed" not in results[str(saved.run)]  # whenever it came to its turn
        with pytest.raises(WindtunnelError, match=r"no running stage will write: ok\.orphan"):
            fleet.run([job("ok.orphan", tmp_path / "nowhere")], notes)


def test_a_stop_reaches_every_running_stage_and_starts_no_other(stub, job, tmp_path):
    jobs, notes, flag = [job(f"slow.{i}") for i in range(4)], Notes(), threading.Event()
    threading.Timer(0.5, flag.set).start()
    with Fleet(2, tmp_path / "log") as fleet, pytest.raises(Stopped, match="the same command continues"):
        fleet.run(jobs, notes, stopping=flag.is_set)
    assert [word for word, _ in notes.order] == ["started", "started"]


def test_a_worker_that_was_stopped_alone_gets_its_job_again(stub, job, tmp_path):
    mine = job("stopped-alone")
    with Fleet(1, tmp_path / "log") as fleet:
        results = fleet.run([mine], Notes())
    assert "failed" not in results[str(mine.run)]
    assert tries(mine) == 2


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


DRIVER = """
import json, sys
from pathlib import Path
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import Fleet, Job
class Notes:
    def started(self, job): pass
    def progress(self, job, word): print(json.dumps(word), flush=True)
    def done(self, job, result, reason): print(json.dumps({"done": result, "reason": reason}), flush=True)
    def say(self, text): print(json.dumps({"say": text}), flush=True)
if __name__ == "__main__":
    message = json.loads(Path(sys.argv[1]).read_text())
    jobs = [Job(Stage.from_dict(m["stage"]), Path(m["run"]), {"tiny": Path(m["corpora"]["tiny"])}) for m in message]
    with Fleet(1, Path(sys.argv[1] + ".log"), eager=True) as fleet:
        fleet.run(jobs, Notes())
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_real_workers_end_with_a_driver_that_is_killed_and_a_worker_that_is_killed_is_replaced_meanwhile(
    tmp_path, make_trunk, tiny_corpus
):
    stage = make_trunk(100_000, save_every=20)
    job = {"stage": stage.to_dict(), "run": str(tmp_path / "run"), "corpora": {"tiny": str(tiny_corpus.path)}}
    (tmp_path / "jobs.json").write_text(json.dumps([job]), encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "jobs.json")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert driver.stdout is not None
    assert "step" in json.loads(driver.stdout.readline())
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text(encoding="utf-8").split()
    workers = [int(pid) for pid in children]
    assert len(workers) == 1
    # A worker that is killed is replaced, and the new one goes on from the newest checkpoint.
    while not steps_saved(tmp_path / "run"):
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    words = []
    while not any("say" in word for word in words):
        words.append(json.loads(driver.stdout.readline()))
    assert words[-1] == {"say": "trunk: the worker ended with code -9 (see jobs.json.log); trying it again once"}
    assert json.loads(driver.stdout.readline())["step"] > steps_saved(tmp_path / "run")[0]
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text(encoding="utf-8").split()
    workers = [int(pid) for pid in children]
    driver.kill()
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def test_of_several_gpus_each_worker_sees_one_and_all_are_used(tmp_path, monkeypatch):
    seen: list[tuple[str, list[str]]] = []

    class Silent:
        stdin, stdout = None, iter(())

        def __init__(self, command, *, env, **_):
            seen.append((env["CUDA_VISIBLE_DEVICES"], command))
            raise OSError("no need to start it")

    monkeypatch.setattr(fleet_module.subprocess, "Popen", Silent)
    fleet = Fleet(3, tmp_path / "log", devices="2,5,7")
    for number in ("2", "5", "7"):
        with pytest.raises(OSError, match="no need"):
            fleet._launch(None)
        fleet._seats.append(fleet_module._Seat(None, number))
    assert [gpu for gpu, _ in seen] == ["2", "5", "7"]
    assert all(command[command.index("--devices") + 1] == "cuda" for _, command in seen)


@pytest.mark.parametrize(
    ("word", "numbers"), [("0,1", ["0", "1"]), ("cuda:0,3", ["0", "3"]), ("3", ["3"]), ("cuda", []), ("cpu", [])]
)
def test_gpus_are_named_by_their_numbers(word, numbers):
    assert gpu_numbers(word) == numbers


def test_a_device_that_is_not_there_ends_the_call_in_one_line_instead_of_failing_every_job_twice(
    tmp_path, job, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    watcher = Notes()
    with (
        Fleet(1, tmp_path / "workers.log", devices="cuda") as fleet,
        pytest.raises(WindtunnelError, match="expected a device of this machine") as caught,
    ):
        fleet.run([job("a"), job("b")], watcher)
    assert caught.value.exit_code == 2
    assert not watcher.said


def test_ranks_that_a_launcher_named_around_the_driver_do_not_reach_its_workers(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(fleet_module.worker_environment(1))
