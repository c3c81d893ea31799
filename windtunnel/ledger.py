"""The forecast ledger: every sealed forecast of a home, scored where its run has finished, misses included. Needs no torch.

The files are the truth: a forecast of the same target from other runs is a file of its own, and both are scored. A file that
no longer matches its seal, or whose seal neither the lab book nor a run knows, is shown and never counts; one that was frozen
after its run had ended is *late* and counts as little as a rehearsal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.comparison import open_book
from windtunnel.curve_runs import curve_score
from windtunnel.home import Home
from windtunnel.laws.gain import Gain
from windtunnel.laws.sealed import (
    ADAPTATION,
    CURVE,
    LAW,
    SEALED,
    Forecast,
    Interval,
    interval_score,
    own_hash,
    read_seal,
)
from windtunnel.views import View, line, table

_LN2 = math.log(2)
AVERAGE = "average"
NAIVE = ("largest", "line")


@dataclass(frozen=True)
class Entry:
    """One forecast of one corpus, in bits per byte, with its outcome and score if the run has ended."""

    program: str
    branch: str
    corpus: str
    kind: str
    """blind, rehearsal, late or changed."""
    hash: str
    time: str
    parameters: float
    tokens: float
    expected: Interval | None
    naive: Mapping[str, Interval]
    reach: float
    """N of the target over that of the largest proxy; of an adaptation, its tokens over those of its longest short branch."""
    outcome: float | None = None
    note: str = ""
    before: float | None = None
    """What an adapted model lost before; None for the forecast of a law."""
    trunk: str = ""
    """Key of the trunk that the run grows from, or of the run itself: forecasts of one trunk are right or wrong together."""
    curve: Mapping[str, float] | None = None
    """How the forecast of the whole curve did (``curve_runs.curve_score``), where there is one."""

    @property
    def scored(self) -> bool:
        return self.outcome is not None and self.expected is not None

    @property
    def inside(self) -> bool | None:
        """Whether the outcome lies in the 90 % interval; None without one."""
        if self.outcome is None or self.expected is None:
            return None
        return self.expected.low90 <= self.outcome <= self.expected.high90

    @property
    def error(self) -> float | None:
        """Forecast / outcome - 1."""
        return None if self.outcome is None or self.expected is None else self.expected.value / self.outcome - 1

    @property
    def gap_share(self) -> float | None:
        """The error as a share of the gap between the largest proxy and the outcome."""
        if self.outcome is None or self.expected is None or "largest" not in self.naive:
            return None
        gap = self.naive["largest"].value - self.outcome
        return (self.expected.value - self.outcome) / gap if abs(gap) > 1e-12 else None

    @property
    def scores(self) -> dict[str, float]:
        """Interval scores of the forecast and of the naive ones, in bits per byte; lower is better."""
        if self.outcome is None or self.expected is None:
            return {}
        said = {"forecast": self.expected, **{name: self.naive[name] for name in NAIVE if name in self.naive}}
        return {name: interval_score(interval, self.outcome) for name, interval in said.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "program": self.program, "branch": self.branch, "corpus": self.corpus, "kind": self.kind, "hash": self.hash,
            "time": self.time, "parameters": self.parameters, "tokens": self.tokens, "reach": self.reach,
            "expected": None if self.expected is None else vars(self.expected), "outcome": self.outcome,
            "relative_error": self.error, "inside_90": self.inside, "gap_share": self.gap_share,
            "interval_score": self.scores.get("forecast"),
            "naive_interval_score": {name: self.scores[name] for name in NAIVE if name in self.scores}, "note": self.note,
            "before": self.before, "trunk": self.trunk, "curve": self.curve,
        }  # fmt: skip


def entries(home: Path) -> list[Entry]:
    """All forecasts of a home, in the order in which they were sealed; first the average, then each corpus."""
    book = open_book(home)
    found: list[Entry] = []
    for program in book.programs():
        seen: set[str] = set()
        copies = [c for kind in (LAW, CURVE, ADAPTATION) for c in book.facts(program, kind).values()]
        known = {c["hash"] for c in copies} | {run["forecast"] for run in book.runs(program=program)}
        known |= set(book.facts(program, SEALED))
        for path in sorted((Home(home).program(program) / "forecasts").glob("*.json")):
            try:
                content = read_seal(path)
            except WindtunnelError as error:
                found.append(_changed(program, path, error))
                seen.add(_stated(path))
                continue
            if content["hash"] in seen:  # a copy of a file
                continue
            seen.add(content["hash"])
            found += _of_file(book, program, content, content["hash"] in known)
        for content in copies:
            if content["hash"] not in seen:  # a lab book without the program's folder
                found += _of_book(book, program, content)
    return sorted(found, key=lambda e: (e.time, e.program, e.hash))


def _of_file(book: LabBook, program: str, content: Mapping[str, Any], known: bool) -> list[Entry]:
    """A file that matches its own seal; one sealed anew after its run began is known neither to the lab book nor to the run."""
    rows = _read(book, program, content)
    note = "its run has ended, and neither the lab book nor a run knows this seal"
    return rows if known else [replace(r, kind="changed", note=note) if r.outcome is not None else r for r in rows]


def _of_book(book: LabBook, program: str, content: Mapping[str, Any]) -> list[Entry]:
    rows = _read(book, program, content)
    note = "the lab book's copy does not match its seal, and there is no file"
    whole = own_hash({"schema": 1, **content}) == content["hash"]
    return rows if whole else [replace(row, kind="changed", note=note) for row in rows]


def _changed(program: str, path: Path, error: WindtunnelError) -> Entry:
    problem = error.problem if isinstance(error, UserError) else str(error)
    return Entry(
        program, path.stem.rpartition("-")[0], AVERAGE, "changed", _stated(path), "", 0, 0, None, {}, 0, note=problem
    )


def _stated(path: Path) -> str:
    """The hash that a file claims, as far as it can be read."""
    try:
        return str(json.loads(path.read_bytes()).get("hash", ""))
    except (ValueError, OSError, AttributeError):
        return ""


def _read(book: LabBook, program: str, content: Mapping[str, Any]) -> list[Entry]:
    facts = content["facts"]
    run = target_run(book, program, facts)
    kind, outcomes = str(facts["kind"]), _outcomes(book, run, facts)
    if kind == "blind" and run is not None and _late(str(facts.get("time", "")), run):
        kind = "late"
    blank = Entry(
        program, str(facts["branch"]), AVERAGE, kind, content["hash"], str(facts.get("time", facts.get("made", ""))), 0, 0,
        None, {}, 0, trunk=str(facts.get("trunk") or facts.get("target", "")),
    )  # fmt: skip
    rows = _gains(blank, content) if "gains" in content else _laws(blank, content)
    curve = _curve(book, run, facts)
    return [
        replace(row, outcome=outcomes.get(row.corpus), curve=curve if row.corpus == AVERAGE else None) for row in rows
    ]


def _laws(blank: Entry, content: Mapping[str, Any]) -> list[Entry]:
    said = {AVERAGE: Forecast.from_dict(content["forecast"])}
    said |= {name: Forecast.from_dict(value) for name, value in content["facts"].get("per_corpus", {}).items()}
    return [
        replace(
            blank, corpus=corpus, parameters=one.parameters, tokens=one.tokens, expected=_bits(one.expected),
            naive={name: _bits(value) for name, value in one.naive.items()},
            reach=one.parameters / max(point.parameters for point in one.points),
        )
        for corpus, one in said.items()
    ]  # fmt: skip


def _gains(blank: Entry, content: Mapping[str, Any]) -> list[Entry]:
    facts = content["facts"]
    whole = replace(
        blank, parameters=facts["parameters"], tokens=facts["tokens"], reach=facts["tokens"] / facts["lengths"][-1]
    )
    said = {name: Gain.from_dict(part) for name, part in content["gains"].items()}
    return [
        replace(whole, corpus=name, expected=one.expected, naive=one.naive, before=one.before)
        for name, one in said.items()
    ]


def _curve(book: LabBook, run: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> Mapping[str, float] | None:
    return curve_score(book, run, facts["curve"]) if run is not None and "curve" in facts else None


def _bits(interval: Interval) -> Interval:
    return Interval(*(value / _LN2 for value in vars(interval).values()))


def target_run(book: LabBook, program: str, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The finished run that a forecast is about: its stage, or one that is the same run."""
    ends = tuple(key[:10] for key in (str(facts.get("target", "")), *facts.get("same", ())) if key)
    rows = [r for r in book.runs(program=program, status="done") if ends and Path(r["folder"]).name.endswith(ends)]
    return rows[-1] if rows else None


def _late(time: str, run: Mapping[str, Any]) -> bool:
    try:
        frozen = datetime.fromisoformat(time).timestamp()
    except ValueError:
        return False
    return run["ended"] is not None and run["ended"] < frozen


def _outcomes(book: LabBook, run: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte of the finished target on each corpus and on their average."""
    if run is None:
        return {}
    found: dict[str, float] = {}
    for wanted in ("bits_per_byte", "nats_per_byte"):  # the second is never scored anew on other tokens
        for s in book.scores(run["id"]):
            if s["name"] == wanted:
                found[s["corpus"]] = s["value"] / (_LN2 if wanted == "nats_per_byte" else 1.0)
    fact = book.fact(run["program"], "outcome", Path(run["folder"]).name)
    mixture = facts.get("mixture") or {}
    if fact is not None:
        found[AVERAGE] = fact["outcome"] / _LN2
    elif mixture and set(mixture) <= set(found):
        found[AVERAGE] = sum(w * found[name] for name, w in mixture.items()) / sum(mixture.values())
    return found


def coverage(rows: Sequence[Entry]) -> dict[str, int]:
    """How many of these forecasts have an outcome, how many of those lie inside their 90 % interval, and of how many trunks."""
    scored = [row for row in rows if row.scored]
    trunks = len({row.trunk for row in scored})
    return {"scored": len(scored), "inside_90": sum(bool(row.inside) for row in scored), "trunks": trunks}


def forecasts(home: Path) -> View:
    """The ledger as tables, one of laws and one of adaptations, each with the coverage of its blind forecasts."""
    rows = entries(home)
    laws, adapted = [row for row in rows if row.before is None], [row for row in rows if row.before is not None]
    parts: list[RenderableType] = []
    if not rows:
        parts.append(line("no forecast has been sealed here yet; try: windtunnel forecast quickstart"))
    if laws:
        parts += _of_laws(laws)
    if adapted:
        parts += _of_adaptations(adapted)
    parts += [line(f"note: {row.program}/{row.branch}: {row.note}") for row in rows if row.note]
    average, corpora = _blind_coverage(laws, True), _blind_coverage(laws, False)
    data = {
        "forecasts": [row.to_dict() for row in rows], "blind": average["scored"], "inside_90": average["inside_90"],
        "blind_trunks": average["trunks"],
        "blind_by_corpus": corpora["scored"], "inside_90_by_corpus": corpora["inside_90"],
        "adaptations": _blind_coverage(adapted, False),
    }  # fmt: skip
    return View(data, tuple(parts))


def _blind_coverage(rows: Sequence[Entry], average: bool) -> dict[str, int]:
    return coverage([row for row in rows if row.kind == "blind" and (row.corpus == AVERAGE) == average])


def _of_laws(rows: Sequence[Entry]) -> Iterator[RenderableType]:
    columns = ("target", "corpus", "kind", "forecast, 90 %", "outcome", "error", "of gap", "score / naive", "inside")
    yield table(columns, [_row(entry) for entry in rows], title="forecasts, bits per byte", right=(4, 5, 6, 7))
    yield from (line(_target(row)) for row in rows if row.corpus == AVERAGE and row.expected is not None)
    average, corpora = _blind_coverage(rows, True), _blind_coverage(rows, False)
    if not average["scored"]:
        yield line("no blind forecast has an outcome yet: nothing is known about the coverage")
        return
    inside, count = average["inside_90"], average["scored"]
    trunks = average["trunks"]
    shared = (
        f"; they are about {trunks} trunk{'s' if trunks > 1 else ''}, whose branches err together"
        if trunks < count
        else ""
    )
    yield line(f"of {count} blind forecasts with an outcome, {inside} lie inside their 90 % interval{shared}")
    if corpora["scored"]:
        inside, count = corpora["inside_90"], corpora["scored"]
        yield line(f"by corpus, not independent of these: {inside} of {count} inside")
    wins, count = _better([row for row in rows if row.kind == "blind" and row.scored])
    yield line(f"interval score below both naive forecasts in {wins} of {count} (lower is better)")


def _of_adaptations(rows: Sequence[Entry]) -> Iterator[RenderableType]:
    columns = (
        "target",
        "corpus",
        "kind",
        "before",
        "forecast, 90 %",
        "outcome",
        "error",
        "of gap",
        "score / naive",
        "inside",
    )
    shown = [(*said[:3], f"{entry.before:.4f}", *said[3:]) for entry in rows for said in [_row(entry)]]
    yield table(columns, shown, title="forecasts of adaptations, bits per byte", right=(3, 5, 6, 7, 8))
    for row in {row.hash: row for row in rows}.values():
        yield line(
            f"{row.program}/{row.branch}: {si(row.tokens)} tokens, {row.reach:.3g}× its longest short branch; sealed "
            f"{row.hash[:12]} {row.time}"
        )
    if (found := _blind_coverage(rows, False))["scored"]:
        inside, count = found["inside_90"], found["scored"]
        yield line(f"of {count} blind forecasts by corpus with an outcome, {inside} lie inside their 90 % interval")


def _better(rows: Sequence[Entry]) -> tuple[int, int]:
    wins = sum(row.scores["forecast"] < min(row.scores[name] for name in NAIVE if name in row.scores) for row in rows)
    return wins, len(rows)


def _target(entry: Entry) -> str:
    curve = ""
    if (score := entry.curve) is not None:
        inside = f"{100 * score['inside_90']:.0f} % inside its band"
        curve = f"; whole curve: mean error {100 * score['mean_error']:.2f} %, {inside}"
    return (
        f"{entry.program}/{entry.branch}: {si(entry.parameters)} parameters, {entry.reach:.3g}× the largest proxy, after "
        f"{si(entry.tokens)} tokens; sealed {entry.hash[:12]} {entry.time}{curve}"
    )


def _row(entry: Entry) -> tuple[str, ...]:
    target = f"{entry.program}/{entry.branch}"
    if entry.expected is None:
        return (target, entry.corpus, entry.kind, "", "", "", "", "", "")
    e = entry.expected
    said = f"{e.value:.4f} [{e.low90:.4f}, {e.high90:.4f}]"
    if entry.outcome is None or entry.error is None:
        return (target, entry.corpus, entry.kind, said, "not yet", "", "", "", "")
    share = "" if entry.gap_share is None else f"{100 * entry.gap_share:+.0f} %"
    scores = " / ".join(f"{value:.3f}" for value in entry.scores.values())
    return (
        target, entry.corpus, entry.kind, said, f"{entry.outcome:.4f}", f"{100 * entry.error:+.2f} %", share, scores,
        "yes" if entry.inside else "MISS",
    )  # fmt: skip
