"""Records to text through Jinja templates, in a sandbox with limits.

A template comes from a recipe, and recipes are passed around: it may read the record's fields, loop over them and use the
filters listed here, nothing else. No Python attribute is reachable, and size and time are bounded: loops, calls and filters
look at the clock even where nothing is written, and what could grow a string faster than its parts (repetition, variables,
macros, replacing and joining without limit) is refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from windtunnel.base.errors import RecipeError

MAXIMUM_TEMPLATE = 10_000
MAXIMUM_OUTPUT = 1 << 24
_JOINS = 50
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
_REFUSED = (
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Block, nodes.Extends,
    nodes.Include, nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier, nodes.NSRef,
)  # fmt: skip
"""Statements that a template of a record does not need: they can call themselves, or double a text with every line."""


_COUNTED = "_counted"
_LIMITS = "the template's output exceeds its limits of 16 MB or 2 s"


_RECORD_FIX = "write for example '{{ title }}: {{ body }}'"
_CHAT_FIX = "a chat template loops over messages and writes their role and content; it needs no 'set' and no macro"


class RecordError(Exception):
    """A record cannot be turned into a document; the message is a clause."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, narrowed to an allow-list."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, trim: bool = False) -> None:
        super().__init__(
            autoescape=False, undefined=StrictUndefined, finalize=lambda v: "" if v is None else v,
            trim_blocks=trim, lstrip_blocks=trim,
        )  # fmt: skip
        self.globals.clear()
        self.deadline = math.inf
        self.filters = {name: self._timed(self.filters[name]) for name in _FILTERS}
        self.filters |= {"replace": self._replace, "join": self._join, _COUNTED: self._counted}
        self.tests = {
            name: self.tests[name] for name in self.tests if name in _TESTS or name in ("==", "eq", "ne", "lt", "gt")
        }

    def bounded(self, source: str) -> nodes.Template:
        """The parsed template, its loops made to look at the clock.

        Raises:
            TemplateSyntaxError: it is no template, or has a statement or a loop that is not allowed here.
        """
        tree = self.parse(source)
        joins = sum(1 for _ in tree.find_all(nodes.Add)) + sum(
            len(node.nodes) - 1 for node in tree.find_all(nodes.Concat)
        )
        if joins > _JOINS:  # each may hold the whole text so far once more
            raise TemplateSyntaxError(f"at most {_JOINS} joins with + or ~ are allowed, not {joins}", 1)
        for node in tree.find_all(nodes.Node):
            if isinstance(node, _REFUSED) or (isinstance(node, nodes.For) and node.recursive):
                name = "recursive" if isinstance(node, nodes.For) else type(node).__name__.lower()
                raise TemplateSyntaxError(
                    f"fields, loops, conditions and filters are allowed, not '{name}'", node.lineno
                )
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        return tree

    def tick(self) -> None:
        """Raises RecordError once the time is over."""
        if time.monotonic() > self.deadline:
            raise RecordError(_LIMITS)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.tick()
        if getattr(obj, "__name__", "") == "join" and isinstance(getattr(obj, "__self__", None), str) and args:
            return self._join(args[0], obj.__self__)
        return super().call(context, obj, *args, **kwargs)

    def _counted(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def _timed(self, use: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(use)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return use(*args, **kwargs)

        return timed

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        self.tick()
        text = str(text)
        times = text.count(old) if count < 0 else min(count, text.count(old))
        if len(text) + times * (len(new) - len(old)) > MAXIMUM_OUTPUT:
            raise RecordError(_LIMITS)
        return text.replace(old, new, count)

    def _join(self, items: Any, between: str = "", attribute: str | None = None) -> str:
        self.tick()
        parts = [str(item if attribute is None else self.getitem(item, attribute)) for item in items]
        if sum(map(len, parts)) + len(between) * len(parts) > MAXIMUM_OUTPUT:
            raise RecordError(_LIMITS)
        return str(between).join(parts)

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


def compile_template(source: str, where: str, *, chat: bool = False) -> Callable[[Mapping[str, Any]], str]:
    """A function from a record's fields to text.

    Args:
        chat: read as Hugging Face reads chat templates: a block leaves no blanks before it and no line end behind it.

    Raises:
        RecipeError: the template is longer than allowed, no template, or uses something outside the sandbox by name.
        RecordError: (when called) a field is missing, or a limit is exceeded.
    """
    if len(source) > MAXIMUM_TEMPLATE:
        raise RecipeError(where, f"expected a template of at most {MAXIMUM_TEMPLATE} characters, got {len(source)}")
    try:
        sandbox = _Sandbox(trim=chat)
        template = sandbox.from_string(sandbox.bounded(source))
    except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
        said = error if isinstance(error, TemplateError) else "it is nested too deeply"
        raise RecipeError(where, f"expected a Jinja template: {said}", _CHAT_FIX if chat else _RECORD_FIX) from None

    def render(fields: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size, sandbox.deadline = 0, time.monotonic() + SECONDS
        try:
            for piece in template.generate({str(k): v for k, v in fields.items()}):
                pieces.append(piece)
                size += len(piece)
                sandbox.tick()
                if size > MAXIMUM_OUTPUT:
                    raise RecordError(_LIMITS)
        except TemplateError as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error.message}") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error}") from None
        except MemoryError:
            raise RecordError(_LIMITS) from None
        return "".join(pieces)

    return render
