"""The verbs as functions, and runs as objects: what ``import windtunnel as wt`` offers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel import comparison, manage, pipeline
from windtunnel import planning as dry_run
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.laws.forecast import Forecast
from windtunnel.laws.loss import LossLaw
from windtunnel.laws.sealed import LAW
from windtunnel.model.transformer import Transformer
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.recipe_new import new_recipe
from windtunnel.train.checkpoint import load_model, newest_whole

AnyRecipe = Recipe | str | Path


def home_folder(home: str | Path | None = None) -> Path:
    """The home: as given, else the environment's WINDTUNNEL_HOME, else ``windtunnel-home`` here."""
    return Path(home or os.environ.get("WINDTUNNEL_HOME") or "windtunnel-home")


def _read(recipe: AnyRecipe, overrides: Sequence[str]) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)


def new(name: str, *, data: Sequence[str | Path], size: str = "0.3M") -> str:
    """The text of a commented recipe for one's own text."""
    return new_recipe(name, size=size, data=data)


def plan(recipe: AnyRecipe, *overrides: str, home: str | Path | None = None, measure: bool = True) -> Any:
    """What would be done, derived and shown; does nothing."""
    return dry_run.plan(_read(recipe, overrides), home_folder(home), measure=measure)


def run(
    recipe: AnyRecipe,
    *overrides: str,
    home: str | Path | None = None,
    until: str | None = None,
    devices: str | None = None,
) -> Any:
    """Does what the recipe says; what is done is skipped, what was stopped continues."""
    return pipeline.run(_read(recipe, overrides), home_folder(home), until=until, devices=devices)


def forecast(recipe: AnyRecipe, *overrides: str, home: str | Path | None = None, devices: str | None = None) -> Any:
    """Runs the tunnel and says what the big run will reach, with an interval; stops there."""
    return pipeline.run(_read(recipe, overrides), home_folder(home), devices=devices, stop_after_forecast=True)


def status(home: str | Path | None = None) -> Any:
    """Programs, stages and runs of a home."""
    return manage.status(home_folder(home))


def compare(*runs: str, home: str | Path | None = None) -> Any:
    """Differences of recipes and losses between runs."""
    return comparison.compare(home_folder(home), list(runs))


def clean(*, really: bool = False, home: str | Path | None = None) -> Any:
    """Lists what can go, and removes it if ``really``."""
    return manage.clean(home_folder(home), really=really)


def open(run: str | Path, home: str | Path | None = None) -> Run:
    """Opens a run: ``PROGRAM/NAME``, ``NAME`` if only one program has it, or the run's folder.

    Raises:
        UserError: there is no such run, or several.
    """
    folder = home_folder(home)
    book = comparison.open_book(folder)
    return Run(folder, book, comparison.find_run(book, str(run)))


class Run:
    """One run of the lab book: a trunk, a branch or a trial."""

    def __init__(self, home: Path, book: LabBook, row: dict[str, Any]) -> None:
        self.home, self._book, self._row = home, book, row

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}, {self.folder}>"

    @property
    def name(self) -> str:
        """``PROGRAM/NAME``."""
        return f"{self._row['program']}/{self._row['name']}"

    @property
    def folder(self) -> Path:
        """Where its checkpoints and metrics lie."""
        path = Path(self._row["folder"])
        return path if path.is_absolute() else self.home / path

    @property
    def status(self) -> str:
        return self._row["status"]

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the run depends on."""
        return self._row["config"]

    def metrics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Metric name → (steps, values), both of equal length; a value that was not finite is NaN."""
        columns = {name: self._book.metrics(self._row["id"], name) for name in self._book.metric_names(self._row["id"])}
        return {
            name: (np.array(steps, np.int64), np.array(values, np.float64)) for name, (steps, values) in columns.items()
        }

    def scores(self) -> list[dict[str, Any]]:
        """Its evaluation results: corpus, name, value, unit, count, interval."""
        return self._book.scores(self._row["id"])

    @property
    def forecast(self) -> Forecast | None:
        """What the sealed forecast of this run, or else of the program's longest, says; None before it is made."""
        sealed = self._book.facts(self._row["program"], LAW)
        if not sealed:
            return None
        longest = max(sealed.values(), key=lambda one: one["forecast"]["tokens"])
        return Forecast.from_dict(sealed.get(Path(self._row["folder"]).name, longest)["forecast"])

    @property
    def law(self) -> LossLaw | None:
        """The law behind the forecast, in the form that predicted held-out proxies best; None before that."""
        made = self.forecast
        return max(made.forms, key=lambda form: form.weight).law if made else None

    def model(self, device: str = "cpu") -> Transformer:
        """The model of the newest whole checkpoint, ready to be called.

        Raises:
            UserError: the run has none.
        """
        newest = newest_whole(self.folder)
        if newest is None:
            raise UserError(self.name, "expected a run with a checkpoint, found none", "run it first")
        return load_model(newest[1], device)[0]

    def evaluate(
        self, *, tasks: dict[str, Path] | None = None, tokens: int | None = None, retrieval: int = 0
    ) -> Any:  # fmt: skip
        """Scores it on every held-out corpus, and on tasks."""
        return manage.evaluate(self.home, self.name, tasks=tasks or {}, tokens=tokens, retrieval=retrieval)

    def report(self, out: Path | None = None, *, share: bool = False) -> Any:
        """Writes the report of its program."""
        return manage.report(self.home, self._row["program"], out=out, share=share)

    def export(self, out: Path | None = None, *, dynamic_ntk: str | None = None) -> Any:
        """Writes a Hugging Face folder and checks it; ``dynamic_ntk`` as in ``windtunnel export``."""
        return manage.export(self.home, self.name, out=out, dynamic_ntk=dynamic_ntk)

    def chat(self, prompt: str, **sampling: Any) -> Any:
        """Answers one prompt."""
        return manage.chat(self.home, self.name, prompt=prompt, **sampling)

    def finish(self, *, devices: str | None = None) -> Any:
        """Starts the decay of a trunk at its next step."""
        return manage.finish(self.home, self.name, devices=devices)
