"""What a lab book tells about a program's forecast, question, tunnel and law, ready to be shown. Losses in bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.laws.loss import LossLaw
from windtunnel.report.figures import Band, Cloud, Curve
from windtunnel.tunnel.space import shown_value

LN2 = math.log(2)
NAIVE = {"largest": "Naive: the largest proxy", "line": "Naive: line through two sizes"}
_STOP = r"\s'\",;{}<>"
_END = rf"([^{_STOP}/\\]*)(?=[{_STOP})\]:]|$)"
_PATHS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\\\\[^{_STOP}]*?{_END}",  # \\server\share\file
        rf"\b[A-Za-z]:\\[^{_STOP}]*?{_END}",  # C:\folder\file
        rf"(?<![\w.:/<])(?:~|file://)?/(?:[^{_STOP}/]+/)+([^{_STOP}/]*)",  # /folder/file
    )
)


def without_paths(value: Any) -> Any:
    """The value with every absolute path in its texts cut down to its last part: a report names no machine and no user."""
    if isinstance(value, str):
        for pattern in _PATHS:
            value = pattern.sub(lambda match: f"…/{match[1]}", value)
        return value
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return value


def band(interval: Mapping[str, float]) -> Band:
    """An interval in nats per byte, in bits per byte."""
    return Band(*(float(interval[key]) / LN2 for key in ("value", "low50", "high50", "low90", "high90")))


@dataclass(frozen=True)
class Sealed:
    """One forecast with its outcome, if there is one."""

    folder: str
    hash: str
    branch: str
    kind: str
    when: str
    parameters: float
    tokens: float
    expected: Band
    naive: dict[str, float]
    outcome: float | None
    inside50: bool | None
    inside90: bool | None
    relative_error: float | None
    facts: dict[str, Any]
    body: dict[str, Any]

    @property
    def sizes(self) -> list[float]:
        """Sizes of the proxies, smallest first."""
        return sorted({float(p["parameters"]) for p in self.body.get("points", [])})

    @property
    def naive_errors(self) -> dict[str, float]:
        """Forecast / outcome − 1 of the naive forecasts."""
        return {key: value / self.outcome - 1 for key, value in self.naive.items()} if self.outcome else {}


def read_forecasts(book: LabBook, program: str) -> list[Sealed]:
    """All sealed forecasts of a program, the newest first, of those sealed together that of the longest run."""
    outcomes = book.facts(program, "outcome")
    out = [_sealed(name, content, outcomes.get(name)) for name, content in book.facts(program, "forecast").items()]
    return sorted(out, key=lambda one: (one.when, one.tokens), reverse=True)


def _sealed(folder: str, content: dict[str, Any], outcome: dict[str, Any] | None) -> Sealed:
    facts, body = content["facts"], content["forecast"]
    if outcome is not None and outcome.get("forecast", content["hash"]) != content["hash"]:
        outcome = None  # the outcome of an earlier forecast says nothing about this one
    found = outcome or {}
    return Sealed(
        folder, content["hash"], str(facts.get("branch", "")), str(facts.get("kind", "")),
        str(facts.get("made") or facts.get("time") or ""), float(body["parameters"]), float(body["tokens"]),
        band(body["expected"]), {key: float(value["value"]) / LN2 for key, value in body.get("naive", {}).items()},
        float(found["outcome"]) / LN2 if found else None,
        found.get("inside50", found.get("inside_50")), found.get("inside90", found.get("inside_90")),
        found.get("relative_error"), facts, body,
    )  # fmt: skip


@dataclass(frozen=True)
class ByCorpus:
    """Forecast and outcome of one corpus."""

    corpus: str
    expected: Band
    outcome: float | None


def by_corpus(book: LabBook, program: str, sealed: Sealed) -> list[ByCorpus]:
    """The forecast's corpora one by one, each with the score that the finished branch has on it."""
    scores = losses(book, f"{program}/{sealed.folder}")
    return [
        ByCorpus(name, band(part["expected"]), scores.get(name))
        for name, part in sorted(sealed.facts.get("per_corpus", {}).items())
    ]


def losses(book: LabBook, run: str) -> dict[str, float]:
    """Bits per byte of a run on every held-out corpus that it was scored on."""
    return {row["corpus"]: float(row["value"]) for row in book.scores(run) if row["name"] == "bits_per_byte"}


@dataclass(frozen=True)
class CorpusRow:
    """One corpus as it was asked for and as it was built."""

    name: str
    source: str
    tokens: int
    heldout_bytes: int
    licence: str
    shares: tuple[str, ...]
    documents: int | None
    dropped: int


@dataclass(frozen=True)
class Question:
    """What was asked: the recipe's own words, the corpora, the shape."""

    recipe: dict[str, Any]
    corpora: tuple[CorpusRow, ...]
    mixtures: tuple[str, ...]
    warnings: tuple[str, ...]


def read_question(book: LabBook, program: str) -> Question | None:
    """The recipe and the corpora; None if the book knows neither."""
    recipe = without_paths(book.fact(program, "recipe", "resolved") or {})
    facts = book.facts(program, "corpus")
    if not recipe and not facts:
        return None
    wanted = {name: fact for name, fact in facts.items() if name in recipe.get("corpus", facts)}
    mixtures = {"trunk": (recipe.get("trunk") or {}).get("mixture")}
    mixtures |= {name: branch.get("mixture") for name, branch in (recipe.get("branch") or {}).items()}
    stated = {name: dict(mixture) for name, mixture in mixtures.items() if mixture}
    rows: list[CorpusRow] = []
    warnings: list[str] = []
    for name, fact in wanted.items():
        stats = fact.get("stats") or {}
        warnings += [f"{name}: {text}" for text in stats.get("warnings", [])]
        source = (recipe.get("corpus") or {}).get(name, {}).get("source", "")
        rows.append(CorpusRow(
            name, _source(source), int(fact["tokens"]), int(fact["heldout_bytes"]), fact.get("licence") or "not stated",
            tuple(f"{100 * m[name] / sum(m.values()):.0f} %" if name in m else "–" for m in stated.values()),
            (stats.get("documents") or {}).get("kept"), sum((stats.get("dropped") or {}).values()),
        ))  # fmt: skip
    return Question(recipe, tuple(rows), tuple(stated), tuple(without_paths(warnings)))


def _source(source: Any) -> str:
    """A source in a few words: of a file inside a package the package, of many sources the first."""
    text = str(source[0] if isinstance(source, list) and source else source or "")
    more = f" and {len(source) - 1} more" if isinstance(source, list) and len(source) > 1 else ""
    if text.startswith("pypi:"):
        return f"{text.removeprefix('pypi:').split('/')[0]} (PyPI){more}"
    return text + more


@dataclass(frozen=True)
class Places:
    """Where the values of one hyper-parameter stand on their axis.

    Words are numbered as ``labels`` has them; β₂ stands at its distance to one.
    """

    name: str
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> Places:
        """The axis of the values that trials had."""
        words = all(isinstance(value, bool | str) for value in values)
        return cls(name, tuple(sorted({shown_value(value) for value in values})) if words else ())

    def __call__(self, value: Any) -> float:
        if self.labels:
            return 1.0 + self.labels.index(shown_value(value))
        return 1 - float(value) if self.name == "beta2" else float(value)


@dataclass(frozen=True)
class Tunnel:
    """What the search and the check found. Losses in bits per byte."""

    size: str
    trials: int
    failed: int
    choices: dict[str, Any]
    first: dict[str, Any]
    edges: tuple[str, ...]
    gain: float | None
    clouds: dict[str, list[Cloud]]
    places: dict[str, Places]
    left: dict[str, float] | None
    check: dict[str, Any] = field(default_factory=dict[str, Any])


def read_tunnel(book: LabBook, program: str) -> Tunnel | None:
    """The search and the check of its learning rate on a wider model, or None."""
    fact = book.fact(program, "study", "search")
    if not fact:
        return None
    trials = fact["trials"]
    done = [t for t in trials if t["loss"] is not None]
    check = fact.get("check") or {}
    clouds: dict[str, list[Cloud]] = {}
    places = {name: Places.of(name, [t[name] for t in trials]) for name in fact["choices"]}
    for name, place in places.items():
        points = tuple((place(t[name]), float(t["loss"]) / LN2) for t in done)
        failed = tuple(place(t[name]) for t in trials if t["loss"] is None and t.get("guess") is None)
        clouds[name] = [Cloud(str(fact["size"]), points, failed)] if points else []
    pairs = [
        (r, v / LN2) for r, v in zip(check.get("rates", []), check.get("losses", []), strict=True) if v is not None
    ]
    if pairs and clouds.get("learning_rate"):
        clouds["learning_rate"].append(Cloud(str(check["size"]), tuple(pairs), curve=True))
    best = min((t["loss"] for t in done), default=None)
    opening = trials[0]["loss"] if trials else None
    return Tunnel(
        str(fact["size"]), len(trials), sum(t["loss"] is None and t.get("guess") is None for t in trials), fact["choices"],
        {name: trials[0][name] for name in fact["choices"]} if trials else {}, tuple(fact.get("edges", [])),
        best / opening - 1 if best and opening else None, {k: v for k, v in clouds.items() if v}, places,
        _left(fact, best), check,
    )  # fmt: skip


def _left(fact: Mapping[str, Any], best: float | None) -> dict[str, float] | None:
    """What the search may have left to gain, as shares of the best loss, and how many more trials would close it."""
    gap = fact.get("gap")
    if not gap or not best:
        return None
    return {**{name: gap[name] / best for name in ("value", "high", "noise")}, "more": gap["more"]}


@dataclass(frozen=True)
class Form:
    """One form of law in the forecast."""

    name: str
    constants: str
    weight: float
    value: float
    held_out: tuple[tuple[str, float], ...]
    residual: float


@dataclass(frozen=True)
class LawView:
    """The fitted law: what the figure draws and the table says."""

    curves: tuple[Curve, ...]
    target: Curve | None
    forms: tuple[Form, ...]
    warnings: tuple[str, ...]
    points: int
    noise: float | None


def read_law(sealed: Sealed) -> LawView:
    """The law behind a forecast: its forms are joined by their weights, as the forecast joins them."""
    body = sealed.body
    forms = [(LossLaw.from_dict(f["law"]), float(f["weight"])) for f in body["forms"]]
    points = body["points"]
    lengths = [float(p["tokens"]) for p in points]
    reach = np.geomspace(min(lengths), max([*lengths, sealed.tokens]), 40)
    curves = []
    for size in sealed.sizes:
        mine = sorted((float(p["tokens"]), float(p["loss"]) / LN2) for p in points if p["parameters"] == size)
        curves.append(Curve(si(size), tuple(mine), _joined(forms, size, reach)))
    rows = tuple(
        Form(
            law.form, ", ".join(f"{k} = {v:.3g}" for k, v in law.constants.items()), weight,
            float(f["value"]) / LN2, tuple((k, float(v)) for k, v in (f.get("held_out") or {}).items()), law.residual,
        )
        for (law, weight), f in zip(forms, body["forms"], strict=True)
    )  # fmt: skip
    target = Curve(si(sealed.parameters), (), _joined(forms, sealed.parameters, reach))
    return LawView(tuple(curves), target, rows, tuple(body.get("warnings", [])), len(points), body.get("noise"))


def _joined(forms: Sequence[tuple[LossLaw, float]], size: float, tokens: np.ndarray) -> tuple[tuple[float, float], ...]:
    """The weighted geometric mean of the forms over tokens, in bits per byte."""
    if not forms:
        return ()
    total = sum(weight for _, weight in forms)
    logs = sum(weight / total * np.log(law.losses(np.full_like(tokens, size), tokens)) for law, weight in forms)
    return tuple(zip(tokens.tolist(), (np.exp(logs) / LN2).tolist(), strict=True))
