"""A run's folder for those who only look: its checkpoints, its result or why there is none. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import read_json, write_json
from windtunnel.base.errors import ArtefactError
from windtunnel.train.stage import Stage

KIND = "checkpoint"
"""What a checkpoint's manifest calls it."""
RESULT = "result.json"
FAILED = "failed.json"
STAGE = "stage.json"


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint at a step."""
    return run / "checkpoints" / f"step-{step:09d}"


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first, without looking inside."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit())


def read_result(run: Path, stage: Stage, corpora: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """The result of a finished stage; None if it is missing, of another identity, too short, or lacks a score or checkpoint.

    A trunk that went further than asked counts as finished if the checkpoints that are asked for exist. Given the content
    hashes of the corpora, a score on an earlier version of one counts as missing.
    """
    if not (run / RESULT).is_file():
        return None
    result = read_json(run / RESULT)
    far_enough = result["step"] == stage.steps or (stage.open_ended and result["step"] > stage.steps)
    saved = set(steps_saved(run))
    whole = result.get("key") == stage.key and far_enough and set(stage.keep) <= saved
    scores, hashes = result["scores"], corpora or {}
    scored = set(stage.score) <= set(scores) and (
        not stage.score or result.get("score_tokens", stage.score_tokens) == stage.score_tokens
    )
    scored = scored and all(hashes.get(name, scores[name]["corpus"]) == scores[name]["corpus"] for name in stage.score)
    return result if whole and scored else None


def write_failure(run: Path, stage: Stage, reason: str, *, diverged: bool) -> None:
    """Notes in a run folder that a stage diverged, or was given up, on its way to the steps that were asked for."""
    write_json(run / FAILED, {"key": stage.key, "steps": stage.steps, "reason": reason, "diverged": diverged})


def read_failure(run: Path, stage: Stage) -> dict[str, Any] | None:
    """``{"failed": reason}``, with ``"diverged": True`` if it did, as the fleet said it of this stage; None if it said nothing.

    What stopped a trunk on a longer way says nothing about fewer steps.
    """
    if not (run / FAILED).is_file():
        return None
    noted = read_json(run / FAILED)
    if noted["key"] != stage.key or noted["steps"] > stage.steps:
        return None
    return {"failed": noted["reason"], **({"diverged": True} if noted["diverged"] else {})}


def forget_failure(run: Path, stage: Stage) -> None:
    """Lets a stage be tried again, or was right to: it has a result now."""
    if read_failure(run, stage) is not None:
        (run / FAILED).unlink()


def as_far_as_trained(run: Path, stage: Stage) -> Stage:
    """An open-ended stage that went at least as far as asked, with the checkpoints that it has: fewer tokens and new branches
    grow from those and redo nothing. Any other stage as it is."""
    try:
        result = read_json(run / RESULT)
    except ArtefactError:
        return stage
    saved = steps_saved(run)
    far_enough = stage.open_ended and result.get("key") == stage.key and result["step"] >= stage.steps
    if not far_enough or not saved or saved[0] > min(stage.keep, default=stage.steps):
        return stage
    return replace(stage, keep=tuple(step for step in stage.keep if step in saved))
