"""What the corpora of a program came to once they were built. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from windtunnel.corpus.mixture import DataPlan


@dataclass(frozen=True)
class Prepared:
    """Tokenizer and corpora as they were built: names, folders relative to the home, content hashes, rows and sizes.

    ``origin`` is the stage key and step of the finished model whose weights the trunk starts from, if it has one.
    """

    tokenizer: str
    tokenizer_hash: str
    vocab: int
    corpora: dict[str, dict[str, Any]]
    origin: dict[str, Any] | None = None

    def hashes(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((name, corpus["hash"]) for name, corpus in self.corpora.items()))

    def rows(self, row: int) -> dict[str, int]:
        """Rows of each corpus."""
        return {name: max(0, (corpus["tokens"] - 1) // row) for name, corpus in self.corpora.items()}

    def by_length(self, row: int, least: int) -> dict[str, dict[str, Any]]:
        """``length_facts`` of each corpus for that row and dividing length, where they were counted."""
        key = f"{row}/{least}"
        return {
            name: facts["by_length"][key] for name, facts in self.corpora.items() if key in facts.get("by_length", {})
        }

    def rows_of(self, plan: DataPlan) -> dict[str, int]:
        """Rows of each corpus, or part of one, that a data plan reads."""
        if plan.long_from:
            found = self.by_length(plan.row, plan.long_from)
            parts = ((name, *name.split(":")) for name in plan.corpora)
            return {name: facts["rows"] for name, corpus, part in parts if (facts := found[corpus][part])}
        if plan.packed:
            return {name: facts["packed"]["rows"] for name, facts in self.corpora.items() if "packed" in facts}
        return self.rows(plan.row)
