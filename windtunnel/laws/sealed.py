"""Forecasts as files: frozen by hash before the run, read back only if untouched, scored against the outcome."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import blake3

from windtunnel.base.artefact import canonical, content_hash, explained
from windtunnel.base.errors import ArtefactError
from windtunnel.laws.fit import LawError, student_quantile
from windtunnel.laws.loss import LossLaw
from windtunnel.laws.points import Point

SCHEMA = 1
LAW, CURVE, ADAPTATION = "forecast", "curve", "adaptation"
"""Kinds of the facts in which a lab book keeps copies of sealed forecasts: of a law of sizes, a law of curves, an adaptation."""
SEALED = "sealed"
"""Kind of the facts that name the hash of every forecast sealed in a program, when it was sealed and of which run."""
_FACTS = {
    "runs": "the hashes of the runs that it read",
    "corpus": "the corpus (name or hash)",
    "heldout": "the held-out set",
    "branch": "the branch that ends in this loss",
    "branch_is": "one sentence that says what the branch is",
    "batch": "tokens in a batch",
    "base_lr": "the base learning rate",
    "kind": "'blind' or 'rehearsal'",
}
_HASH = re.compile(rb'"hash":"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Interval:
    """A value with its central 50 % and 90 % intervals."""

    value: float
    low50: float
    high50: float
    low90: float
    high90: float

    @property
    def half_width(self) -> float:
        """Half the 90 % interval as a share of the value."""
        return (self.high90 - self.low90) / 2 / self.value

    @classmethod
    def around(cls, log_value: float, sd: float, freedom: float) -> Interval:
        """Student's t around a log loss."""
        inner, outer = student_quantile(freedom, 0.75) * sd, student_quantile(freedom, 0.95) * sd
        return cls(*(math.exp(log_value + step) for step in (0.0, -inner, inner, -outer, outer)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Interval:
        return cls(*(float(data[key]) for key in ("value", "low50", "high50", "low90", "high90")))


@dataclass(frozen=True)
class FormForecast:
    """One form: its law, what it says about the target, its weight, and its relative error on each size left out."""

    law: LossLaw
    value: float
    weight: float
    held_out: dict[str, float]


@dataclass(frozen=True)
class Forecast:
    """The expected loss of a run with N parameters and D tokens (decay included)."""

    parameters: float
    tokens: float
    unit: str
    expected: Interval
    noise: float
    """Standard deviation of log loss from seed to seed."""
    forms: tuple[FormForecast, ...]
    naive: dict[str, Interval]
    """``largest``: the largest proxy's loss; ``line``: a straight line in log-log through the two largest sizes."""
    points: tuple[Point, ...]
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        return self.expected.value

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters, "tokens": self.tokens, "unit": self.unit, "expected": asdict(self.expected),
            "noise": self.noise, "naive": {key: asdict(value) for key, value in self.naive.items()},
            "forms": [
                {"law": f.law.to_dict(), "value": f.value, "weight": f.weight, "held_out": f.held_out} for f in self.forms
            ],
            "points": [p.to_dict() for p in self.points], "warnings": list(self.warnings),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Forecast:
        """The forecast that ``to_dict`` wrote.

        Raises:
            LawError: a field is missing or of the wrong kind.
        """
        try:
            forms = tuple(
                FormForecast(LossLaw.from_dict(f["law"]), f["value"], f["weight"], dict(f["held_out"]))
                for f in data["forms"]
            )
            naive = {str(key): Interval.from_dict(value) for key, value in data["naive"].items()}
            points = tuple(Point(**p) for p in data["points"])
            return cls(
                data["parameters"], data["tokens"], data["unit"], Interval.from_dict(data["expected"]), data["noise"], forms,
                naive, points, tuple(data["warnings"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LawError("forecast", f"expected a forecast as windtunnel writes it, got {error!r}") from None


@dataclass(frozen=True)
class Sealed:
    """A forecast read back from its file, with the facts around it and the hash that identifies it."""

    forecast: Forecast
    facts: dict[str, Any]
    hash: str


def freeze(forecast: Forecast, path: Path, facts: Mapping[str, Any]) -> str:
    """Writes a forecast as canonical JSON with its own BLAKE3 hash and returns the hash.

    Args:
        forecast: what to freeze.
        path: a file that does not exist yet.
        facts: ``runs``, ``corpus``, ``heldout``, ``branch``, ``branch_is``, ``batch``, ``base_lr``, ``kind`` (``blind``
            or ``rehearsal``) and whatever else belongs to it; ``time`` is now, unless given.

    Raises:
        LawError: a fact is missing, of an unknown kind or no JSON.
        ArtefactError: the file exists already.
        UserError: the folder cannot be written.
    """
    for key, meaning in _FACTS.items():
        if facts.get(key) in (None, "", []):
            raise LawError(
                f"forecast.{key}", f"expected {meaning}, got nothing", "a forecast without it cannot be scored"
            )
    if facts["kind"] not in ("blind", "rehearsal"):
        raise LawError("forecast.kind", f"expected 'blind' or 'rehearsal', got {facts['kind']!r}")
    return seal(path, facts, {"forecast": forecast.to_dict()})


def seal(path: Path, facts: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Writes facts and what is forecast as canonical JSON with its own BLAKE3 hash and returns the hash.

    Args:
        path: a file that does not exist yet.
        facts: around the numbers; ``time`` is now, unless given.
        said: the numbers, under one key that tells what kind of forecast they are.

    Raises:
        LawError: a value is no JSON.
        ArtefactError: the file exists already.
        UserError: the folder cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    body = {"schema": SCHEMA, "facts": {"time": now, **facts}, **said}
    try:
        own = content_hash(body)
    except (TypeError, ValueError) as error:
        raise LawError("forecast.facts", f"expected values that JSON can hold, got {error}") from None
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = path.open("xb")
        except FileExistsError:
            raise ArtefactError(
                str(path),
                "expected no forecast there yet, found one",
                "a frozen forecast is never overwritten: name another",
            ) from None
        with stream:
            stream.write(canonical({**body, "hash": own}) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    return own


def read_forecast(path: Path) -> Sealed:
    """Reads a law's forecast and verifies that not one byte of it has changed.

    Raises:
        ArtefactError: there is no file, or it is not what was frozen; the message names expected and found hash.
        LawError: it is a forecast of another kind.
    """
    content = read_seal(path)
    return Sealed(Forecast.from_dict(content.get("forecast", {})), dict(content["facts"]), content["hash"])


def read_seal(path: Path) -> dict[str, Any]:
    """A sealed file's facts, hash and numbers, after verifying that not one byte of it has changed.

    Raises:
        ArtefactError: there is no file, or it is not what was frozen; the message names expected and found hash.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(str(path), f"expected a forecast file, got: {error.strerror}") from None
    stated = _HASH.search(data)
    expected = stated[1].decode() if stated else "a hash"
    found = blake3.blake3(data).hexdigest()
    try:
        content = cast("dict[str, Any]", json.loads(data))
        found = own_hash(content)
        whole = found == content["hash"] and data == canonical(content) + b"\n"
    except (ValueError, KeyError, AttributeError, TypeError):
        whole, content = False, {}
    if not whole:
        # A change of spaces or of the order of keys keeps the content's hash: then the bytes' own hash tells.
        found = blake3.blake3(data).hexdigest() if found == expected else found
        raise ArtefactError(
            str(path), f"this forecast was changed after it was frozen: expected hash {expected}, found {found}",
            "restore the file; a changed forecast does not count",
        )  # fmt: skip
    if content.get("schema") != SCHEMA:
        raise ArtefactError(str(path), f"expected schema {SCHEMA} of a forecast, got {content.get('schema')!r}")
    return content


def own_hash(content: Mapping[str, Any]) -> str:
    """The hash that a sealed content must state."""
    return content_hash({key: value for key, value in content.items() if key != "hash"})


def interval_score(interval: Interval, outcome: float) -> float:
    """Width of the 90 % interval plus 20 times the miss (Gneiting and Raftery 2007, equation 43); lower is better."""
    below, above = max(0.0, interval.low90 - outcome), max(0.0, outcome - interval.high90)
    return interval.high90 - interval.low90 + 2 / 0.1 * (below + above)


def score(forecast: Forecast | Sealed, outcome: float) -> dict[str, Any]:
    """How a forecast did against the loss that the run reached.

    Returns ``outcome``, ``relative_error`` (forecast/outcome - 1), ``inside_50``, ``inside_90``, ``gap_share`` (the error
    as a share of the gap between the largest proxy and the outcome; None without a gap), ``interval_score`` in units of
    loss, and under ``naive`` the relative error and interval score of each naive forecast.

    Raises:
        LawError: the outcome is not a positive number.
    """
    said = forecast.forecast if isinstance(forecast, Sealed) else forecast
    if not (math.isfinite(outcome) and outcome > 0):
        raise LawError("forecast.outcome", f"expected a positive loss, got {outcome}", "a diverged run is no outcome")
    e = said.expected
    gap = said.naive["largest"].value - outcome
    return {
        "outcome": outcome,
        "relative_error": e.value / outcome - 1,
        "inside_50": e.low50 <= outcome <= e.high50,
        "inside_90": e.low90 <= outcome <= e.high90,
        "gap_share": (e.value - outcome) / gap if abs(gap) > 1e-12 else None,
        "interval_score": interval_score(e, outcome),
        "naive": {
            key: {"relative_error": v.value / outcome - 1, "interval_score": interval_score(v, outcome)}
            for key, v in said.naive.items()
        },
    }
