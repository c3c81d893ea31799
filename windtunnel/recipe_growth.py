"""Contradictions in branches that change the model they grow from. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from windtunnel.base.units import Length
from windtunnel.posttrain.config import GrownConfig
from windtunnel.recipe_schema import Recipe


class Problem(NamedTuple):
    """A contradiction: the key to point at, what is wrong, the way out."""

    key: str
    problem: str
    fix: str = ""


_ALIGNED = 8
"""Values of bf16 in 16 bytes; widths are multiples of the head dimension anyway."""
_ONLY = {"experts": ("moe",), "context": ("long",), "stable": ("moe", "long"), "batch_schedule": ("moe", "long")}
_WORDS = {
    "experts": "experts",
    "context": "a longer context",
    "stable": "a stable part",
    "batch_schedule": "a batch schedule",
}


def growth(recipe: Recipe) -> Iterator[Problem]:
    """What a mixture of experts or a longer context states that cannot be, and what others state that only they can have."""
    for name, branch in recipe.branch.items():
        key = f"branch.{name}"
        for field, kinds in _ONLY.items():
            if getattr(branch, field) is not None and branch.kind not in kinds:
                wanted = " or ".join(f"'{kind}'" for kind in kinds)
                problem = f"expected kind = {wanted} beside {_WORDS[field]}, got {branch.kind!r}"
                yield Problem(f"{key}.{field}", problem, "leave one of the two out")
        if branch.experts is not None and branch.experts.top_k > branch.experts.count:
            problem = f"expected at most the {branch.experts.count} experts, got {branch.experts.top_k}"
            yield Problem(f"{key}.experts.top_k", problem, "a token passes through that many")
        inner = recipe.model.shape.ff if recipe.model.shape else None
        if branch.kind == "moe" and inner is not None and inner % _ALIGNED:
            fix = f"write {-(-inner // _ALIGNED) * _ALIGNED}: a GPU's grouped products divide rows by 16 bytes"
            problem = f"expected a multiple of {_ALIGNED} for the experts of branch.{name}, got {inner}"
            yield Problem("model.shape.ff", problem, fix)
        if branch.kind == "moe":
            yield from _changes(branch, key, recipe.model.row, "model.row")
        if branch.kind == "long":
            yield from _longer(recipe, name)


def _changes(branch: GrownConfig, key: str, row: int, named: str) -> Iterator[Problem]:
    """What a branch's batch schedule states that cannot be."""
    before: Length | None = None
    for i, change in enumerate(branch.batch_schedule or (), 1):
        where, after = f"{key}.batch_schedule.[{i}]", change.after
        if change.batch % row:
            fix = f"write {max(1, round(change.batch / row)) * row}"
            yield Problem(where, f"expected a multiple of {named} = {row}, got {change.batch}", fix)
        if after.unit == "fraction":
            yield Problem(where, f"expected a length of its own, got the share {after}", "write tokens or steps")
        elif before is not None and before.unit != after.unit:
            yield Problem(
                where, f"expected a length like the one before it, {before}, got {after}", "write all in tokens"
            )
        elif before is not None and after.value <= before.value:
            yield Problem(where, f"expected a change after the one before it, at {before}, got {after}")
        before = after


def at_a_step(recipe: Recipe, name: str) -> Iterator[Problem]:
    """Where a branch of a branch begins is a step of that one, whose tokens may have been read twice or by another batch."""
    branch, key = recipe.branch[name], f"branch.{name}"
    parent = recipe.branch.get(branch.parent)
    if parent is not None and parent.kind == "soup" and branch.at is not None:
        yield Problem(f"{key}.at", f"expected none, since a soup has no steps, got {branch.at}", "leave it out")
    elif parent is not None and branch.at is not None and branch.at.unit != "steps":
        problem = f"expected a step of {branch.parent!r}, got {branch.at}"
        yield Problem(f"{key}.at", problem, "write for example '300 steps', or leave it out for its end")


def _longer(recipe: Recipe, name: str) -> Iterator[Problem]:
    branch, key = recipe.branch[name], f"branch.{name}"
    above = list(recipe.branch)[: list(recipe.branch).index(name)]
    parents = [other for other in above if recipe.branch[other].kind == "long"]
    if branch.parent != "trunk" and branch.parent not in parents:
        known = ", ".join(["trunk", *parents])
        yield Problem(f"{key}.parent", f"expected the trunk or a long branch above ({known}), got {branch.parent!r}")
        return
    parent = None if branch.parent == "trunk" else recipe.branch[branch.parent]
    if parent is not None and parent.decays:
        fix = f"give branch.{branch.parent} a stable part and no tokens, and this one its decay"
        yield Problem(f"{key}.parent", f"expected a parent that does not decay, got {branch.parent!r}", fix)
    yield from at_a_step(recipe, name)
    context = branch.context
    if context is None:
        yield Problem(f"{key}.context", "expected its rows, got none", "write for example { row = 2048, theta = 1e6 }")
        return
    before = recipe.model.row if parent is None or parent.context is None else parent.context.row
    if context.row <= before:
        yield Problem(f"{key}.context.row", f"expected more than its parent's {before} tokens, got {context.row}")
    if branch.batch is not None and branch.batch % context.row:
        rows = max(1, round(branch.batch / context.row))
        fix = f"write {rows * context.row} for {rows} rows"
        yield Problem(f"{key}.batch", f"expected a multiple of context.row = {context.row}, got {branch.batch}", fix)
    yield from _changes(branch, key, context.row, "context.row")
    if context.long_from is not None and context.long_share is None:
        yield Problem(f"{key}.context.long_from", "expected long_share beside it, got none", "write long_share = 0.44")
    if context.long_from is not None and context.long_from > context.row:
        problem = f"expected at most context.row = {context.row}, got {context.long_from}"
        yield Problem(f"{key}.context.long_from", problem, "longer documents are cut to rows")
    pairs = [name for name in recipe.long_mixture(name) if recipe.corpus[name].pairs]
    if context.long_share is not None and pairs:
        yield Problem(f"{key}.mixture", f"expected text or chats to pack into rows, got the pairs of {pairs[0]!r}")
    chain = [recipe.branch[other] for other in _ancestors(recipe, name)]
    way = next((b.context.scaling for b in chain if b.context and b.context.scaling), "none")
    if context.dynamic_ntk is not None and way not in ("none", "ntk"):
        problem = f"expected it beside scaling 'none' or 'ntk', got {way!r}"
        yield Problem(f"{key}.context.dynamic_ntk", problem, "leave it out: the model is used to its own way")
    if context.factor is not None and context.scaling == "none":
        yield Problem(f"{key}.context.factor", "expected a scaling beside a factor, got 'none'", "leave one out")


def _ancestors(recipe: Recipe, name: str) -> Iterator[str]:
    """A branch, and the branches that it grows from."""
    while name in recipe.branch:
        yield name
        name = recipe.branch[name].parent
