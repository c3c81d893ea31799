"""How the turns of the chats that a model has read are marked: it is talked to, asked and exported in no other way. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from windtunnel.corpus.mixture import corpus_of

_CHATS = ("messages", "user", "chosen")
"""Keys of a corpus whose documents are turns, see ``SourceConfig.chats``."""


def template_of(corpora: Mapping[str, Mapping[str, Any]], mixture: Iterable[tuple[str, float]]) -> str | None:
    """The template of the chats in a mixture, of the heaviest where a decay mixes several; None without chats.

    Args:
        corpora: tables of a resolved recipe. One that was stored before corpora had templates means ChatML.
    """
    chats = [
        (weight, corpora[corpus_of(name)].get("template") or "chatml")
        for name, weight in mixture
        if any(corpora.get(corpus_of(name), {}).get(key) for key in _CHATS)
    ]
    return max(chats, key=lambda chat: chat[0])[1] if chats else None


def template_read(book: Any, run: str) -> str | None:
    """The template of the chats or pairs that a run has read, or the nearest one that it grew from; None if none has.

    What was noted when the run was finished counts before its program's recipe, which may have changed since.
    """
    row = book.run(run)
    while row is not None:
        noted = book.fact(row["program"], "model", row["id"].partition("/")[2]) or {}
        if noted.get("template"):
            return noted["template"]
        corpora = (book.fact(row["program"], "recipe", "resolved") or {}).get("corpus", {})
        for segment in reversed(row["config"]["plan"]["segments"]):
            if found := template_of(corpora, segment["mixture"]):
                return found
        row = book.run(row["parent"]) if row["parent"] else None
    return None
