"""Studies that were trained in several places, joined into one home. Needs no torch.

A run folder says all that the lab book needs, so merging copies folders and writes their rows: whatever is there already stays,
and merging twice changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import copy_folder, read_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.lock import FolderLock
from windtunnel.home import Home
from windtunnel.rebuild import put_run_folder, run_row
from windtunnel.recipe import differences, with_defaults
from windtunnel.train.folder import FAILED, RESULT, STAGE
from windtunnel.train.stage import Stage
from windtunnel.views import View, line

_KINDS = ("recipe", "corpus")
"""Facts that a merged home takes over where it has none."""


def merge(homes: Sequence[Path], into: Path, *, mixed: bool = False) -> View:
    """Joins the programs of several homes: their run folders, lab books, corpora and tokenizers.

    Args:
        mixed: also where the trials of one study ran on different devices, dtypes, threads or versions of torch.

    Raises:
        UserError: there is no home but ``into``, or one has no program; two homes differ in data, tokenizer, recipe or what
            their trials ran on; a run was trained with other numerics; another command is at work in one of the homes.
    """
    sources = [path for path in homes if path.resolve() != into.resolve()]
    if not sources:
        raise UserError(
            str(into),
            "expected another home to join into this one, got itself alone",
            "name the homes of the other parts",
        )
    programs = {path: _programs(path) for path in sources}
    target, counts = Home(into), {"copied": 0, "known": 0}
    locks = [FolderLock(Home(path).program(name)) for path, names in programs.items() for name in names]
    names = sorted({name for found in programs.values() for name in found})
    locks += [FolderLock(target.program(name)) for name in names]
    try:
        for name in names:
            places = [into, *(path for path in sources if name in programs[path])]
            _same_data(name, places)
            _same_recipe(name, places)
            for path in places[1:]:
                _sound(name, path)
            if not mixed:
                _same_class(name, places)
        book = LabBook(target.labbook)
        for path in sources:
            for name in programs[path]:
                _take_shared(name, path, into)
                for run in _runs(name, path):
                    counts["copied" if _take_run(book, name, run, into) else "known"] += 1
                _take_facts(book, name, path)
        book.close()
    finally:
        for lock in locks:
            lock.release()
    text = f"{len(sources)} homes joined: {counts['copied']} runs taken over, {counts['known']} were there already"
    return View({"programs": names, **counts}, (line(text),))


def _programs(home: Path) -> list[str]:
    found = sorted(path.name for path in (home / "programs").glob("*") if (path / "prepared.json").is_file())
    if not found:
        raise UserError(
            str(home), "expected a home with a program whose corpora are built, found none", "check the path"
        )
    return found


def _runs(program: str, home: Path) -> list[Path]:
    """Run folders that are whole, or at least begun: what a kill left without a stage is no run."""
    return [run for run in sorted(Home(home).runs(program).glob("*/")) if (run / STAGE).is_file()]


def _same_data(program: str, places: Sequence[Path]) -> None:
    """Refuses homes whose tokenizer or corpora differ from those of the first home that has them."""
    first: tuple[Path, dict[str, Any]] | None = None
    for home in places:
        try:
            prepared = read_json(Home(home).program(program) / "prepared.json")
        except ArtefactError:
            continue
        if first is None:
            first = home, prepared
            continue
        where, known = str(home), first[1]
        if prepared["tokenizer_hash"] != known["tokenizer_hash"]:
            raise UserError(
                where,
                f"expected the tokenizer {known['tokenizer_hash'][:12]} of {first[0]} for '{program}', "
                f"got {prepared['tokenizer_hash'][:12]}",
                "parts of one study share tokenizer and text",
            )
        for corpus in sorted({*known["corpora"], *prepared["corpora"]}):
            hashes = [one["corpora"].get(corpus, {}).get("hash", "none") for one in (known, prepared)]
            if hashes[0] != hashes[1]:
                raise UserError(
                    where,
                    f"expected the corpus '{corpus}' {hashes[0][:12]} of {first[0]} for '{program}', got {hashes[1][:12]}",
                    "parts of one study are trained on the same text",
                )


def _same_recipe(program: str, places: Sequence[Path]) -> None:
    """Refuses homes whose recipes differ: their trials would not belong to one study."""
    first: tuple[Path, dict[str, Any]] | None = None
    for home in places:
        recipe = _fact(home, program, "recipe", "resolved")
        if recipe is None:
            continue
        recipe = with_defaults(recipe)
        if first is None:
            first = home, recipe
        elif found := differences(first[1], recipe):
            raise UserError(
                str(home), f"expected the recipe of {first[0]} for '{program}', got another: {found[0]}",
                "run all parts with one recipe",
            )  # fmt: skip


def _fact(home: Path, program: str, kind: str, name: str) -> Any:
    path = Home(home).labbook
    if not path.is_file():
        return None
    book = LabBook(path, readonly=True)
    try:
        return book.fact(program, kind, name)
    finally:
        book.close()


def _sound(program: str, home: Path) -> None:
    """Refuses runs whose identity is not the one that this version gives them: they were trained with other numerics."""
    for run in _runs(program, home):
        raw = read_json(run / STAGE)
        try:
            key = raw.pop("key")
            known = Stage.from_dict(raw).key == key
        except (KeyError, TypeError, ValueError, AttributeError, UserError):  # written by another version, or damaged
            known = False
        if not known:
            raise UserError(
                str(run), "expected a run with the numerics of this version, got one with others",
                "train it again with this version, or merge with the version that trained it",
            )  # fmt: skip


def _same_class(program: str, places: Sequence[Path]) -> None:
    """Refuses trials of one study that ran on different things, by which equal trials differ in their last digits."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for home in places:
        for run in (run for run in _runs(program, home) if (run / RESULT).is_file()):
            study, own = run_row(home, program, run)["study"], read_json(run / RESULT)["numeric_class"]
            known = first.setdefault(study, (home, own)) if study else (home, own)
            if other := [name for name in sorted({*own, *known[1]}) if own.get(name) != known[1].get(name)]:
                wanted, got = (", ".join(f"{name} {one.get(name)}" for name in other) for one in (known[1], own))
                raise UserError(
                    str(home),
                    f"expected the {study} of '{program}' to run on {wanted}, as in {known[0]}, got {got} ({run.name})",
                    "train that part again on the same, or merge all the same with --mixed-numerics",
                )


def _take_shared(program: str, home: Path, into: Path) -> None:
    """Copies what the program's corpora and tokenizer need, named by content, where it is missing."""
    source, target = Home(home), Home(into)
    prepared = read_json(source.program(program) / "prepared.json")
    folders = [prepared["tokenizer"], *(corpus["folder"] for corpus in prepared["corpora"].values())]
    for folder in folders:
        if (home / folder).is_dir():
            copy_folder(home / folder, into / folder)
    for name in ("prepared.json", "pinned.json"):
        path = target.program(program) / name
        if (source.program(program) / name).is_file() and not path.exists():
            shutil.copyfile(source.program(program) / name, path)


def _take_run(book: LabBook, program: str, run: Path, into: Path) -> bool:
    """Copies a run that the target lacks, or has got less far with, and writes its rows; returns whether it did."""
    target = Home(into).runs(program) / run.name
    if target.is_dir() and _worth(target) >= _worth(run):
        return False
    if target.is_dir():
        shutil.rmtree(target)
    copy_folder(run, target)
    with book:
        put_run_folder(book, run_row(into, program, target), target)
    return True


def _worth(run: Path) -> int:
    """A result is worth more than a failure, and that more than what was only begun."""
    return 2 if (run / RESULT).is_file() else 1 if (run / FAILED).is_file() else 0


def _take_facts(book: LabBook, program: str, home: Path) -> None:
    """Takes over facts that the target lacks; which runs are in use is the union of all homes."""
    path = Home(home).labbook
    if not path.is_file():
        return
    source = LabBook(path, readonly=True)
    with book:
        for kind in _KINDS:
            for name, value in source.facts(program, kind).items():
                if book.fact(program, kind, name) is None:
                    book.put_fact(program, kind, name, value)
        for study, runs in source.facts(program, "used").items():
            known = book.fact(program, "used", study) or []
            book.put_fact(program, "used", study, list(dict.fromkeys([*known, *runs])))
    source.close()
