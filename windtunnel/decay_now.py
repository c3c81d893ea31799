"""What a trunk of a home would give if it decayed now: from the tunnel's curves, and from averaged checkpoints. Needs no torch.

Laws are fitted to the scaling study's runs (one for each size) and kept in the program's ``studies`` folder; a trunk's own
branches are not among them, so that they can be compared with what was said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.artefact import content_hash, read_json, write_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.curve_runs import CurveSet, alike, curve_sets, rule_of
from windtunnel.home import Home
from windtunnel.laws.curve import Kernel
from windtunnel.laws.curve_fit import CurveModel, fit_curves
from windtunnel.laws.design import DecayRule
from windtunnel.laws.fit import Array, LawError
from windtunnel.laws.now import DecayNow, decay_now
from windtunnel.model.shape import Shape
from windtunnel.report.decay_now import Now
from windtunnel.train.folder import checkpoint_path, steps_saved
from windtunnel.train.metrics import read_metrics

Row = Mapping[str, Any]
_DRAWS, _SIZES = 8, 3
_KERNELS: tuple[Kernel, ...] = ("exponential", "power")
"""The two that fit fastest: a status must not keep one waiting."""
FACT = "averaged"


def what_now(home: Path, book: LabBook, row: Row, *, fit: bool = True) -> DecayNow | None:
    """What the trunk ``row`` would reach if it decayed from its last recorded update; None where nothing can be said.

    Args:
        fit: fit laws that are not kept yet, which takes seconds.
    """
    return _asked(home, book, row, fit)[0]


def _asked(home: Path, book: LabBook, row: Row, fit: bool) -> tuple[DecayNow | None, str]:
    """What can be said, else why nothing can."""
    sets = _tunnel_sets(book, row)
    if not sets:
        return None, _why_not(book, row)
    losses = trunk_losses(home, row)
    config = row["config"]
    try:
        models = _models(home, str(row["program"]), sets, fit)
        found = decay_now(
            models, losses, peak=config["optimizer"]["learning_rate"], warmup=config["schedule"].get("warmup", 0),
            rule=_rule(book, row), size=float(Shape(**config["shape"]).body),
            longest=max(int(c.steps[-1]) for made in sets for c in made.curves),
        )  # fmt: skip
    except LawError as error:
        return None, str(error)
    return found, ""


def _why_not(book: LabBook, row: Row) -> str:
    """Why the scaling study teaches nothing about a trunk."""
    rows = book.runs(program=row["program"], study="scaling")
    if not rows:
        return "there is no scaling study; windtunnel tunnel scale RECIPE trains one"
    if not any(_beside_shape(r["config"]) == _beside_shape(row["config"]) for r in rows):
        return "the runs of the scaling study differ from this trunk in batch, text or base learning rate"
    return "no size of the scaling study has two curves, one of them with a decay"


def _bytes_per_token(book: LabBook, row: Row) -> float | None:
    """UTF-8 bytes for each predicted token of the trunk's mixture, by its held-out parts; None where they are not known."""
    mixture = dict(row["config"]["plan"]["segments"][-1]["mixture"])
    known = book.facts(row["program"], "corpus")
    if not all(known.get(name, {}).get("heldout_predictions") for name in mixture):
        return None
    each = {name: known[name]["heldout_bytes"] / known[name]["heldout_predictions"] for name in mixture}
    return sum(weight * each[name] for name, weight in mixture.items()) / sum(mixture.values())


def trunk_losses(home: Path, row: Row) -> Array:
    """The training loss of each update of a run so far, from its own folder: a running one is not in the lab book yet."""
    found = {step: values.get("loss") for step, values in read_metrics(home / row["folder"])}
    losses = np.full(max(found, default=0), np.nan)
    for step, value in found.items():
        if value is not None:
            losses[step - 1] = value
    return losses


def _tunnel_sets(book: LabBook, row: Row) -> list[CurveSet]:
    """The scaling study's sets that share batch, text and base learning rate with the trunk and have a decay."""
    wanted = _beside_shape(row["config"])
    rows = [r for r in book.runs(program=row["program"], study="scaling") if _beside_shape(r["config"]) == wanted]
    first = min((r["config"]["seed"] for r in rows), default=0)  # one seed is enough for a drop, and quicker to fit
    rows = [r for r in rows if r["config"]["seed"] == first]
    sets = [made for made in curve_sets(book, rows) if made.decays and len(made.curves) > 1]
    return sorted(sets, key=lambda made: -(made.parameters or 0))[:_SIZES]


def _beside_shape(config: Row) -> str:
    return alike({**config, "shape": None})


def _rule(book: LabBook, row: Row) -> DecayRule:
    """The decay of the scaling study's last branch."""
    decays = book.runs(program=row["program"], study="scaling", kind="decay")
    return (rule_of(decays[-1]["config"]) if decays else None) or DecayRule()


def _models(home: Path, program: str, sets: Sequence[CurveSet], fit: bool) -> dict[float, CurveModel]:
    """A law for each size, from the program's folder if these curves were fitted before; none without a fit that is wanted."""
    found: dict[float, CurveModel] = {}
    for made in sets:
        key = content_hash([_KERNELS, _DRAWS, *([c.name, c.steps.tolist(), c.losses.tolist()] for c in made.curves)])
        path = Home(home).program(program) / "studies" / f"curves-{key[:12]}.json"
        try:
            model = CurveModel.from_dict(read_json(path))
        except (ArtefactError, LawError):
            if not fit:
                return {}
            model = fit_curves(made.curves, kernels=_KERNELS, draws=_DRAWS, unit=made.unit)
            with contextlib.suppress(UserError, OSError):  # a home that cannot be written is asked again next time
                write_json(path, model.to_dict())
        found[float(made.parameters or 0)] = model
    return found


def average_job(home: Path, row: Row, last: int = 5) -> dict[str, Any]:
    """What the scoring of a trunk's averaged last checkpoints needs to know.

    Raises:
        UserError: the trunk has fewer than two checkpoints.
    """
    folder = home / row["folder"]
    saved = steps_saved(folder)[-last:]
    if len(saved) < 2:
        raise UserError(
            f"{row['program']}/{row['name']}", f"expected at least two checkpoints to average, found {len(saved)}",
            "raise trunk.keep or lower trunk.checkpoint_every",
        )  # fmt: skip
    prepared = read_json(Home(home).program(row["program"]) / "prepared.json")
    names = {name for segment in row["config"]["plan"]["segments"] for name, _ in segment["mixture"]}
    return {
        "checkpoints": [str(checkpoint_path(folder, step)) for step in saved],
        "corpora": {name: str(home / prepared["corpora"][name]["folder"]) for name in sorted(names)},
        "row": row["config"]["plan"]["row"], "tokens": row["config"].get("score_tokens"),
    }  # fmt: skip


def note_average(book: LabBook, row: Row, answer: Mapping[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """Keeps what averaging gave: bits per byte of the newest checkpoint and of the averages, over the trunk's mixture."""
    mixture = dict(row["config"]["plan"]["segments"][-1]["mixture"])
    total = sum(mixture.values())

    def mean(scores: Mapping[str, float]) -> float:
        return sum(weight / total * scores[name] for name, weight in mixture.items())

    averages = {str(count): mean(scores) for count, scores in answer["averages"].items()}
    best = min(averages, key=averages.__getitem__)
    fact = {
        "step": steps[-1], "steps": list(steps), "newest": mean(answer["newest"]), "averages": averages, "best": int(best),
        "drop": averages[best] / mean(answer["newest"]) - 1,
    }  # fmt: skip
    with book:
        book.put_fact(row["program"], FACT, Path(row["folder"]).name, fact)
    return fact


def read_now(home: Path, book: LabBook, row: Row, *, fit: bool = True) -> Now:
    """What the law and what averaged checkpoints say about a trunk; ``fit`` as for ``what_now``."""
    averaged = book.fact(row["program"], FACT, Path(row["folder"]).name)
    law, why = _asked(home, book, row, fit)
    return Now(str(row["name"]), law, averaged, _bytes_per_token(book, row), why)
