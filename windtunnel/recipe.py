"""Recipes: one TOML file that describes a whole program, read strictly before any work. Needs no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from windtunnel.base.errors import RecipeError
from windtunnel.base.toml import KeyPath, parse_override, put, read_toml
from windtunnel.recipe_checks import check, check_files
from windtunnel.recipe_errors import nearest, recipe_error
from windtunnel.recipe_schema import Origin, Recipe

__all__ = [
    "Difference",
    "Recipe",
    "check_files",
    "differences",
    "load_recipe",
    "parse_recipe",
    "shipped",
    "shipped_path",
]


def shipped_path(name: str) -> Path:
    """Where a recipe of the package lies."""
    return Path(__file__).parent / "recipes" / f"{name}.toml"


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in shipped_path("x").parent.glob("*.toml"))


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, or one that comes with the package by its name, and checks every value.

    Args:
        overrides: ``a.b=c`` each, applied in order before anything is checked.

    Raises:
        RecipeError: one line with file, line, key, expectation, value received and the way out.
    """
    path, name = Path(path_or_name), str(path_or_name)
    is_name = path.suffix != ".toml" and len(path.parts) == 1
    if is_name and name in shipped():
        path, shown, base = shipped_path(name), f"{name}.toml", Path.cwd()
    else:
        if is_name and not path.exists():
            fix = f"{nearest(name, shipped())} (a file of your own ends in .toml)"
            raise RecipeError("recipe", f"expected a file or a shipped recipe, got {name[:80]!r}", fix)
        shown, base = name, path.parent
    document = read_toml(path, shown)
    origin = Origin(shown=shown, base=base.absolute(), lines=document.lines)
    return parse_recipe(document.tables, overrides, origin)


def introduction(name: str) -> str:
    """What a shipped recipe says of itself in its first comment: time, download, what to expect."""
    lines = shipped_path(name).read_text(encoding="utf-8").splitlines()[1:]
    comment = takewhile(lambda line: line.startswith("# "), lines)
    return "\n".join(line[2:] for line in comment)


def parse_recipe(tables: Mapping[str, Any], overrides: Sequence[str] = (), origin: Origin | None = None) -> Recipe:
    """Checks a recipe given as tables, such as the stored ``Recipe.resolved()`` of an earlier run.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    origin, raw = origin or Origin(), copy.deepcopy(dict(tables))
    keys: list[KeyPath] = []
    for override in overrides:
        path, value = parse_override(override)
        put(raw, path, value)
        keys.append(path)
    origin = Origin(origin.shown, origin.base, origin.lines, frozenset(keys), raw)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise recipe_error(error, origin) from None
    recipe._origin = origin  # pyright: ignore[reportPrivateUsage]  (the model is frozen; its origin is no part of its value)
    check(recipe)
    return recipe


def with_defaults(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A stored ``Recipe.resolved()`` with the defaults of keys that recipes have gained since, if it is still a recipe."""
    try:
        return Recipe.model_validate(tables).resolved()
    except ValidationError:
        return dict(tables)


class Difference(NamedTuple):
    """One value that two recipes do not share; None where one of them has no such key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What differs between two resolved recipes, in the order of their keys."""
    return list(_differences(old, new, ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[Difference]:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif before != after:
            yield Difference(f"{prefix}{key}", before, after)


def _shown(value: object) -> str:
    return "nothing" if value is None else "a table" if isinstance(value, Mapping) else str(value)
