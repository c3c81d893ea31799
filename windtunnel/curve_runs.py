"""The runs of a home, or tables from elsewhere, as curves that a curve law can be fitted to. Needs no torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.laws.curve_law import Curve
from windtunnel.laws.design import DecayRule, rates_of
from windtunnel.laws.fit import Array, LawError
from windtunnel.model.shape import Shape
from windtunnel.train.schedule import Schedule

_STRETCHES = 60
"""Means in the longest curve: fewer than its updates, so that the noise of single batches averages out."""
_LEAST = 8
_MOST = 8
"""Curves in one fit, whose time grows with their square: every schedule once comes before a second seed of one."""
_ALIKE = ("shape", "batch", "parametrization", "optimizer", "objective", "masking", "lr_by_role")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class CurveSet:
    """Runs of one size, batch, mixture and base learning rate."""

    curves: tuple[Curve, ...]
    label: str
    warmup: int
    step_tokens: int | None = None
    """Tokens in an update; None for tables, which count updates only."""
    parameters: int | None = None
    unit: str = "nats per token"
    left_out: tuple[str, ...] = ()
    """Why some runs are not among the curves."""

    @property
    def decays(self) -> int:
        """Runs whose learning rate falls."""
        return sum(1 for c in self.curves if (np.diff(c.rates[: c.steps[-1]]) < 0).any())


def alike(config: Row) -> str:
    """What two runs must share to lie under one curve law: everything but seed, schedule, length and start."""
    plan = config["plan"]
    mixture = [dict(segment["mixture"]) for segment in plan["segments"]]
    return content_hash([{key: config.get(key) for key in _ALIKE}, plan["row"], mixture, plan.get("packed")])


def rates_of_run(row: Row, steps: int | None = None) -> Array:
    """The learning rate of every update of a run, those of the trunk that it grew from included."""
    config = row["config"]
    schedule = Schedule(**config["schedule"])
    return rates_of(schedule, config["optimizer"]["learning_rate"], steps or row["steps"] or config["steps"])


def rule_of(config: Row) -> DecayRule | None:
    """The decay at the end of a run as a rule for runs of any length; None for a run that does not decay so."""
    schedule, steps = config["schedule"], config["schedule"].get("decay_steps")
    if schedule.get("kind", "wsd") != "wsd" or not steps:
        return None
    # A decay by half-lives is the exponential one that ends where they do.
    floor = 0.5 ** (steps / schedule["half_life"]) if schedule["half_life"] else schedule["floor"]
    return DecayRule(steps / config["steps"], schedule["form"], max(floor, schedule["floor"]))


def usual_rule(book: LabBook, row: Row) -> tuple[DecayRule, str] | None:
    """The decay that a run has, else that of its newest branch, else that of the newest run alike; with that run's id."""
    decays = [one for one in reversed(book.runs(kind="decay")) if one["program"] == row["program"]]
    own = [one for one in decays if one["parent"] == row["id"]]
    like = [one for one in decays if alike(one["config"]) == alike(row["config"])]
    for one in (row, *own, *like):
        if (rule := rule_of(one["config"])) is not None:
            return rule, str(one["id"])
    return None


def curve_of(book: LabBook, row: Row, stretch: int, *, whole: bool = False) -> Curve | None:
    """A run's training losses as means over ``stretch`` updates, from its own first update on; None if there are too few.

    The steep beginning (a tenth of the run, at least twice the warmup) is left out: no law describes it.

    Args:
        whole: with the updates of the runs that it grew from.
    """
    known = _losses(book, row, whole)
    if not known:
        return None
    last = max(known)
    dense = np.full(last, np.nan)
    dense[np.array(list(known)) - 1] = list(known.values())
    first = 0 if whole else (row["config"]["start"] or {}).get("step", 0)
    skip = max(first, 2 * row["config"]["schedule"].get("warmup", 0), 0 if first else last // 10)
    points = min(_STRETCHES, (last - skip) // max(1, stretch))
    points = max(points, min(_LEAST, (last - skip) // 2))
    if points < _LEAST or not np.isfinite(dense[skip:]).any():
        return None
    try:
        return Curve.averaged(row["name"], rates_of_run(row, last), dense, skip=skip, points=points)
    except LawError:
        return None


def _losses(book: LabBook, row: Row, whole: bool) -> dict[int, float]:
    """Training loss by update."""
    known = dict(zip(*book.metrics(row["id"], "loss"), strict=True))
    start = row["config"].get("start")
    parent = book.run(row["parent"]) if whole and start and not start.get("fresh") else None
    if parent is not None:
        known = {step: v for step, v in _losses(book, parent, whole).items() if step <= start["step"]} | known
    return known


def curve_score(book: LabBook, row: Row, said: Row) -> dict[str, float] | None:
    """How a forecast of a whole curve did: errors as shares of the loss, and the share of means inside its band.

    Args:
        said: ``stretch``, and ``steps``, ``value``, ``low90`` and ``high90`` as lists.
    """
    curve = curve_of(book, row, said["stretch"], whole=True)
    if curve is None:
        return None
    value, low, high = (np.interp(curve.steps, said["steps"], said[key]) for key in ("value", "low90", "high90"))
    off = value / curve.losses - 1
    inside = (low <= curve.losses) & (curve.losses <= high)
    return {
        "mean_error": float(np.abs(off).mean()), "end_error": float(off[-3:].mean()), "inside_90": float(inside.mean()),
        "points": float(len(off)),
    }  # fmt: skip


def stretch_of(rows: Sequence[Row]) -> int:
    """Updates in one mean of the runs of a set."""
    return max(1, round(0.9 * max(row["config"]["steps"] for row in rows) / _STRETCHES))


def curve_sets(book: LabBook, rows: Sequence[Row]) -> list[CurveSet]:
    """Runs grouped into sets that one law may describe, the set with most updates first.

    Diverged, failed, fine-tuned and too short runs are left out and named.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("trunk", "decay", "trial") and not (row["config"].get("start") or {}).get("fresh"):
            groups.setdefault(alike(row["config"]), []).append(row)
    found = [made for group in groups.values() if (made := _set_of(book, group)) is not None]
    return sorted(found, key=lambda made: -sum(int(c.steps[-1]) for c in made.curves))


def _set_of(book: LabBook, rows: Sequence[Row]) -> CurveSet | None:
    config = rows[0]["config"]
    stretch = stretch_of(rows)
    curves: dict[str, Curve] = {}
    left_out: list[str] = []
    for row in _schedules_first(rows):
        if row["status"] == "failed":
            left_out.append(f"{row['name']} failed ({row['reason']})")
        elif (curve := curve_of(book, row, stretch)) is None:
            left_out.append(f"{row['name']} is too short")
        elif _diverged(curve):
            left_out.append(f"{row['name']} diverged")
        else:
            curves[row["name"]] = curve
    if not curves:
        return None
    body = Shape(**config["shape"]).body
    tokens = config["batch"] * config["plan"]["row"]
    label = f"N = {si(body)}, {si(tokens)} tokens a step, base learning rate {config['optimizer']['learning_rate']:g}"
    warmup = config["schedule"].get("warmup", 0)
    return CurveSet(tuple(curves.values()), label, warmup, tokens, body, left_out=tuple(left_out))


def _schedules_first(rows: Sequence[Row]) -> list[Row]:
    """Rows in an order in which repeats of one schedule come after the first run of every schedule."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, Row]] = []
    for row in rows:
        key = content_hash([row["config"]["schedule"], row["config"]["steps"]])
        seen[key] = seen.get(key, -1) + 1
        ranked.append((seen[key], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def _diverged(curve: Curve) -> bool:
    """Whether a run ends well above where it was: the mean of its last losses lies 3 %, and five times the noise, higher."""
    logs = np.log(curve.losses)
    noise = float(np.median(np.abs(np.diff(logs, n=2)))) / 0.6745 / math.sqrt(6)
    means = np.convolve(logs, np.ones(3) / 3, "valid")
    return float(means[-1] - means.min()) > max(0.03, 5 * noise)


def set_for(book: LabBook, name: str, row: Row) -> CurveSet:
    """The runs of a home that one law may describe together with the run ``row``.

    Raises:
        UserError: they are fewer than two, or none of them decays.
    """
    sets = curve_sets(book, [r for r in book.runs() if alike(r["config"]) == alike(row["config"])])
    made = sets[0] if sets else None
    if made is None or len(made.curves) < 2 or not made.decays:
        count = len(made.curves) if made else 0
        decays = made.decays if made else 0
        raise UserError(
            name, f"expected at least two runs alike (size, batch, text, base learning rate), one with a decay; "
            f"got {count} with {decays}", "windtunnel tunnel scale trains trunks with decay branches",
        )  # fmt: skip
    more = len(made.curves) - _MOST
    if more <= 0:
        return made
    note = f"{more} more runs alike: repeats of these schedules"
    return replace(made, curves=made.curves[:_MOST], left_out=(*made.left_out, note))


def read_curves(paths: Sequence[Path], warmup: int | None) -> CurveSet:
    """Curves from CSV files with the columns step, lr, loss; one run a file.

    Learning rates between two rows are interpolated; before the first row they rise linearly over ``warmup`` updates to the
    rate of that row.

    Raises:
        LawError: a file cannot be read, lacks a column, holds something else than numbers, or begins after its warmup
            without saying how long that was.
    """
    curves = tuple(_read_curve(path, warmup) for path in paths)
    return CurveSet(curves, f"{len(curves)} tables", warmup or 0, unit="as in the tables")


def _read_curve(path: Path, warmup: int | None) -> Curve:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        steps = np.array([int(row["step"]) for row in rows], dtype=np.int64)
        shown, losses = (np.array([float(row[key]) for row in rows]) for key in ("lr", "loss"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LawError(str(path), f"expected a CSV file, got: {getattr(error, 'strerror', None) or error}") from None
    except KeyError as error:
        raise LawError(str(path), f"expected the columns step, lr and loss, found no {error}") from None
    except (TypeError, ValueError) as error:
        raise LawError(str(path), f"expected numbers under step, lr and loss, got: {error}") from None
    if not len(steps) or steps[0] < 1 or (np.diff(steps) <= 0).any():
        raise LawError(str(path), "expected rows with rising steps from 1 on")
    if steps[0] > 1 and warmup is None:
        raise LawError(
            str(path), f"the table begins at step {steps[0]}: what the learning rate did before is not known",
            "say with --warmup how many updates it rose",
        )  # fmt: skip
    every = np.arange(1, int(steps[-1]) + 1, dtype=np.float64)
    rates = np.interp(every, steps, shown)
    # A step down between two rows is a step, not a slope: it happened at the later row.
    for at in np.flatnonzero(np.abs(np.diff(shown)) > 0.2 * shown.max()):
        rates[steps[at] : steps[at + 1] - 1] = shown[at]
    if warmup:
        rates = np.where(every < min(warmup, steps[0]), shown[0] * every / warmup, rates)
    return Curve(path.stem, rates, steps, losses)
