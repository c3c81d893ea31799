"""Contradictions in branches that change the model they grow from. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from windtunnel.recipe_schema import Recipe


class Problem(NamedTuple):
    """A contradiction: the key to point at, what is wrong, the way out."""

    key: str
    problem: str
    fix: str = ""


def growth(recipe: Recipe) -> Iterator[Problem]:
    """What a mixture of experts states that cannot be, and what other branches state that only it can have."""
    for name, branch in recipe.branch.items():
        key = f"branch.{name}"
        if branch.kind != "moe":
            for field, words in (("experts", "experts"), ("stable", "a stable part")):
                if getattr(branch, field) is not None:
                    problem = f"expected kind = 'moe' beside {words}, got {branch.kind!r}"
                    yield Problem(f"{key}.{field}", problem, "leave one of the two out")
        elif branch.experts is not None and branch.experts.top_k > branch.experts.count:
            problem = f"expected at most the {branch.experts.count} experts, got {branch.experts.top_k}"
            yield Problem(f"{key}.experts.top_k", problem, "a token passes through that many")
