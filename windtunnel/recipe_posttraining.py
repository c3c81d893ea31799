"""Contradictions in branches that are post-trained, and in the use of pairs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from windtunnel.posttrain.config import POSTTRAINED
from windtunnel.recipe_errors import nearest
from windtunnel.recipe_growth import Problem
from windtunnel.recipe_schema import Recipe

_DECAY_ONLY = ("at", "half_life")
_DPO_ONLY = ("preset", "loss", "beta", "smoothing", "margin")
_POSTTRAINED_ONLY = ("epochs", "lr", "warmup", "decay", *_DPO_ONLY)


def posttraining(recipe: Recipe) -> Iterator[Problem]:
    """Keys of another kind, parents that are none, mixtures of the wrong corpora."""
    before: list[str] = []
    for name, branch in recipe.branch.items():
        key = f"branch.{name}"
        grown = branch.kind in POSTTRAINED
        wrong = _DECAY_ONLY if grown else _POSTTRAINED_ONLY
        for stated in (field for field in wrong if getattr(branch, field) is not None):
            kinds = "'decay'" if grown else "'sft' or 'dpo'"
            yield Problem(f"{key}.{stated}", f"expected it beside kind = {kinds}, got kind = '{branch.kind}'")
        for stated in (field for field in _DPO_ONLY if branch.kind == "sft" and getattr(branch, field) is not None):
            yield Problem(f"{key}.{stated}", "expected it beside kind = 'dpo', got kind = 'sft'")
        if branch.kind == "dpo" and branch.decay is not None:
            yield Problem(f"{key}.decay", "expected it beside kind = 'sft', got kind = 'dpo'", "dpo follows a cosine")
        if grown:
            yield from _grown(recipe, name, before)
        else:
            yield from _no_pairs(recipe, f"{key}.mixture", branch.mixture or {})
        before.append(name)
    yield from _no_pairs(recipe, "trunk.mixture", recipe.mixture)


def _grown(recipe: Recipe, name: str, before: list[str]) -> Iterator[Problem]:
    branch, key = recipe.branch[name], f"branch.{name}"
    if branch.parent not in before:
        known = ", ".join(before) or "none"
        fix = nearest(branch.parent, before) if branch.parent != "trunk" else f"it grows from a finished model: {known}"
        yield Problem(f"{key}.parent", f"expected a branch that stands above, got {branch.parent!r}", fix)
    if branch.tokens is not None and branch.epochs is not None:
        yield Problem(f"{key}.epochs", "expected tokens or epochs, got both", "leave one out")
    if branch.mixture is None:
        kind = "pairs" if branch.kind == "dpo" else "chats"
        yield Problem(f"{key}.mixture", "expected weights of corpora, got none", f"write for example {{ {kind} = 1 }}")
    elif branch.kind == "sft":
        yield from _no_pairs(recipe, f"{key}.mixture", branch.mixture)
        if not any(recipe.corpus[c].chats for c in branch.mixture if c in recipe.corpus):
            yield Problem(
                f"{key}.mixture",
                "expected at least one corpus of chats, got none",
                'chats have messages = "messages", or user and assistant',
            )
    elif wrong := next((c for c in branch.mixture if c in recipe.corpus and not recipe.corpus[c].pairs), None):
        yield Problem(
            f"{key}.mixture", f"expected pairs of answers, got the corpus {wrong!r}", "pairs have chosen and rejected"
        )
    templates = sorted(
        {recipe.corpus[c].template for c in branch.mixture or () if c in recipe.corpus and recipe.corpus[c].chats}
    )
    if len(templates) > 1:
        fix = "give them the same template, or the model learns two"
        yield Problem(f"{key}.mixture", f"expected chats of one template, got {' and '.join(templates)}", fix)
    for length in ("warmup", "decay"):
        value = getattr(branch, length)
        if value is not None and value.unit not in ("fraction", "steps", "tokens"):
            yield Problem(f"{key}.{length}", f"expected a share, steps or tokens, got {value}")


def _no_pairs(recipe: Recipe, key: str, mixture: dict[str, float]) -> Iterator[Problem]:
    for name in mixture:
        if name in recipe.corpus and recipe.corpus[name].pairs:
            yield Problem(
                key, f"expected text or chats, got the pairs of answers {name!r}", "pairs are for kind = 'dpo'"
            )
