"""The frozen reference of preference learning: its log-likelihoods of every pair, computed once, kept beside the run.

There is never a second model in memory: the parent's weights are loaded into the one that will be trained, every pair is scored,
and the numbers are stored under the reference's identity and the pairs' hash. What does not match is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from windtunnel.base.artefact import read_manifest, write_artefact
from windtunnel.base.errors import ArtefactError
from windtunnel.corpus.loader import Loader, empty_rows, fill_row
from windtunnel.corpus.store import Corpus
from windtunnel.train.checkpoint import restore
from windtunnel.train.objectives import PairwisePreference
from windtunnel.train.parallel import any_rank, barrier
from windtunnel.train.stage import Stage
from windtunnel.train.step import Trainer, to_device

KIND = "reference"


def reference_values(
    stage: Stage, run: Path, corpora: Mapping[str, Corpus], parent: Path | None, trainer: Trainer
) -> dict[str, np.ndarray] | None:
    """Log-likelihoods of the reference for each pair, float32 [rows, 2] by corpus; None where the objective needs none.

    Leaves the parent's weights in the model where it had to compute them. Every rank computes all of them.

    Raises:
        ArtefactError: the parent's checkpoint is missing or damaged.
    """
    objective = trainer.objective
    if not isinstance(objective, PairwisePreference) or not objective.preference.has_reference:
        return None
    if stage.start is None or parent is None:
        raise ArtefactError(str(run), "expected a parent as the reference, found none", "grow it from another branch")
    key = {"reference": stage.start.to_dict(), "pairs": dict(stage.plan.packed), "row": stage.plan.row}
    path = run / "reference"
    found = _stored(path, key)
    if any_rank(found is None, trainer.runtime):  # all or none: a fast rank may have stored it before a slow one looked
        restore(parent, trainer.model, None)
        found = {
            name: _scored(trainer, objective, corpora[name], Loader(stage.plan, corpora)) for name in stage.plan.corpora
        }
        if trainer.runtime.rank == 0:
            with write_artefact(path, KIND, key) as folder:
                save_file(found, folder / "values.safetensors")
        barrier(trainer.runtime)
    return found


def _stored(path: Path, key: dict[str, Any]) -> dict[str, np.ndarray] | None:
    try:
        manifest = read_manifest(path, KIND)
        return load_file(path / "values.safetensors") if manifest.config == key else None
    except (ArtefactError, SafetensorError, OSError):
        return None


@torch.no_grad()
def _scored(trainer: Trainer, objective: PairwisePreference, corpus: Corpus, loader: Loader) -> np.ndarray:
    index, out = loader.indices[corpus.name], []
    for begin in range(0, index.rows, trainer.micro):
        rows = empty_rows(min(trainer.micro, index.rows - begin), index.row)
        for at in range(len(rows)):
            fill_row(rows, at, corpus.train, index.of(begin + at))
        tokens, targets, documents = to_device(rows, 0, trainer)[:3]
        assert tokens is not None
        assert targets is not None
        assert documents is not None
        found, _ = objective.log_likelihoods(trainer.model, tokens, targets, documents)
        out.append(found[: len(rows)].float().cpu().numpy())
    return np.concatenate(out)
