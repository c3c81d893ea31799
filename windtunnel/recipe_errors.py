"""From pydantic's findings to one line: field, expected, got, way out. Needs no torch."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from windtunnel.base.errors import RecipeError
from windtunnel.base.toml import KeyPath
from windtunnel.recipe_schema import Origin, Recipe

_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected a text in quotes",
    "bool_type": "expected true or false",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "string_pattern_mismatch": "expected another form of text",
    "string_too_short": "expected a text that is not empty",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The way out for an unknown name: the nearest known one, or all of them if there are few."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, names, 1, 0.6) or [n for n in names if n.lower() == word.lower()]
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known here: {', '.join(names[:20])}" if names else ""


def shown(value: object, limit: int = 60) -> str:
    """A value received, short enough for one line."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = repr(value) if isinstance(value, str | int | float | list) else str(value)  # pyright: ignore[reportUnknownArgumentType]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def recipe_error(error: ValidationError, origin: Origin) -> RecipeError:
    """The first finding, in the order of the file, as one line; the others are counted."""
    items = error.errors(include_url=False)
    paths = {key_path(item["loc"]) for item in items}
    # A list with a wrong item also counts as too short: only the item is worth saying.
    inner = [item for item in items if not any(_inside(path, key_path(item["loc"])) for path in paths)]
    found = sorted(inner, key=lambda item: _line(item, origin))
    first = found[0]
    path = key_path(first["loc"])
    problem, fix = _explain(first, path)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return RecipeError(origin.where(path), problem, fix + more if fix else more.strip())


def key_path(loc: Sequence[int | str]) -> KeyPath:
    """A location as the keys of the recipe; a position in a list becomes ``[2]``, pydantic's own marks are left out."""
    parts = (f"[{part + 1}]" if isinstance(part, int) else part for part in loc)
    return tuple(
        part for part in parts if part != "[key]" and not part.startswith(("function-", "nullable", "is-instance"))
    )


def _inside(path: KeyPath, table: KeyPath) -> bool:
    return len(path) > len(table) and path[: len(table)] == table


def _line(item: ErrorDetails, origin: Origin) -> tuple[int, int]:
    path = key_path(item["loc"])
    missing = item["type"] == "missing"
    for depth in range(len(path), 0, -1):
        if path[:depth] in origin.lines:
            return origin.lines[path[:depth]], missing
    return (1 << 30 if path else 0), missing


def _explain(item: ErrorDetails, path: KeyPath) -> tuple[str, str]:
    kind, context, value = item["type"], item.get("ctx", {}), item.get("input")
    if kind == "windtunnel":
        return str(context["problem"]), str(context["fix"]) or _example(path)
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "extra_forbidden":
        owner = table_model(path[:-1])
        return "expected a known key, got an unknown one", nearest(path[-1], owner.model_fields if owner else ())
    if kind == "missing":
        return "expected a value, got none", _example(path)
    if kind == "literal_error":
        return f"expected {context['expected']!s}, got {shown(value)}", _close_literal(path, value)
    return f"{_bounds(kind, context)}, got {_received(kind, value)}", _example(path)


def _received(kind: str, value: object) -> str:
    if kind in ("too_short", "too_long") and isinstance(value, Sequence | Mapping):
        return "none" if not value else str(len(value))  # pyright: ignore[reportUnknownArgumentType]
    return shown(value)


def _bounds(kind: str, context: Mapping[str, Any]) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    words = {
        "greater_than": "above", "greater_than_equal": "of at least", "less_than": "below", "less_than_equal": "of at most",
    }  # fmt: skip
    if kind in words:
        limit = next(context[name] for name in ("gt", "ge", "lt", "le") if name in context)
        return (
            f"expected a number {words[kind]} {limit:g}"
            if abs(limit) < 1e6
            else f"expected a number {words[kind]} {limit}"
        )
    if kind == "too_short":
        return f"expected at least {context['min_length']}"
    if kind == "too_long":
        return f"expected at most {context['max_length']}"
    if kind == "string_too_long":
        return f"expected a text of at most {context['max_length']} characters"
    return f"expected another value ({kind.replace('_', ' ')})"


def table_model(path: KeyPath) -> type[BaseModel] | None:
    """The model of the table at a key path."""
    here: Any = Recipe
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            found = here.model_fields.get(part)
            here = found.annotation if found else None
        else:  # a dictionary of tables: any name leads to its value type
            here = next((a for a in typing.get_args(here)[1:]), None)
        here = unwrapped(here)
        if typing.get_origin(here) is tuple:  # a list of tables: what each of them is
            here = unwrapped(typing.get_args(here)[0])
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def unwrapped(annotation: Any) -> Any:
    """A type without ``Annotated`` and without ``| None``."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        else:
            return annotation


def _example(path: KeyPath) -> str:
    plain = tuple(part for part in path if not part.startswith("["))
    owner = table_model(plain[:-1])
    field = owner.model_fields.get(plain[-1]) if owner and plain else None
    if field is None:
        return ""
    if field.examples:
        return f"write for example {plain[-1]} = {toml_value(field.examples[0])}"
    return f"it is: {field.description.split(';')[0]}" if field.description else ""


def _close_literal(path: KeyPath, value: object) -> str:
    if not isinstance(value, str):
        return _example(path)
    plain = tuple(part for part in path if not part.startswith("["))
    owner = table_model(plain[:-1])
    field = owner.model_fields.get(plain[-1]) if owner else None
    choices = [str(c) for c in _literals(field.annotation)] if field else []
    close = difflib.get_close_matches(value, choices, 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in typing.get_args(annotation) for choice in _literals(part)]


def toml_value(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, which also wants the one for "delete"
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value)
