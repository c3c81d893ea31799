"""The page's templates: filters that show numbers to people, macros, and the words that a reader sees. Escapes everything."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from windtunnel.base.errors import RecipeError
from windtunnel.base.units import Length, bytes_size, duration, minus, si
from windtunnel.report.cost import cost_line
from windtunnel.tunnel.space import shown_value

_THIN = "\u202f"
_SETTINGS = {
    "learning_rate": "learning rate", "init_std": "initial spread of weights", "scale_emb": "embedding multiplier",
    "scale_depth": "depth multiplier", "weight_decay": "weight decay", "beta2": "memory of the second moment, β₂",
    "warmup": "warmup share", "qk_norm": "norm of queries and keys", "decay": "form of weight decay",
}  # fmt: skip


def visible(html: str) -> str:
    """The words that a reader sees, without model output, the recipe's text and the hidden titles of figures."""
    return re.sub(r"<pre.*?</pre>|<title>.*?</title>|<[^>]*>", " ", html, flags=re.DOTALL)


def macro(name: str, *values: Any) -> Markup:
    """One macro of the sections' template, rendered with autoescape."""
    module = environment().get_template("sections.html.j2").module
    return Markup(getattr(module, name)(*values))


def package_text(name: str) -> str:
    """A file that lies beside this module."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Templates with autoescape; an unknown name in one is an error."""
    env = Environment(
        loader=PackageLoader("windtunnel.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    env.filters |= {
        "si": lambda value: si(float(value)), "bits": lambda value: f"{value:.4f}", "fixed": lambda v, d: minus(f"{v:.{d}f}"),
        "percent": lambda v, d: minus(f"{100 * v:+.{d}f}{_THIN}%"), "times": times, "size": bytes_size,
        "abs_percent": lambda v, d: f"{abs(100 * v):.{d}f}{_THIN}%", "duration": _duration, "human": human, "moment": _moment,
        "shown": shown_value,
        "share": lambda v: "–" if v is None else f"{100 * v:.3g}{_THIN}%",
        "length_of": _length, "cost_line": cost_line,
    }  # fmt: skip
    return env


def times(value: float) -> str:
    """A ratio with two digits: 3.4, 13, 130."""
    return f"{float(f'{value:.2g}'):g}"


def _duration(seconds: float) -> str:
    return duration(seconds).replace(" ", _THIN)


def _length(text: Any) -> str:
    """A length of the recipe in short form; as it stands if it is none."""
    try:
        return str(Length.parse(text))
    except RecipeError:
        return str(text)


def human(text: str) -> str:
    """Names of hyper-parameters in words."""
    for name, words in _SETTINGS.items():
        text = re.sub(rf"\b{name}\b", words, text)
    return text


def _moment(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d, %H:%M UTC")
    except ValueError:
        return text or "at an unknown time"
