"""The lab book again from what the folders of a home say about themselves. Needs no torch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import explained, read_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.lock import FolderLock
from windtunnel.desk import put_scores
from windtunnel.home import FACTS, RECORD, Home
from windtunnel.train.folder import FAILED, RESULT, STAGE
from windtunnel.train.metrics import read_metrics
from windtunnel.views import View, line


def rebuild(home: Path) -> View:
    """Writes the lab book anew: runs and scores, metrics, facts. An earlier book is moved aside, never deleted.

    Raises:
        UserError: the folder is no home, or another command is at work in it.
    """
    place = Home(home)
    programs = sorted(path.name for path in (home / "programs").glob("*") if path.is_dir())
    if not programs:
        raise UserError(str(home), "expected a home with programs, found none", "choose the folder with --home")
    locks = [FolderLock(place.program(name)) for name in programs]  # nobody may be writing meanwhile
    fresh = place.labbook.with_name(f".{place.labbook.name}.rebuilt")
    _remove(fresh)
    book, count = LabBook(fresh), 0
    rows = [(name, run) for name in programs for run in sorted(place.runs(name).glob("*/")) if (run / STAGE).is_file()]
    found = sorted(((run_row(home, name, run), run) for name, run in rows), key=lambda pair: pair[0]["started"] or 0.0)
    with book:
        for row, run in found:
            put_run_folder(book, row, run)
            count += 1
        for name in programs:
            for kind, fact, text in _read(place.program(name) / FACTS, []):
                book.put_fact(name, kind, fact, json.loads(text))
    book.close()
    parts = [line(f"the lab book holds {count} runs of {len(programs)} programs again")]
    with explained(place.labbook):
        if place.labbook.exists():
            aside = place.labbook.with_name(f"{place.labbook.name}.{time.time():.0f}.old")
            os.replace(place.labbook, aside)
            parts.append(line(f"the earlier one is {aside.name}"))
        for end in ("-wal", "-shm"):  # they belong to the earlier file
            place.labbook.with_name(place.labbook.name + end).unlink(missing_ok=True)
        os.replace(fresh, place.labbook)
    for lock in locks:
        lock.release()
    return View({"runs": count, "programs": programs}, tuple(parts))


def run_row(home: Path, program: str, run: Path) -> dict[str, Any]:
    """A run's row: as the driver noted it, or as far as its stage and its result tell."""
    stage = {name: value for name, value in read_json(run / STAGE).items() if name != "key"}
    noted = _read(run / RECORD, {}).get("row")
    if noted:
        return {**noted, "config": stage}
    result, failure = _read(run / RESULT, {}), _read(run / FAILED, {})
    row = {
        "id": f"{program}/{run.name}", "program": program, "kind": stage["kind"], "name": stage["name"], "study": "",
        "parent": "", "status": "failed" if failure else "done" if result else "stopped", "reason": failure.get("reason", ""),
        "folder": str(run.relative_to(home)),
        "config": stage, "started": None, "ended": None, "steps": None, "tokens": None, "flops": None, "seconds": None,
    }  # fmt: skip
    if result:
        row |= {"steps": result["step"], "tokens": result["tokens"], "flops": result["flops"],
                "seconds": sum(result["seconds"].values())}  # fmt: skip
    return row


def put_run_folder(book: LabBook, row: dict[str, Any], run: Path) -> None:
    """Writes a run's row, metrics and scores into a book, from what its folder holds."""
    name = row["id"]
    book.put_run(name, **{column: value for column, value in row.items() if column != "id"})
    if row["status"] == "done":
        steps = [(step, metric, value) for step, values in read_metrics(run) for metric, value in values.items()]
        book.put_metrics(name, steps)
    noted = _read(run / RECORD, {}).get("scores")
    if noted is None:
        for corpus, score in _read(run / RESULT, {}).get("scores", {}).items():
            put_scores(book, name, corpus, score)
    for score in noted or ():
        book.put_score(**score)


def _read(path: Path, otherwise: Any) -> Any:
    try:
        return read_json(path)
    except ArtefactError:
        return otherwise


def _remove(book: Path) -> None:
    for end in ("", "-wal", "-shm"):
        book.with_name(book.name + end).unlink(missing_ok=True)
