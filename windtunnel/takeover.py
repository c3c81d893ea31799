"""Trials that another program of this home has trained already, because a recipe was renamed or asks the same. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from windtunnel.base.artefact import copy_folder
from windtunnel.home import Home
from windtunnel.train.folder import read_failure, read_result
from windtunnel.train.stage import Stage


def take_over(home: Home, program: str, stages: Sequence[Stage], corpora: Mapping[str, str]) -> list[str]:
    """Copies finished runs that this program lacks and another one has; returns from which programs.

    A run's folder is named by the hash of all that its numbers depend on, and the program is not among these.
    """
    runs = home.runs(program)
    folders = {stage: runs / stage.folder_name for stage in stages}
    missing = {
        stage.key[:10]: stage
        for stage, run in folders.items()
        if read_result(run, stage, corpora) is None and read_failure(run, stage) is None
    }
    found: dict[str, None] = {}
    for run in sorted(home.root.glob("programs/*/runs/*-??????????")) if missing else []:
        stage = missing.get(run.name[-10:])
        if stage is None or run.parent == runs or not _finished(run, stage, corpora):
            continue
        shutil.rmtree(folders[stage], ignore_errors=True)
        try:
            copy_folder(run, folders[stage])
        except (shutil.Error, FileNotFoundError):  # the other program is at work on it
            continue
        del missing[run.name[-10:]]
        found[run.parents[1].name] = None
    return list(found)


def _finished(run: Path, stage: Stage, corpora: Mapping[str, str]) -> bool:
    """Whether a run has a result, or diverged where its study can do without: what was given up may go better here."""
    if read_result(run, stage, corpora) is not None:
        return True
    return stage.kind == "trial" and (read_failure(run, stage) or {}).get("diverged", False)
