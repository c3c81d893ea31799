"""Checkpoints: atomic folders with weights, moments and position, whole or sliced over ranks; verified when loaded.

A process that holds all writes ``weights.safetensors`` and ``optimizer.safetensors``. Several with slices write one each, with
a JSON table of global shapes and row offsets; any number of processes can read either. Nothing is pickled.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from windtunnel.base.artefact import Manifest, explained, read_json, read_manifest, sweep, write_artefact, write_json
from windtunnel.base.errors import ArtefactError
from windtunnel.base.runtime import Runtime
from windtunnel.model.adapters import adapters, is_adapter, merged_weights
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.folder import KIND, checkpoint_path, steps_saved
from windtunnel.train.optimizer import Optimizer, clear_moments, moments
from windtunnel.train.parallel import barrier, local
from windtunnel.train.stage import Stage


@dataclass(frozen=True)
class Position:
    """How far a run is: updates of the trunk line, updates that were applied, sequences consumed, updates skipped."""

    step: int = 0
    optimizer_step: int = 0
    sequences: int = 0
    skipped: int = 0


def save(
    run: Path, stage: Stage, model: Transformer, optimizer: Optimizer, position: Position, runtime: Runtime,
    facts: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint of this step and returns its folder. Every rank must call it.

    ``facts`` are recorded but not hashed; with ``pinned`` among them, ``rotate`` never deletes it.
    """
    path = checkpoint_path(run, position.step)
    tensors = {"weights": merged_weights(model), "optimizer": dict(moments(model, optimizer))}
    if beside := adapters(model):
        tensors["adapters"] = beside
    state = {**asdict(position), "stage": stage.to_dict(), "world": runtime.world}
    facts = {"numeric_class": runtime.numeric_class(), "pinned": False, **(facts or {})}
    if runtime.world == 1 or not runtime.sharded:
        if runtime.rank == 0:
            with write_artefact(path, KIND, state, facts=facts) as folder:
                for name, part in tensors.items():
                    _write(part, folder / f"{name}.safetensors")
        barrier(runtime)
        return path
    staging = run / "checkpoints" / f".slices-{position.step}"
    with explained(staging):
        staging.mkdir(parents=True, exist_ok=True)
        for name, part in tensors.items():
            _write_slices(staging, name, part, runtime)
    barrier(runtime)
    if runtime.rank == 0:
        with write_artefact(path, KIND, state, facts=facts) as folder:
            for file in sorted(staging.iterdir()):
                os.replace(file, folder / file.name)
        shutil.rmtree(staging)
    barrier(runtime)
    return path


def sweep_checkpoints(run: Path) -> None:
    """Deletes what killed saves and deletions left. Slices of an earlier world size must not reach a later checkpoint."""
    folder = run / "checkpoints"
    sweep(folder)
    for slices in folder.glob(".slices-*"):
        shutil.rmtree(slices, ignore_errors=True)


def newest_whole(run: Path, warn: Any = None, limit: int | None = None) -> tuple[int, Path] | None:
    """The newest checkpoint of a run, up to step ``limit``, whose content matches its manifest; damaged ones are passed over
    and reported."""
    for step in reversed([s for s in steps_saved(run) if limit is None or s <= limit]):
        path = checkpoint_path(run, step)
        try:
            read_manifest(path, KIND)
            return step, path
        except ArtefactError as error:
            if warn:
                warn(f"passing over a damaged checkpoint: {error}")
    return None


def restore(path: Path, model: Transformer, optimizer: Optimizer | None) -> Position:
    """Loads verified weights, and moments if an optimizer is given, into this process's (slices of) tensors.

    The weights of a stage with adapters are merged ones: with an optimizer its adapters are loaded too, and whoever goes on has
    to load the parent's weights after that.

    Raises:
        ArtefactError: the checkpoint is damaged or of another shape.
    """
    manifest = read_manifest(path, KIND)
    state = manifest.config
    with torch.no_grad():
        _fill(path, "weights", _weights(model))
        if optimizer is not None:
            if beside := adapters(model):
                _fill(path, "adapters", beside)
            clear_moments(optimizer, state["optimizer_step"])
            _fill(path, "optimizer", dict(moments(model, optimizer)))
    return Position(**{name: state[name] for name in Position.__dataclass_fields__})


def check_parent(stage: Stage, path: Path, tokenizer: str) -> None:
    """Raises where a stage cannot grow from this checkpoint. Which shapes surgery can bridge is for surgery to say.

    Raises:
        ArtefactError: it is damaged, of another shape and no surgery is asked for, or of another tokenizer than ``tokenizer``
            (if both are known).
    """
    manifest = read_manifest(path, KIND, verify=False)
    found, wanted = asdict(Shape(**manifest.config["stage"]["shape"])), asdict(stage.shape)
    differing = sorted(name for name in wanted if found[name] != wanted[name])
    if differing and stage.surgery is None:
        here, there = (", ".join(f"{name} {shape[name]}" for name in differing) for shape in (wanted, found))
        raise ArtefactError(str(path), f"expected a checkpoint with {here}, found {there}", "grow from another model")
    known = manifest.facts.get("tokenizer")
    if known and tokenizer and known != tokenizer:
        raise ArtefactError(
            str(path),
            f"expected a checkpoint of the tokenizer that the corpora were built with ({tokenizer[:10]}), found {known[:10]}",
            "build the corpora with the model's tokenizer",
        )


def load_model(
    path: Path, device: str = "cpu", *, compute_dtype: torch.dtype | None = None
) -> tuple[Transformer, Manifest]:
    """A model with the weights of a checkpoint folder, for scoring, sampling or export.

    Raises:
        ArtefactError: the checkpoint is missing or damaged.
    """
    manifest = read_manifest(path, KIND, verify=False)  # restore verifies
    stage = Stage.from_dict(manifest.config["stage"])
    model = Transformer(stage.shape, stage.parametrization, device=torch.device(device))
    if compute_dtype is not None:
        model.compute_dtype = compute_dtype
    restore(path, model, None)
    return model.eval(), manifest


def rotate(run: Path, last: int, keep: frozenset[int]) -> None:
    """Deletes checkpoints that are neither pinned, nor asked for, nor among the ``last`` newest ones."""
    steps = steps_saved(run)
    for step in steps[: max(0, len(steps) - last)]:
        path = checkpoint_path(run, step)
        if step in keep or _is_pinned(path):
            continue
        doomed = path.with_name(f".{path.name}.old")
        os.replace(path, doomed)  # a kill in the middle of a deletion leaves nothing that looks like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def _is_pinned(path: Path) -> bool:
    try:
        return bool(read_manifest(path, KIND, verify=False).facts.get("pinned"))
    except ArtefactError:
        return False


def _weights(model: Transformer) -> dict[str, Tensor]:
    """What a model has learnt: its parameters, and the buffers that belong to its state."""
    state = model.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if not is_adapter(model, name)}


def rows_held(tensor: Tensor) -> tuple[int, int]:
    """First row and number of rows that this process holds; sharding follows torch.chunk over dimension 0."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    world, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    size = -(-tensor.shape[0] // world)
    first = min(rank * size, tensor.shape[0])
    return first, min(size, tensor.shape[0] - first)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes tensors; what the system refuses is an OSError as everywhere else."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(file)) from None


def _write_slices(folder: Path, name: str, tensors: dict[str, Tensor], runtime: Runtime) -> None:
    # What is not sharded is whole on every rank, and written by one.
    tensors = {key: t for key, t in tensors.items() if isinstance(t, DTensor) or runtime.rank == 0}
    _write({key: local(t).contiguous() for key, t in tensors.items()}, folder / f"{name}-{runtime.rank}.safetensors")
    table = {key: {"shape": list(t.shape), "rows": list(rows_held(t))} for key, t in tensors.items()}
    write_json(folder / f"{name}-{runtime.rank}.json", table)


def _fill(path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    whole = path / f"{name}.safetensors"
    tables = [(whole, None)] if whole.is_file() else [
        (path / f"{name}-{table.stem.rpartition('-')[2]}.safetensors", read_json(table)) for table in path.glob(f"{name}-*.json")
    ]  # fmt: skip
    missing = {key: rows_held(t)[1] for key, t in tensors.items()}
    try:
        with ExitStack() as stack:
            for file, table in tables:
                source = stack.enter_context(safe_open(file, framework="pt"))
                for key, tensor in tensors.items():
                    if table is None or key in table:
                        missing[key] -= _copy(source, key, tensor, table[key]["rows"] if table else None)
    except (SafetensorError, KeyError) as error:
        raise ArtefactError(
            str(path), f"expected the tensors of this shape, {error}", "is it another model's, or another optimizer's?"
        ) from None
    for key, rows in missing.items():
        if rows:
            raise ArtefactError(str(path), f"expected all rows of {key}, {rows} are missing", "delete this checkpoint")


def _copy(source: Any, key: str, tensor: Tensor, held: list[int] | None) -> int:
    """Copies the rows that the file holds and this process needs; returns their number."""
    piece = source.get_slice(key)
    first, count = rows_held(tensor)
    start, number = held or (0, piece.get_shape()[0])
    low, high = max(first, start), min(first + count, start + number)
    if high <= low:
        return 0
    rows = piece[low - start : high - start]
    target = local(tensor)[low - first : high - first]
    if rows.shape != target.shape:
        raise KeyError(f"{key} is {list(rows.shape)}, expected {list(target.shape)}")
    target.copy_(rows)
    return high - low
