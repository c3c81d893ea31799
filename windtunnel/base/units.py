"""Counts, lengths and times: parsed once, converted once, shown in one way."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from windtunnel.base.errors import RecipeError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}
_NUMBER = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?\s*([a-zA-Z]*)\s*$")
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hours": 3600, "hour": 3600, "d": 86400, "days": 86400}

Unit = Literal["tokens", "steps", "sequences", "flops", "fraction", "per_parameter"]
_UNIT_WORDS: dict[str, Unit] = {
    "": "tokens", "tokens": "tokens", "steps": "steps", "sequences": "sequences", "flops": "flops", "n": "per_parameter",
}  # fmt: skip


def parse_count(value: object, where: str = "value") -> int:
    """Reads a whole number such as ``6.4M``, ``1.2B``, ``4096`` or ``3e6`` (k, M, B, T; powers of ten).

    Raises:
        RecipeError: the value is no positive whole number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        match = _NUMBER.match(value) if isinstance(value, str) else None
        if match is None or match[3].lower() not in _SUFFIX:
            raise RecipeError(where, f"expected a count such as 6400000 or '6.4M', got {value!r}")
        number = _mantissa(match) * _SUFFIX[match[3].lower()]
    if not math.isfinite(number) or number <= 0 or abs(number - round(number)) > 1e-6 * number:
        raise RecipeError(where, f"expected a positive whole number, got {value!r}")
    return round(number)


def _mantissa(match: re.Match[str]) -> float:
    """The number before the suffix; one beyond floating point is infinite."""
    return float(f"{match[1].replace('_', '')}e{match[2] or 0}")


def parse_seconds(value: object, where: str = "value") -> float:
    """Reads a time such as ``90``, ``30s``, ``20m``, ``1.5h`` or ``2d`` and returns seconds.

    Raises:
        RecipeError: the value is no positive time.
    """
    match = _NUMBER.match(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    unit = (match[3].lower() or "s") if match else ""
    seconds = _mantissa(match) * _SECONDS[unit] if match and unit in _SECONDS else 0.0
    if not 0 < seconds < math.inf:
        raise RecipeError(where, f"expected a time such as '30m' or '1.5h', got {value!r}")
    return seconds


@dataclass(frozen=True)
class Length:
    """How long to train, in the unit in which it was asked for.

    ``6.4M`` or ``6.4M tokens``, ``500 steps``, ``64 sequences``, ``1e18 flops``, ``10%`` (of a whole), ``20N`` (tokens for
    each non-embedding parameter).
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, value: object, where: str = "value") -> Length:
        """Reads a length.

        Raises:
            RecipeError: the value is no length, or a fraction outside (0 %, 100 %].
        """
        if isinstance(value, Length):
            return value
        text = str(value).strip()
        wish = "expected a length such as '6.4M', '500 steps', '20N' or '10%'"
        if isinstance(value, bool) or not text:
            raise RecipeError(where, f"{wish}, got {value!r}")
        if text.endswith("%"):
            try:
                share = float(text[:-1]) / 100
            except ValueError:
                raise RecipeError(where, f"{wish}, got {value!r}") from None
            if not 0 < share <= 1:
                raise RecipeError(where, f"expected a share above 0% and up to 100%, got {value!r}")
            return cls(share, "fraction")
        number, _, word = text.partition(" ")
        if not word and number[-1] in "Nn" and number[:-1]:
            number, word = number[:-1], "n"
        unit = _UNIT_WORDS.get(word.strip().lower())
        if unit is None:
            raise RecipeError(where, f"{wish}, got {value!r}")
        if unit == "per_parameter":
            try:
                ratio = float(number)
            except ValueError:
                raise RecipeError(where, f"{wish}, got {value!r}") from None
            if not 0 < ratio < math.inf:
                raise RecipeError(where, f"{wish}, got {value!r}")
            return cls(ratio, unit)
        return cls(parse_count(number, where), unit)

    def tokens(
        self,
        *,
        whole: int | None = None,
        parameters: int | None = None,
        batch: int | None = None,
        row: int | None = None,
        flops_per_token: float | None = None,
    ) -> int:
        """The length in tokens.

        Args:
            whole: tokens of the whole that a fraction refers to.
            parameters: non-embedding parameters N, for ``20N``.
            batch: tokens in a step.
            row: tokens in a sequence.
            flops_per_token: exact training FLOPs for a token.

        Raises:
            ValueError: the quantity that this unit needs was not given.
        """
        factor = {
            "tokens": 1, "steps": batch, "sequences": row, "fraction": whole, "per_parameter": parameters,
            "flops": None if flops_per_token is None else 1 / flops_per_token,
        }[self.unit]  # fmt: skip
        if factor is None:
            raise ValueError(f"a length in {self.unit} cannot be turned into tokens without what it refers to")
        return max(1, round(self.value * factor))

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{100 * self.value:g}%"
        if self.unit == "per_parameter":
            return f"{self.value:g}N"
        return si(self.value) if self.unit == "tokens" else f"{si(self.value)} {self.unit}"


def si(value: float, digits: int = 3) -> str:
    """A count for people: ``1.25B``, ``6.4M``, ``320``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 0.5 * 10.0**-digits):
            return f"{float(f'{value / size:.{digits}g}'):g}{letter}" if abs(value) < 1e15 else f"{value:.{digits}g}"
    return f"{float(f'{value:.{digits}g}'):g}"


def duration(seconds: float) -> str:
    """A time for people: ``8.2 s``, ``6 min 40 s``, ``2 h 05 min``, ``11 days``."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.0f} days"


def bytes_size(count: float) -> str:
    """A size for people in powers of 1000: ``37.4 MB``."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def parse_share(text: str, where: str) -> float:
    """Reads a share in percent, such as ``0.5%``; a bare number could be meant as either and is refused.

    Raises:
        RecipeError: it is no percentage, or not above 0 % and below 100 %.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise RecipeError(where, f"expected a share such as '0.5%', got {text[:60]!r}")
    return share


def minus(text: str) -> str:
    """A formatted number, or several, with the sign of print, "−", in place of the hyphen."""
    return text.replace("-", "−")
