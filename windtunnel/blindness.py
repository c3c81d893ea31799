"""Whether a forecast is blind: its corpus and size were never trained when law and intervals were fixed. Needs no torch.

The size is N, the non-embedding parameters; the corpus is any that the run reads, by content hash. Any run of this home counts
that has begun, whatever it was for: a trunk of another program, a trial, a proxy, one that diverged. What was never begun
does not.

Law and intervals are fixed when a forecast that says the same (equal points, forms, N, D and intervals) is first sealed. So the
forecast of a second seed is blind if it repeats a blind one word for word; fitted anew, perhaps by someone who has seen the
first seed end, it is a rehearsal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from windtunnel.base.errors import WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.laws.sealed import Forecast, Sealed, read_forecast
from windtunnel.model.shape import Shape
from windtunnel.train.stage import Stage

Kind = Literal["blind", "rehearsal"]
_BEGUN = ("running", "done", "failed")


def trained_before(book: LabBook, stage: Stage, known: Collection[str] = ()) -> list[str]:
    """Runs of the home with this stage's N that have read one of its corpora, by id.

    Args:
        known: hashes of corpora that do not count.
    """
    hashes = {content for _, content in stage.corpora} - set(known)
    return [row["id"] for row in book.runs() if row["status"] in _BEGUN and _alike(row["config"], stage, hashes)]


def _alike(config: Mapping[str, Any], stage: Stage, hashes: set[str]) -> bool:
    shape = config.get("shape")
    return bool(shape) and hashes & set(config["corpora"].values()) != set() and Shape(**shape).body == stage.shape.body


def kind_of(book: LabBook, stage: Stage, said: Forecast, sealed: Sequence[Sealed]) -> Kind:
    """The label of a forecast about ``stage`` that is sealed now.

    Args:
        sealed: the forecasts of this program so far.
    """
    corpora, words = dict(stage.corpora), said.to_dict()
    for earlier in sealed:
        same = earlier.facts.get("corpus") == corpora and earlier.forecast.to_dict() == words
        if same and earlier.facts["kind"] == "blind":
            return "blind"
    return "rehearsal" if trained_before(book, stage) else "blind"


def kind_of_adaptation(book: LabBook, stage: Stage, parent: Stage, read: Collection[Stage]) -> Kind:
    """The label of an adaptation's forecast that is sealed now: blind while nothing of this N has read the new text but what
    the forecast reads itself.

    Args:
        parent: the model that is adapted; what it has read is not new.
        read: the short branches and their trunks.
    """
    own = {one.folder_name for one in read}
    before = trained_before(book, stage, [content for _, content in parent.corpora])
    return "rehearsal" if [run for run in before if run.rpartition("/")[2] not in own] else "blind"


def read_all(folder: Path) -> list[Sealed]:
    """The whole forecasts of a folder; damaged ones and other files are left out."""
    found: list[Sealed] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read_forecast(path))
        except WindtunnelError:
            continue
    return found
