"""The examples for clusters call commands and options that exist; that a cluster runs them is another matter, and they say so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from windtunnel import cli

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").iterdir())
CALL = re.compile(r"^[#\s]*(windtunnel .*)$", re.MULTILINE)


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
    search = parsed(calls(next(path for path in EXAMPLES if path.name == "slurm.sbatch"))[-1])
    assert (search["recipe"], search["part"], str(search["home"])) == (
        "my.toml",
        "$SLURM_ARRAY_TASK_ID/28",
        "part-$SLURM_ARRAY_TASK_ID",
    )


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --workerz"):
        parsed(["run", "my.toml", "--workerz", "4"])
