"""The frozen reference of preference learning: its log-likelihoods of every pair, computed once and kept, or anew in each step.

Precomputed, there is never a second model in memory: the parent's weights are loaded into the one that will be trained, every
pair is scored, and the numbers are stored under the reference's identity and the pairs' hash. What does not match is computed
again. Live, a frozen copy of the parent stands beside the model; under adapters the model without them is that copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from windtunnel.base.artefact import read_manifest, write_artefact
from windtunnel.base.errors import ArtefactError
from windtunnel.corpus.loader import Loader, Rows, empty_rows, fill_row
from windtunnel.corpus.store import Corpus
from windtunnel.model.adapters import set_aside
from windtunnel.model.transformer import Transformer
from windtunnel.train.checkpoint import restore
from windtunnel.train.objectives import PairwisePreference
from windtunnel.train.parallel import any_rank, barrier, shard, sum_over_ranks
from windtunnel.train.stage import Stage, Start
from windtunnel.train.step import Trainer, to_device

KIND = "reference"


def reference_values(
    stage: Stage, run: Path, corpora: Mapping[str, Corpus], parent: Path | None, trainer: Trainer
) -> dict[str, np.ndarray] | None:
    """Log-likelihoods of the reference for each pair, float32 [rows, 2 · pairs in a row] by corpus; None where the objective
    needs none, or is told them in each step.

    Leaves the parent's weights in the model where it had to compute them. Every rank computes all of them.

    Raises:
        ArtefactError: the parent's checkpoint is missing or damaged.
    """
    preference = stage.preference
    if preference is None or not preference.has_reference or preference.is_beside:
        return None
    start, parent = _parent(stage, run, parent)
    key = {"reference": start.to_dict(), "pairs": dict(stage.plan.packed), "row": stage.plan.row}
    path = run / "reference"
    found = _stored(path, key)
    if any_rank(found is None, trainer.runtime):  # all or none: a fast rank may have stored it before a slow one looked
        restore(parent, trainer.model, None)
        found = {name: _scored(trainer, corpora[name], Loader(stage.plan, corpora)) for name in stage.plan.corpora}
        if trainer.runtime.rank == 0:
            with write_artefact(path, KIND, key) as folder:
                save_file(found, folder / "values.safetensors")
        barrier(trainer.runtime)
    return found


class LiveReference:
    """Adds a frozen reference's log-likelihoods to each step's rows: a copy of the parent, or the model without its adapters."""

    def __init__(self, model: Transformer, trainer: Trainer) -> None:
        self._model, self._trainer = model, trainer

    def __call__(self, rows: Rows) -> Rows:
        """The rows with ``values``, float32 [rows, 2 · pairs in a row]. Every rank calls it and makes as many passes, which
        slices need."""
        trainer = self._trainer
        batch = sum_over_ranks(np.array([len(rows)]), trainer.runtime)[0]
        most = math.ceil(batch / trainer.runtime.world)
        with set_aside(self._model):
            return replace(rows, values=_likelihoods(self._model, rows, trainer, most))


def live_reference(stage: Stage, run: Path, parent: Path | None, trainer: Trainer) -> LiveReference | None:
    """The reference of a stage that asks for one in each step; None where none is asked for.

    Raises:
        ArtefactError: the parent's checkpoint is missing or damaged.
    """
    if stage.preference is None or not stage.preference.is_beside:
        return None
    _, parent = _parent(stage, run, parent)
    if stage.lora is not None:
        return LiveReference(trainer.model, trainer)
    model = Transformer(stage.shape, stage.parametrization, trainer.runtime.torch_device, trainer.model.compute_dtype)
    model.requires_grad_(False)
    shard(model, trainer.runtime)
    restore(parent, model, None)
    return LiveReference(model, trainer)


def _parent(stage: Stage, run: Path, parent: Path | None) -> tuple[Start, Path]:
    if stage.start is None or parent is None:
        raise ArtefactError(str(run), "expected a parent as the reference, found none", "grow it from another branch")
    return stage.start, parent


def _stored(path: Path, key: dict[str, Any]) -> dict[str, np.ndarray] | None:
    try:
        manifest = read_manifest(path, KIND)
        return load_file(path / "values.safetensors") if manifest.config == key else None
    except (ArtefactError, SafetensorError, OSError):
        return None


def _scored(trainer: Trainer, corpus: Corpus, loader: Loader) -> np.ndarray:
    index, out = loader.indices[corpus.name], []
    for begin in range(0, index.rows, trainer.micro):
        rows = empty_rows(min(trainer.micro, index.rows - begin), index.row)
        for at in range(len(rows)):
            fill_row(rows, at, corpus.train, index.of(begin + at))
        out.append(_likelihoods(trainer.model, rows, trainer, len(rows)))
    return np.concatenate(out)


@torch.no_grad()
def _likelihoods(model: Transformer, rows: Rows, trainer: Trainer, most: int) -> np.ndarray:
    """Log-likelihoods of both answers of each pair, float32 [rows, 2 · pairs in a row], in micro-batches that hold ``most`` rows
    together."""
    objective, out = trainer.objective, []
    assert isinstance(objective, PairwisePreference)
    for begin in range(0, most, trainer.micro):
        tokens, targets, documents = to_device(rows, begin, trainer)[:3]
        assert tokens is not None
        assert targets is not None
        assert documents is not None
        found, _ = objective.log_likelihoods(model, tokens, targets, documents)
        out.append(found[: max(0, len(rows) - begin)].flatten(1).float().cpu().numpy())
    return np.concatenate(out)
