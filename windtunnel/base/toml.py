"""TOML files and overrides, read so that an error can name the line. Needs no torch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from windtunnel.base.errors import RecipeError

MAXIMUM_BYTES = 1 << 20
"""A recipe is a page or two; anything near a megabyte is some other file."""

KeyPath = tuple[str, ...]
_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|\#[^\n]*|[A-Za-z0-9_-]+|\n|[^\S\n]+|.',
    re.DOTALL,
)


@dataclass(frozen=True)
class Document:
    """The tables of a TOML file, and the line on which each key stands."""

    tables: dict[str, Any]
    lines: dict[KeyPath, int]


def read_toml(path: Path, shown: str) -> Document:
    """Reads a TOML file.

    Args:
        shown: the file's name in error messages.

    Raises:
        RecipeError: the file is missing, unreadable, no UTF-8, too large, empty or no TOML; the message names the line.
    """
    try:
        if not path.is_file():
            raise RecipeError(
                shown, "expected a recipe file, found " + ("a folder" if path.is_dir() else "nothing there")
            )
        with path.open("rb") as file:
            data = file.read(MAXIMUM_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(shown, f"the recipe cannot be read ({reason})") from None
    if len(data) > MAXIMUM_BYTES:
        raise RecipeError(
            shown, "expected a recipe of at most 1 MB, got a larger file", "name the .toml file, not the data"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{shown}:{line}", f"expected UTF-8, got the byte 0x{data[error.start]:02x}", "save it as UTF-8"
        ) from None
    if not text.strip():
        raise RecipeError(
            shown, "expected a recipe, got an empty file", "write one with: windtunnel new NAME --data PATH"
        )
    return Document(_parse(text, shown), dict(key_lines(text)))


def _parse(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise RecipeError(shown, "expected TOML, got values nested too deeply") from None
    except ValueError as error:
        match = re.search(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)$", str(error), re.DOTALL)
        problem = match[1] if match else str(error)
        line = int(match[2]) if match and match[2] else text.rstrip().count("\n") + 1
        known = dict(key_lines("\n".join(text.splitlines()[: line - 1])))
        again = re.match(r"\s*([A-Za-z0-9_-]+)\s*=", text.splitlines()[line - 1] if text.splitlines() else "")
        if problem.startswith("Cannot overwrite") and again:
            first = [n for key, n in known.items() if key[-1] == again[1]]
            problem = f"the key '{again[1]}' stands twice" + (f", first on line {first[-1]}" if first else "")
        raise RecipeError(f"{shown}:{line}", f"expected TOML: {problem[:1].lower()}{problem[1:160]}") from None


def key_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    """Key paths and line numbers of TOML text, tables included; keys of inline tables too.

    A scanner, no parser: it trusts the text to be valid and yields what it recognises if it is not.
    """
    table: KeyPath = ()
    stack: list[tuple[str, KeyPath]] = []
    """Open brackets, each with the key path that it belongs to."""
    key: list[str] = []
    value_of: KeyPath | None = None
    header, line = False, 1
    for token in _TOKEN.findall(text):
        depth_is_table = not stack or stack[-1][0] == "{"
        if token == "\n" and not stack:
            key, value_of, header = [], None, False
        elif token == "=" and value_of is None and depth_is_table:
            value_of = (*(stack[-1][1] if stack else table), *key)
            yield value_of, line
            key = []
        elif token in "[{" and (value_of is not None or (header is False and stack)):
            stack.append((token, value_of or stack[-1][1]))
            value_of = None if token == "{" else value_of
        elif token in "[" and not stack and not key:
            header = True
        elif token == "]" and header:
            if key:
                table = tuple(key)
                yield table, line
            key = []
        elif token in "]}" and stack:
            stack.pop()
            value_of = stack[-1][1] if stack and stack[-1][0] == "[" else ()
        elif token == "," and stack and stack[-1][0] == "{":
            key, value_of = [], None
        elif value_of is None and token not in ".,=" and not token.isspace() and not token.startswith("#"):
            key.append(token[1:-1] if token[0] in "\"'" else token)
        line += token.count("\n")


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """Reads ``a.b=c``; the value is TOML, or the bare text where it is none; ``none`` removes the key (the value None).

    Raises:
        RecipeError: there is no ``=`` or no key.
    """
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise RecipeError(
            "--set", f"expected KEY=VALUE, got {text[:60]!r}", "write for example --set trunk.tokens=6.4M"
        )
    value = value.strip()
    if value == "none":
        return path, None
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return path, value
    return path, parsed["value"] if set(parsed) == {"value"} else value


def put(tables: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Sets or (with None) removes the value at a key path, in place.

    Raises:
        RecipeError: a part of the path is a value and not a table.
    """
    for depth, part in enumerate(path[:-1]):
        inner: Any = tables.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {'.'.join(path)}", f"expected a table at '{'.'.join(path[: depth + 1])}', got a value"
            )
        tables = cast(dict[str, Any], inner)
    if value is None:
        tables.pop(path[-1], None)
    else:
        tables[path[-1]] = value
