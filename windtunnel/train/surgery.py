"""Surgery: a larger model made of a checkpoint, weights and moments, that computes what the checkpoint computes.

- One MLP becomes E experts, each a copy of it, with moments copied and a fresh router (sparse upcycling, arXiv 2212.05055).
  Weights of the chosen experts add up to 1, so the copies together say what the one MLP said. Drop-upcycling (arXiv
  2502.19261) draws a share of each expert's inner columns anew, which breaks that on purpose.
- A tied matrix becomes an embedding and a head that starts as its copy, moments included.

Everything else is copied as it is. Step count and data position are the parent's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from windtunnel.base.artefact import read_manifest
from windtunnel.base.errors import ArtefactError
from windtunnel.model.moe import Experts
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.train.checkpoint import Position, restore, rows_held
from windtunnel.train.control import Control
from windtunnel.train.folder import KIND
from windtunnel.train.optimizer import build_optimizer, clear_moments, moments
from windtunnel.train.parallel import local
from windtunnel.train.stage import Stage
from windtunnel.train.step import Trainer

TOLERANCE = 1e-5
"""Largest difference of a logit from the parent's before the first step in fp32, relative to the largest where that exceeds 1."""
_LOW_TOLERANCE = 5e-2


def operate(stage: Stage, path: Path, trainer: Trainer, control: Control) -> Position:
    """Fills a trainer's model and moments from a smaller model's checkpoint and compares their logits.

    Raises:
        ArtefactError: the checkpoint is damaged or of a model that cannot grow into this one; or the grown model does not
            compute what it should, and nothing was trained.
    """
    assert stage.surgery is not None
    parent = Stage.from_dict(read_manifest(path, KIND, verify=False).config["stage"])
    check_growth(parent.shape, stage.shape, str(path))
    old = Transformer(parent.shape, parent.parametrization, device=trainer.runtime.torch_device)
    old_optimizer = build_optimizer(old, parent.optimizer)
    position = restore(path, old, old_optimizer)
    clear_moments(trainer.optimizer, position.optimizer_step)
    weights = {name: parameter.detach() for name, parameter in old.named_parameters()}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            _fill(parameter.detach(), _weight(name, weights, trainer.model, stage))
        olds = dict(moments(old, old_optimizer))
        for name, moment in moments(trainer.model, trainer.optimizer):
            _fill(moment, _moment(name, olds, moment, stage))
    for mine, theirs in zip(trainer.model.layers, old.layers, strict=True):
        if isinstance(mine.mlp, Experts) and isinstance(theirs.mlp, Experts):
            mine.mlp.bias.copy_(theirs.mlp.bias)
    _compare(old, trainer, stage, control)
    # Rows of another length are another order of the data: they are counted from the beginning of the stage's own plan.
    return position if parent.plan.row == stage.plan.row else replace(position, sequences=0)


def check_growth(old: Shape, new: Shape, where: str) -> None:
    """Raises if no surgery leads from one shape to the other.

    Raises:
        ArtefactError: naming what differs.
    """
    may = {"experts", "top_k", "tied", "rope_theta", "max_positions", "rope_scaling", "rope_factor", "rope_original"}
    before, now = old.__dict__, new.__dict__
    wrong = [name for name in now if name not in may and before[name] != now[name]]
    if old.experts not in (1, new.experts):
        wrong.append("experts")
    if not old.tied and new.tied:
        wrong.append("tied")
    if wrong:
        changes = ", ".join(f"{name} {before[name]} to {now[name]}" for name in wrong)
        raise ArtefactError(
            where, f"expected a model that differs by experts or tying alone, found {changes}", "start elsewhere"
        )


def _source(name: str, old: dict[str, Tensor]) -> tuple[Tensor | None, bool]:
    """The parent's tensor from which one of ours comes, and whether it becomes one for each expert; None for a router."""
    if name in old:
        return old[name], False
    if f"{name}.weight" in old:
        return old[f"{name}.weight"], True
    if name.endswith("head.weight"):
        return old[name.removesuffix("head.weight") + "embedding.weight"], False
    return None, False


def _weight(name: str, old: dict[str, Tensor], model: Transformer, stage: Stage) -> Tensor:
    assert stage.surgery is not None
    value, each = _source(name, old)
    if value is None:
        return model.initial(name, stage.seed) * stage.surgery.router
    if not each:
        return value
    copies_E = value.expand(stage.shape.experts, *value.shape).clone()
    for expert, columns in _dropped(name, stage):
        part = copies_E[expert].index_select(_inner(name), columns)
        generator = _generator(stage, name, expert)
        drawn = torch.randn(part.shape, generator=generator).to(part) * part.std() + part.mean()
        copies_E[expert].index_copy_(_inner(name), columns, drawn)
    return copies_E


def _moment(name: str, old: dict[str, Tensor], like: Tensor, stage: Stage) -> Tensor:
    """A copy of the parent's. Of redrawn columns the first moment is zero; the second stays, as the gradient's likely size."""
    value, each = _source(name, old)
    if value is None:
        return torch.zeros(like.shape, device=like.device)
    if not each:
        return value
    copies_E = value.expand(stage.shape.experts, *value.shape).clone()
    if name.startswith("exp_avg/"):
        for expert, columns in _dropped(name, stage):
            copies_E[expert].index_fill_(_inner(name), columns, 0.0)
    return copies_E


def _inner(name: str) -> int:
    """The dimension of an expert's matrix that counts inner columns."""
    return 1 if name.endswith(".down") else 0


def _dropped(name: str, stage: Stage) -> Iterator[tuple[int, Tensor]]:
    """Each expert's columns that are drawn anew: the same for its three matrices and their moments."""
    assert stage.surgery is not None
    count, layer = int(stage.surgery.drop * stage.shape.ff), name.rpartition("/")[2].rpartition(".")[0]
    for expert in range(stage.shape.experts if count else 0):
        yield expert, torch.randperm(stage.shape.ff, generator=_generator(stage, layer, expert))[:count]


def _generator(stage: Stage, name: str, expert: int) -> torch.Generator:
    digest = hashlib.sha256(f"{stage.seed}:{name}:{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _fill(target: Tensor, value: Tensor) -> None:
    first, count = rows_held(target)
    local(target).copy_(value[first : first + count])


@torch.no_grad()
def _compare(old: Transformer, trainer: Trainer, stage: Stage, control: Control) -> None:
    """Refuses a copy that does not compute what its parent computes; where columns were redrawn, says how far apart they are."""
    assert stage.surgery is not None
    generator = torch.Generator().manual_seed(stage.seed)
    length = min(stage.plan.row, 64)
    tokens_BT = torch.randint(0, stage.shape.vocab, (4, length), generator=generator).to(trainer.runtime.torch_device)
    model, vocab = trainer.model, stage.shape.vocab
    if old.shape.rope != stage.shape.rope:  # stretched positions are meant to change the logits: both get the new ones
        old.cos, old.sin = model.cos, model.sin
    before, model.compute_dtype = model.compute_dtype, None
    logits, wanted = model(tokens_BT)[..., :vocab].float(), old(tokens_BT)[..., :vocab].float()
    model.compute_dtype = before
    gap, largest = float((logits - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    if stage.surgery.drop:
        control.say(
            f"{stage.name}: {stage.surgery.drop:.0%} of the columns are drawn anew: logits differ by up to {gap:.3g}"
        )
        return
    low = trainer.runtime.world > 1 and trainer.runtime.dtype != "float32"  # sharded weights are gathered in bf16
    limit = (_LOW_TOLERANCE if low else TOLERANCE) * largest
    if not gap <= limit:
        problem = f"expected the parent's logits to {limit:.2g} before the first step, found a difference of {gap:.2g}"
        raise ArtefactError(stage.name, problem, "nothing was trained; please report this")
    control.say(f"{stage.name}: grown from its parent, logits agree to {gap:.1e}")
