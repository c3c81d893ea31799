"""The examples for clusters call commands and options that exist; that a cluster runs them is another matter, and they say so."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from windtunnel import cli

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").iterdir())
STAND_IN = """#!/bin/bash
home="${@: -1}"
[ -f "$home/earlier" ] || exit 9
trap 'trap "" TERM; sleep 1; touch "$home/ended"; exit 75' TERM
touch "$home/begun"
for _ in $(seq 600); do [ -n "$LONG" ] || break; sleep 0.1; done
touch "$home/ended"
"""
CALL = re.compile(r"^[#\s]*(windtunnel .*?)(?: &)?$", re.MULTILINE)


def calls(path: Path) -> list[list[str]]:
    """The words of every call of windtunnel in a file, commented ones too; a variable stands for itself."""
    return [shlex.split(text, comments=True)[1:] for text in CALL.findall(path.read_text(encoding="utf-8"))]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words; nothing is run."""
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("windtunnel", list(words)).params


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_call_in_an_example_is_understood(path: Path) -> None:
    found = calls(path)
    assert found, "an example without a call shows nothing"
    for words in found:
        assert parsed(words)
    assert re.search(r"Not yet run (on|with) ", path.read_text(encoding="utf-8")), "until somebody has run it"


def test_the_array_job_gives_each_task_its_share_and_its_home() -> None:
    path = next(path for path in EXAMPLES if path.name == "slurm.sbatch")
    search = parsed(calls(path)[-1])
    assert (search["recipe"], search["part"], str(search["home"])) == ("my.toml", "$SLURM_ARRAY_TASK_ID/28", "$home")
    assert 'kept="$PWD/part-$SLURM_ARRAY_TASK_ID"' in path.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to run the job's script with")
@pytest.mark.parametrize("signals", [0, 1, 2])
def test_a_job_keeps_its_home_on_the_node_and_copies_it_back_also_when_it_is_told_to_end(
    tmp_path: Path, signals: int
) -> None:
    """The script itself, with a stand-in for windtunnel that works in the home it is given until a signal or its end."""
    bin_, submitted, node = tmp_path / "bin", tmp_path / "submitted", tmp_path / "node"
    for folder in (bin_, submitted / "part-3", node):
        folder.mkdir(parents=True)
    (submitted / "part-3" / "earlier").write_text("done before")
    (bin_ / "windtunnel").write_text(STAND_IN)
    (bin_ / "windtunnel").chmod(0o755)
    script = next(path for path in EXAMPLES if path.name == "slurm.sbatch")
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "TMPDIR": str(node), "SLURM_ARRAY_TASK_ID": "3"}
    job = subprocess.Popen(["bash", str(script)], cwd=submitted, env={**env, "LONG": "1" if signals else ""})
    while signals and not list(node.glob("*/begun")):
        assert job.poll() is None, "it ended before it was told to"
        time.sleep(0.05)
    for _ in range(signals):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert job.wait(60) == (75 if signals else 0), "what windtunnel said is what the job says"
    assert not list(node.iterdir()), "nothing stays on the node"
    assert {path.name for path in (submitted / "part-3").iterdir()} == {"earlier", "begun", "ended"}


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --workerz"):
        parsed(["run", "my.toml", "--workerz", "4"])
