"""Fields that a hashed dataclass gained after it was first released.

What was trained before such a field existed must keep its hash. So a field declared with ``later`` is left out of the
dictionary that is hashed, and stored, as long as it has its default; a missing key is read as that default.
"""

from __future__ import annotations

from dataclasses import asdict, field, fields
from typing import Any, TypeVar

T = TypeVar("T")
_LATER = "later"


def later(default: T) -> T:
    """A dataclass field with a default that came later: at its default it is no part of any hash."""
    return field(default=default, metadata={_LATER: True})


def as_identity(value: Any) -> dict[str, Any]:
    """``asdict`` without the later fields of the dataclass that have their default."""
    raw = asdict(value)
    for f in fields(value):
        if _LATER in f.metadata and getattr(value, f.name) == f.default:
            del raw[f.name]
    return raw
