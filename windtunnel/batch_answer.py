"""The batch that ``windtunnel tunnel batch`` answered for this very program, where nothing else decides it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.home import Home
from windtunnel.program import Answered, Program, power_of_two

STUDY = "batch"


def with_known_batch(home: Home, program: Program) -> Program:
    """The program with its batch study's answer, to a power of two rows, or as it is.

    The recipe and what an earlier run pinned come first. The study must have asked about the same data, size and tokens, and its
    answer must have an interval and no caveat. Where the study scaled the learning rate with the batch, only a program that
    searches the rate itself follows: it then does so at the new batch.
    """
    if program.recipe.trunk.batch or program.recipe.trunk.batch_schedule or program.pinned or program.prepared is None:
        return program
    if not home.labbook.is_file():
        return program
    book = LabBook(home.labbook, readonly=True)
    try:
        fact = book.fact(program.name, STUDY, STUDY)
    finally:
        book.close()
    if fact is None or not _holds_for(program, fact):
        return program
    best, row = fact["answer"]["best"], program.recipe.model.row
    span = f"{si(best['value'])} tokens [{si(best['low'])}, {si(best['high'])}]"
    source = f"tunnel batch found {span} here; to the next power of two rows"
    return replace(program, answered=Answered(power_of_two(best["value"] / row), source))


def _holds_for(program: Program, fact: Mapping[str, Any]) -> bool:
    answer, setting, tunnel = fact["answer"], program.setting(chosen=False), program.recipe.tunnel
    if answer is None or answer["notes"] or answer["best"]["low"] is None:
        return False
    asked = fact["corpora"], fact["mixture"], fact["row"], answer["parameters"], answer["tokens"]
    here = dict(setting.corpora), dict(setting.mixture), setting.row, program.shape.body, program.total_tokens
    searches = tunnel is not None and bool(tunnel.trials) and "learning_rate" in program.searched
    return asked == here and (searches or fact["rule"] == "base rate × 1")
