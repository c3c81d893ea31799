"""The texts of test sets that a corpus must not contain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from windtunnel.base.errors import DataError
from windtunnel.corpus.files import RECORD_SUFFIXES, TEXT_SUFFIXES, Damaged, File, find_files

_FIELDS = ("query", "question", "prompt", "ctx", "context", "passage", "goal", "text", "answer", "chosen", "rejected")


def read_test_sets(paths: Iterable[str], base: Path) -> list[str]:
    """Every text of the listed files: of a JSONL record its questions with each of its choices, of a text file all of it.

    Raises:
        DataError: a file is missing, damaged, or holds no text of a known field.
    """
    texts: list[str] = []
    for path in paths:
        for file in find_files(path, base, _accepts):
            found = list(_texts(file))
            if not found:
                problem = "expected test texts (query, choices, text, …), found none"
                raise DataError(file.name, problem, "check the list decontaminate")
            texts.extend(found)
    return texts


def _accepts(file: File) -> bool:
    return file.suffixes[0] in TEXT_SUFFIXES or RECORD_SUFFIXES.get(file.suffixes[0]) in ("jsonl", "json")


def _texts(file: File) -> Iterator[str]:
    try:
        with file.open() as stream:
            if file.format in ("text", "markdown"):
                yield stream.read().decode()
                return
            records: Iterable[Any] = json.loads(stream.read()) if file.format == "json" else map(json.loads, stream)
            for record in records:
                yield from _of_record(record)
    except Damaged as error:
        raise DataError(file.name, str(error), "fetch the file again") from None
    except ValueError:
        problem = "expected UTF-8 text or JSON records, found something else"
        raise DataError(file.name, problem, "check the list decontaminate") from None


def _of_record(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        return
    fields = cast(dict[str, Any], record)
    head = " ".join(fields[name] for name in _FIELDS if isinstance(fields.get(name), str))
    choices = [choice for choice in fields.get("choices") or [] if isinstance(choice, str)]
    for text in [f"{head} {choice}" for choice in choices] or [head]:
        if text.strip():
            yield text
    for turn in fields.get("messages") or []:
        if isinstance(turn, dict) and isinstance(turn.get("content"), str):
            yield turn["content"]
