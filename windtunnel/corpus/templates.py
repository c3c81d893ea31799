"""Records to text through Jinja templates, in a sandbox with limits.

A template comes from a recipe, and recipes are passed around: it may read the record's fields, loop over them and use the
filters listed here, nothing else. No Python attribute is reachable, repetition of strings is refused, and size and time of
the output are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from windtunnel.base.errors import RecipeError

MAXIMUM_TEMPLATE = 10_000
MAXIMUM_OUTPUT = 1 << 24
SECONDS = 2.0
_FILTERS = (
    "capitalize", "default", "first", "int", "join", "last", "length", "list", "lower", "map", "reject", "replace", "round",
    "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
)  # fmt: skip
_TESTS = (
    "defined",
    "undefined",
    "none",
    "string",
    "number",
    "mapping",
    "sequence",
    "iterable",
    "equalto",
    "in",
    "true",
    "false",
)
_METHODS = frozenset(
    {"strip", "lstrip", "rstrip", "lower", "upper", "title", "split", "splitlines", "startswith", "endswith", "items", "keys",
     "values", "get", "join"}
)  # fmt: skip
_LOOP = ("index", "index0", "first", "last", "length")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, narrowed to an allow-list."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(autoescape=False, undefined=StrictUndefined, finalize=lambda v: "" if v is None else v)
        self.globals.clear()
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.tests = {
            name: self.tests[name] for name in self.tests if name in _TESTS or name in ("==", "eq", "ne", "lt", "gt")
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, LoopContext):
            return attr in _LOOP
        if attr not in _METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would let ``str.format`` pass in a safe form, whose width is not bounded."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not numbers:
            raise SecurityError(f"the operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)


def is_template(value: str) -> bool:
    """Whether a recipe value is a template rather than the name of a field."""
    return "{{" in value or "{%" in value


class RecordError(Exception):
    """A record cannot be turned into a document; the message is a clause."""


def compile_template(source: str, where: str) -> Callable[[Mapping[str, Any]], str]:
    """A function from a record's fields to text.

    Raises:
        RecipeError: the template is longer than allowed, no template, or uses something outside the sandbox by name.
        RecordError: (when called) a field is missing, or a limit is exceeded.
    """
    if len(source) > MAXIMUM_TEMPLATE:
        raise RecipeError(where, f"expected a template of at most {MAXIMUM_TEMPLATE} characters, got {len(source)}")
    try:
        template = _Sandbox().from_string(source)
    except TemplateError as error:
        raise RecipeError(
            where, f"expected a Jinja template: {error}", "write for example '{{ title }}: {{ body }}'"
        ) from None

    def render(fields: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size, end = 0, time.monotonic() + SECONDS
        try:
            for piece in template.generate({str(k): v for k, v in fields.items()}):
                pieces.append(piece)
                size += len(piece)
                if size > MAXIMUM_OUTPUT or time.monotonic() > end:
                    raise RecordError("the template's output exceeds its limits of 16 MB or 2 s")
        except TemplateError as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error.message}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error}") from None
        return "".join(pieces)

    return render
