"""A search whose driver and workers are killed at random moments ends as one that nobody touched."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from windtunnel.base.artefact import read_json
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home

KILLS = 20
TUNNEL = """
trials = 12
trial_tokens = "96k"
per_round = 4
search_size = "0.02M"
check_size = "0.05M"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up, tiny_recipe) -> Path:
    made = tmp_path_factory.mktemp("killed")
    write_made_up(made / "plain.jsonl", 2000)
    (made / "killed.toml").write_text(tiny_recipe(TUNNEL, name="killed", batch="256"), encoding="utf-8")
    (made / "no-programs").mkdir()
    return made


def start(folder: Path, home: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """A search with two workers that do not compile: they begin to train within seconds."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "windtunnel", "tunnel", "search", str(folder / "killed.toml"), *sets]
    command += ["--home", str(home), "--devices", "cpu", "--workers", "2"]
    environment = {**os.environ, "PATH": str(folder / "no-programs"), "OMP_NUM_THREADS": "1"}
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def workers(driver: subprocess.Popen[bytes]) -> list[int]:
    """Worker processes of a driver."""
    try:
        children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text(encoding="utf-8").split()
        return [pid for pid in map(int, children) if b"tunnel.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def ended(home: Path) -> dict[str, tuple[int, int]]:
    """Result files that no later step rewrites, with their inode and time."""
    results = Home(home).runs("killed").glob("*/result.json")
    closed = [path for path in results if not read_json(path.parent / "stage.json")["open_ended"]]
    return {str(path.relative_to(home)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in closed}


def table(home: Path) -> dict[str, object]:
    book = LabBook(Home(home).labbook, readonly=True)
    fact = book.fact("killed", "study", "search")
    scores = {row["name"]: book.scores(row["id"]) for row in book.runs(program="killed", study="search")}
    book.close()
    assert scores
    return {**{key: value for key, value in fact.items() if key != "runs"}, "scores": sorted(scores.items())}


def kill_again_and_again(folder: Path, home: Path, draw: random.Random, pause: float, *overrides: str) -> int:
    """Kills the driver and one of its workers in turn, each a random moment after a worker was seen; returns how often.

    The driver is started again at once, and left alone after the last kill.
    """
    kills, driver, kept = 0, start(folder, home, *overrides), dict[str, tuple[int, int]]()
    try:
        while driver.poll() is None:
            if kills == KILLS:
                driver.wait(timeout=1800)
            elif not (found := workers(driver)):
                time.sleep(0.05)
            else:
                time.sleep(draw.uniform(0, pause))
                alone = kills % 2
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(found) if alone else driver.pid, signal.SIGKILL)
                kills += 1
                if not alone:
                    driver.wait()
                    now = ended(home)
                    assert {name: now.get(name) for name in kept} == kept  # what had ended was not trained again
                    kept, driver = now, start(folder, home, *overrides)
        assert driver.returncode == 0, (folder / "driver.log").read_text(encoding="utf-8")[-2000:]
        assert {name: ended(home).get(name) for name in kept} == kept
    finally:
        driver.kill()
    return kills


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("options", [("tunnel.sampler=tpe",), ("tunnel.sampler=tpe", "tunnel.prune=forecast")])
def test_a_real_search_whose_driver_and_workers_are_killed_twenty_times_has_the_table_of_one_that_was_left_alone(
    folder, tmp_path, options
):
    begun = time.monotonic()
    assert start(folder, tmp_path / "whole", *options).wait(timeout=1800) == 0
    pause = (time.monotonic() - begun) / 15  # so that the search outlasts its kills
    kills = kill_again_and_again(folder, tmp_path / "killed", random.Random(7), pause, *options)
    assert kills == KILLS
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
