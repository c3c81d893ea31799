"""Records to text through Jinja templates, in a sandbox with limits.

A template comes from a recipe, and recipes are passed around: it may read the record's fields, loop over them and use the
filters listed here, nothing else. No Python attribute is reachable, and size and time are bounded: loops, calls and filters
look at the clock even where nothing is written, whatever an operator, a filter or a method makes is counted, and what could
grow faster than that (repetition, macros, replacing and joining without limit) is refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, cast

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from windtunnel.base.errors import RecipeError

MAXIMUM_TEMPLATE = 10_000
MAXIMUM_OUTPUT = 1 << 24
MAXIMUM_WORK = 1 << 26
"""Bytes of texts, lists and numbers that a template may make on its way."""
_MOST_ITEMS = 1 << 20
"""Characters or items of which a list may be made."""
_MOST_BITS = 1 << 14
"""Of a whole number."""
_PLACES = 20
"""Decimal places to which a number may be rounded."""
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
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.With, nodes.Block, nodes.Extends, nodes.Include,
    nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier,
)  # fmt: skip
"""Statements that a template of a record does not need: they can call themselves, or double a text with every line."""


_COUNTED, _JOINED = "_counted", "_joined"
_LIMITS = "the template exceeds its limits of 16 MB of output, 64 MB on the way or 2 s"
_LISTS = ("list", "sort", "unique", "split", "splitlines")
"""What makes an object of every character, item or word."""


_RECORD_FIX = "write for example '{{ title }}: {{ body }}'"
_CHAT_FIX = "a chat template loops over messages and writes their role and content; it needs no macro"


class RecordError(Exception):
    """A record cannot be turned into a document; the message is a clause."""


class _Counted(NodeTransformer):
    """Joins with ~ as a filter that counts, like those with +."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List([cast(nodes.Expr, self.visit(part)) for part in node.nodes], lineno=node.lineno)
        return nodes.Filter(parts, _JOINED, [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, narrowed to an allow-list."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, trim: bool = False) -> None:
        super().__init__(
            autoescape=False, undefined=StrictUndefined, finalize=lambda v: "" if v is None else v,
            trim_blocks=trim, lstrip_blocks=trim,
        )  # fmt: skip
        self.globals.clear()
        self.globals["namespace"] = Namespace
        self.deadline, self.work = math.inf, 0
        self.filters = {name: self._timed(self.filters[name]) for name in _FILTERS}
        self.filters |= {"replace": self._replace, "join": self._join, "round": self._round}
        self.filters |= {_COUNTED: self._counted, _JOINED: self._join}
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
        return cast(nodes.Template, _Counted().visit(tree))

    def tick(self) -> None:
        """Raises RecordError once the time is over."""
        if time.monotonic() > self.deadline:
            raise RecordError(_LIMITS)

    def count(self, made: Any) -> Any:
        """What was just made, unless all of it together is more than a template may make."""
        if isinstance(made, str):
            self.work += len(made)
        elif isinstance(made, list | tuple | dict):
            self.work += 8 * len(cast("list[Any]", made))
        elif isinstance(made, int):
            self.work += made.bit_length() // 8
        if self.work > MAXIMUM_WORK:
            raise RecordError(_LIMITS)
        return made

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.tick()
        own, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if name == "join" and isinstance(own, str) and args:
            return self._join(args[0], own)
        _check_items(name, own)
        return self.count(super().call(context, obj, *args, **kwargs))

    def _counted(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def _timed(self, use: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(use)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in args:
                _check_items(use.__name__.removeprefix("do_"), value)
            return self.count(use(*args, **kwargs))

        return timed

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        self.tick()
        text = str(text)
        times = text.count(old) if count < 0 else min(count, text.count(old))
        if len(text) + times * (len(new) - len(old)) > MAXIMUM_OUTPUT:
            raise RecordError(_LIMITS)
        return self.count(text.replace(old, new, count))

    def _join(self, items: Any, between: str = "", attribute: str | None = None) -> str:
        self.tick()
        parts = [str(item if attribute is None else self.getitem(item, attribute)) for item in items]
        if sum(map(len, parts)) + len(between) * len(parts) > MAXIMUM_OUTPUT:
            raise RecordError(_LIMITS)
        return self.count(str(between).join(parts))

    def _round(self, value: Any, precision: int = 0, method: str = "common") -> float:
        if not (isinstance(precision, int) and abs(precision) <= _PLACES):
            raise RecordError(f"the template rounds to {precision!s:.20} places, at most {_PLACES} are allowed")
        return FILTERS["round"](value, precision, method)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, LoopContext):
            return attr in _LOOP
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        if attr not in _METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would let ``str.format`` pass in a safe form, whose width is not bounded."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not (numbers or operator == "+"):
            raise SecurityError(f"the operator {operator} is not allowed here")
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_BITS:
            raise RecordError(_LIMITS)
        return self.count(super().call_binop(context, operator, left, right))


def _check_items(name: str, value: Any) -> None:
    """Raises RecordError if a list is to be made of too much."""
    if name in _LISTS and isinstance(value, str | list | tuple) and len(cast("list[Any]", value)) > _MOST_ITEMS:
        raise RecordError(_LIMITS)


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
    except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError, NameError, OverflowError) as error:
        number = isinstance(error, ValueError | NameError | OverflowError)
        short = "it has a number too large" if number else "it is nested too deeply"
        said = error if isinstance(error, TemplateError) else short
        raise RecipeError(where, f"expected a Jinja template: {said}", _CHAT_FIX if chat else _RECORD_FIX) from None

    def render(fields: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size, sandbox.deadline, sandbox.work = 0, time.monotonic() + SECONDS, 0
        try:
            for piece in template.generate({str(k): v for k, v in fields.items()}):
                pieces.append(piece)
                size += len(piece)
                sandbox.tick()
                if size > MAXIMUM_OUTPUT:
                    raise RecordError(_LIMITS)
        except TemplateError as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error.message}") from None
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LookupError,
            NameError,
            RecursionError,
        ) as error:
            raise RecordError(f"the template {source[:40]!r} fails: {error}") from None
        except MemoryError:
            raise RecordError(_LIMITS) from None
        return "".join(pieces)

    return render
