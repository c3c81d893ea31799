"""Verbs that look after what exists: status, finish, clean, eval, export, chat, report, data. Needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import explained, read_json, write_json
from windtunnel.base.errors import ArtefactError, UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import bytes_size, duration, si
from windtunnel.chats import template_read
from windtunnel.comparison import find_run, open_book
from windtunnel.corpus.compression import compression_table
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.inspect import inspect_source, render_inspection
from windtunnel.corpus.store import open_corpus
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.decay_now import average_job, note_average, read_now
from windtunnel.desk import Desk, note_run
from windtunnel.home import Home, write_facts
from windtunnel.model.serving import DynamicNtk
from windtunnel.model.shape import Shape
from windtunnel.pipeline import FINISH, dynamic_ntk_of, export_job, finishing, run
from windtunnel.preparation import prepare
from windtunnel.program_report import write_program_report
from windtunnel.recipe import Recipe, parse_recipe
from windtunnel.recipe_schema import Origin
from windtunnel.train.folder import FAILED, checkpoint_path, steps_saved
from windtunnel.train.stage import FINISHED
from windtunnel.views import View, line, table


def status(home: Path, *, average: bool = False) -> View:
    """Programs of a home, their target runs, what their tunnels hold, and what each trunk would give if it decayed now.

    Args:
        average: also score the mean of each trunk's last checkpoints.
    """
    book = open_book(home)
    if average:
        _average_trunks(home, LabBook(Home(home).labbook))
    data: dict[str, Any] = {}
    parts: list[RenderableType] = []
    for program in book.programs():
        runs = book.runs(program=program)
        studies: dict[str, list[str]] = {}
        for row in runs:
            if row["study"]:
                studies.setdefault(row["study"], []).append(row["status"])
        own = [row for row in runs if not row["study"]]
        sizes = [f"{name} {sum(s == 'done' for s in states)}/{len(states)}" for name, states in studies.items()]
        parts.append(line(f"{program}   tunnel: {', '.join(sizes) or 'nothing yet'}", "bold"))
        rows = []
        for row in own:
            shown = ", ".join(f"{corpus} {value:.4f}" for corpus, value in _bits(book, row["id"]).items())
            seconds = duration(row["seconds"]) if row["seconds"] else ""
            rows.append(
                (row["name"], row["status"], _progress(book, row, home), si(row["tokens"] or 0), seconds, shown)
            )
        if rows:
            columns = ("run", "state", "steps", "tokens", "time", "held-out bits per byte")
            parts.append(table(columns, rows, right=(2, 3, 4)))
        trunks = {row["name"]: read_now(home, book, row) for row in own if row["kind"] == "trunk"}
        parts += [line(text) for now in trunks.values() for text in now.lines()]
        shown_columns = ("id", "name", "status", "steps", "tokens", "reason")
        data[program] = {
            "studies": {name: len(states) for name, states in studies.items()},
            "runs": [{**{c: row[c] for c in shown_columns}, "scores": _bits(book, row["id"])} for row in own],
            "decay_now": {name: now.to_dict() for name, now in trunks.items()},
        }
    if not parts:
        parts.append(line("no program has run here yet; try: windtunnel quickstart"))
    return View(data, tuple(parts))


def _average_trunks(home: Path, book: LabBook) -> None:
    for program in book.programs():
        for row in book.runs(program=program, study="", kind="trunk"):
            steps = steps_saved(home / row["folder"])
            if len(steps) > 1:
                job = average_job(home, row)
                note_average(book, row, finishing("average", **job), steps[-len(job["checkpoints"]) :])
        write_facts(home, program, book)


def _bits(book: LabBook, run: str) -> dict[str, float]:
    return {s["corpus"]: s["value"] for s in book.scores(run) if s["name"] == "bits_per_byte"}


def _progress(book: LabBook, row: dict[str, Any], home: Path) -> str:
    total = row["config"]["steps"]
    if row["status"] == "done":
        return f"{row['steps']:,}"
    saved = steps_saved(home / row["folder"])
    return f"{saved[-1] if saved else 0:,} of {total:,} saved"


def finish(home: Path, name: str, *, devices: str | None = None) -> View:
    """Ends a program's trunk at its next step and starts the decay.

    Where nothing is running, the branches decay from the trunk's newest checkpoint.
    """
    place, book = Home(home), open_book(home)
    row = find_run(book, name)
    program = row["program"]
    if row["kind"] != "trunk" or row["study"]:
        raise UserError("finish", f"expected a trunk, got the {row['kind']} '{row['name']}'", f"write {program}/trunk")
    resolved = book.fact(program, "recipe", "resolved")
    running = time.time() - _last_sign(place.root / row["folder"]) < 30
    saved = steps_saved(place.root / row["folder"])
    if not running and not saved:
        raise UserError("finish", f"'{program}' has no checkpoint of its trunk yet", f"windtunnel run {program}")
    write_json(place.program(program) / FINISH, {"step": None, "trunk": Path(row["folder"]).name})
    if running and row["status"] == "running":
        text = f"'{program}': the running trunk ends at its next step, then the decay begins"
        return View({"program": program, "running": True}, (line(text),))
    recipe = parse_recipe(resolved, (), Origin(base=Path(book.fact(program, "recipe", "base") or ".")))
    book.close()
    return run(recipe, home, devices=devices)


def _last_sign(run_folder: Path) -> float:
    try:
        return (run_folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return 0.0


def clean(home: Path, *, really: bool = False, failed: bool = False) -> View:
    """Lists what can go: runs and built text that no current recipe of this home needs. Removes it only if asked.

    Kept are runs of the latest version of each program, all their parents, every checkpoint that is an only copy of a
    finished model, the corpora and tokenizers in use, and everything that was not made by windtunnel.

    Args:
        failed: also what says that trials diverged or were given up, and the searches that counted with it: the next call of
            their study tries them again.
    """
    place, book = Home(home), open_book(home)
    doomed: list[tuple[Path, str]] = []
    used: set[str] = set()
    for program in book.programs():
        current = _current_runs(place, book, program)
        runs = sorted(place.runs(program).glob("*-??????????"))
        old = [run for run in runs if run.name not in current and (run / "stage.json").is_file()]
        doomed += [(run, "a run of an earlier version of its recipe that nothing grows from") for run in old]
        doomed += _failures(place, program, [run for run in runs if run not in old]) if failed else []
        try:
            prepared = read_json(place.program(program) / "prepared.json")
            used |= {prepared["tokenizer"], *(c["folder"] for c in prepared["corpora"].values())}
        except ArtefactError:
            pass
    built = sorted([*place.corpora.glob("*"), *place.tokenizers.glob("*")])
    unused = [folder for folder in built if folder.is_dir() and str(folder.relative_to(place.root)) not in used]
    doomed += [(folder, "no program uses it any more; it can be built again") for folder in unused]
    doomed += [(folder, "cleaned text; it is read again when needed") for folder in sorted(place.text.glob("text-*"))]
    sizes = [_size(path) for path, _ in doomed]
    rows = [
        (str(path.relative_to(place.root)), bytes_size(size), why)
        for (path, why), size in zip(doomed, sizes, strict=True)
    ]
    if really:
        for path, _ in doomed:
            with explained(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    word = "removed" if really else "can go (windtunnel clean --really removes it)"
    parts = (table(("folder", "size", "why"), rows, right=(1,)), line(f"{bytes_size(sum(sizes))} {word}"))
    return View({"folders": [r[0] for r in rows], "bytes": sum(sizes), "removed": really}, parts)


def _failures(home: Home, program: str, runs: Sequence[Path]) -> list[tuple[Path, str]]:
    """The notes of failed trials among some runs, and the records of searches that used these."""
    failed = [run for run in runs if (run / FAILED).is_file()]
    names = {run.name for run in failed}
    records = sorted((home.program(program) / "studies").glob("search-*.json"))
    used = {path: {run for part in read_json(path)["runs"].values() for run in part} for path in records}
    return [(run / FAILED, f"a trial failed: {read_json(run / FAILED)['reason']}") for run in failed] + [
        (path, "a search that counted with it") for path, its in used.items() if its & names
    ]


def _current_runs(home: Home, book: LabBook, program: str) -> set[str]:
    """Folders that the latest sessions needed, all finished models, and every run that one of these grows from.

    A program that has not run since sessions began to note what they need keeps everything.
    """
    rows = {Path(row["folder"]).name: row for row in book.runs(program=program)}
    used = book.facts(program, "used")
    keep = {run for runs in used.values() for run in runs} if used else set(rows)
    keep |= {name for name, row in rows.items() if row["kind"] in FINISHED and not row["study"]}
    while parents := {rows[name]["parent"].partition("/")[2] for name in keep if name in rows} - keep - {""}:
        keep |= parents
    return keep


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _checkpoint(home: Path, row: Mapping[str, Any]) -> Path:
    saved = steps_saved(home / row["folder"])
    if not saved:
        raise UserError("run", f"'{row['name']}' has no checkpoint", f"windtunnel run {row['program']}")
    return checkpoint_path(home / row["folder"], saved[-1])


def _tokenizer(home: Path, program: str) -> Path:
    return home / read_json(Home(home).program(program) / "prepared.json")["tokenizer"]


def evaluate(
    home: Path, name: str, *, tasks: Mapping[str, Path] | None = None, tokens: int | None = None, retrieval: int = 0
) -> View:
    """Scores a run's newest checkpoint on every held-out corpus of its program, and on tasks; records the scores in the lab book.

    Args:
        retrieval: hidden keys asked for at each length and depth, of a trunk too: what a longer context would begin with.
    """
    book = LabBook(Home(home).labbook)
    row = find_run(book, name)
    prepared = read_json(Home(home).program(row["program"]) / "prepared.json")
    corpora = {corpus: str(home / value["folder"]) for corpus, value in prepared["corpora"].items()}
    answer = finishing(
        "evaluate", checkpoint=str(_checkpoint(home, row)), tokenizer=str(_tokenizer(home, row["program"])), corpora=corpora,
        tokens=tokens, tasks={task: str(path) for task, path in (tasks or {}).items()}, retrieval=retrieval,
    )  # fmt: skip
    with book:
        for corpus, score in answer["scores"].items():
            book.put_score(
                row["id"], corpus, "bits_per_byte", score["bits_per_byte"], "bits per UTF-8 byte", score["tokens"]
            )
        for task, found in answer["tasks"].items():
            book.put_score(
                row["id"], task, "accuracy", found["accuracy"], "share", found["count"], found["low"], found["high"]
            )
        for cell in answer["retrieval"]:
            share = (cell["found"], "share", cell["count"], cell["low"], cell["high"])
            book.put_score(row["id"], cell["task"], f"found_{cell['length']}", *share)
    note_run(book, row["id"], home / row["folder"])
    rows = [
        (corpus, f"{s['bits_per_byte']:.4f} bits per byte", f"{s['tokens']:,} tokens")
        for corpus, s in answer["scores"].items()
    ]
    for task, t in answer["tasks"].items():
        share, low, high, chance = (f"{100 * t[name]:.1f}" for name in ("accuracy", "low", "high", "chance"))
        rows.append((task, f"{share} % [{low}, {high}], chance {chance} %", f"{t['count']} items"))
    for cell in answer["retrieval"]:
        share, low, high, worst = (f"{100 * cell[key]:.1f}" for key in ("found", "low", "high", "worst"))
        what = f"{cell['task']} in {cell['length']:,} tokens"
        rows.append((what, f"{share} % [{low}, {high}], worst depth {worst} %", f"{cell['count']} items"))
    return View({"run": row["id"], **answer}, (table(("on", row["id"], "from"), rows),))


def export(home: Path, name: str, *, out: Path | None = None, dynamic_ntk: str | None = None) -> View:
    """Writes a run as a Hugging Face folder and checks it.

    Args:
        dynamic_ntk: ``FACTOR[@TOKENS]``, see ``DynamicNtk``; ``none`` for positions as trained; None as its recipe says.

    Raises:
        UserError: the model's positions cannot be served so; nothing has been written.
    """
    place, book = Home(home), open_book(home)
    row = find_run(book, name)
    run_folder = home / row["folder"]
    target = out or place.program(row["program"]) / "exports" / run_folder.name
    job = export_job(book, place, row["program"], run_folder, target)
    done = finishing("export", **{**job, "dynamic_ntk": _dynamic_ntk(book, row, dynamic_ntk)})
    return View({"folder": str(target), **done}, (line(f"exported {row['id']} to {target} ({done['check']})"),))


def _dynamic_ntk(book: LabBook, row: Mapping[str, Any], stated: str | None) -> str | None:
    """What was stated, checked against the model's shape, or what the run's recipe says."""
    if stated is None:
        return dynamic_ntk_of(book, row["program"], row["name"])
    if stated == "none":
        return None
    found = DynamicNtk.parse(stated)
    found.of(Shape(**row["config"]["shape"]))
    return str(found)


def chat(
    home: Path, name: str, *, prompt: str | None = None, dynamic_ntk: str | None = None, **options: Any
) -> View | None:
    """Talks to a model in this terminal, or answers one prompt, in the template of the chats that it has read.

    ``dynamic_ntk`` as in ``export``.
    """
    book = open_book(home)
    row = find_run(book, name)
    defaults = {"temperature": 0.7, "top_p": 0.9, "seed": 0, "max_tokens": 256}
    sampling = {name: options.get(name, value) for name, value in defaults.items()}
    sampling["max_new"] = sampling.pop("max_tokens")
    template = template_read(book, row["id"]) or "chatml"  # which a model that has read no chats knows as well as any
    job = {
        "checkpoint": str(_checkpoint(home, row)), "tokenizer": str(_tokenizer(home, row["program"])),
        "options": {**sampling, "prompt": prompt, "template": template}, "dynamic_ntk": _dynamic_ntk(book, row, dynamic_ntk),
    }  # fmt: skip
    command = [sys.executable, "-m", "windtunnel.finishing", "chat", json.dumps(job)]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 130):
        raise WindtunnelError(f"chat ended with code {code}")
    return None


def report(home: Path, program: str | None, *, out: Path | None = None, share: bool = False) -> View:
    """Writes the report of a program, the one that ran last if none is named."""
    book = open_book(home)
    names = book.programs()
    if not names:
        raise UserError("report", "expected a program in this home, found none", "windtunnel quickstart makes one")
    if program is not None and program not in names:
        raise UserError("report", f"expected one of {', '.join(names)}, got {program[:60]!r}")
    chosen = program or max(
        names, key=lambda name: max([r["started"] or 0 for r in book.runs(program=name)], default=0)
    )
    target = out or Home(home).program(chosen) / ("report-share.html" if share else "report.html")
    path = write_program_report(book, home, chosen, target, share=share)
    return View({"report": str(path), "program": chosen}, (line(f"wrote {path}"),))


def inspect_data(home: Path, paths: Sequence[str], *, recipe: Recipe | None = None) -> View:
    """Reads text without training: languages, sizes, tokens, dropped pairs, first packed rows."""
    place = Home(home)
    if recipe is not None:
        found = [
            inspect_source(config, downloads=place.downloads, base=recipe.base, vocab=recipe.tokenizer.vocab)
            for config in recipe.corpus.values()
        ]
    else:
        found = [
            inspect_source(
                SourceConfig.model_validate({"source": tuple(paths)}), downloads=place.downloads, base=Path.cwd()
            )
        ]
    return View({"corpora": [f.to_dict() for f in found]}, tuple(render_inspection(f) for f in found))


def compression(recipe: Recipe, home: Path) -> View:
    """Bytes for each token on held-out text, by corpus."""
    with Desk(Home(home), recipe.name) as desk:
        prepared = prepare(desk, recipe)
        tokenizer = Tokenizer.load(home / prepared.tokenizer)
        corpora = [open_corpus(home / corpus["folder"]) for corpus in prepared.corpora.values()]
    found = compression_table(corpora, {f"{recipe.name} ({tokenizer.vocab_size:,})": tokenizer})
    columns = list(next(iter(found.values())))
    rows = [(name, *(f"{row[c]:.2f}" for c in columns)) for name, row in found.items()]
    return View(found, (table(("bytes per token", *columns), rows, right=tuple(range(1, len(columns) + 1))),))
