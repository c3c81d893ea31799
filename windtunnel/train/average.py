"""The average of several checkpoints' weights, for a stage that trains nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from windtunnel.base.errors import ArtefactError
from windtunnel.model.transformer import Transformer
from windtunnel.train.checkpoint import check_parent, restore
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.stage import Member, Stage


def member_checkpoint(run: Path, member: Member) -> Path:
    """The checkpoint of a member, whose run lies beside this one.

    Raises:
        ArtefactError: there is no such run.
    """
    found = sorted(run.parent.glob(f"*-{member.stage[:10]}"))
    if not found:
        raise ArtefactError(
            str(run), f"expected the run {member.stage[:10]} that it averages, found none", "run it first"
        )
    return checkpoint_path(found[0], member.step)


@torch.no_grad()
def load_average(stage: Stage, run: Path, model: Transformer, tokenizer: str) -> None:
    """Fills a model with the weighted mean of the stage's members, summed in fp64.

    Raises:
        ArtefactError: a member is missing, damaged, of another shape or of another tokenizer.
    """
    # Parameters, and what routers have learnt of their experts' load.
    whole = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in whole.items()}
    for member in stage.average:
        path = member_checkpoint(run, member)
        check_parent(stage, path, tokenizer)
        restore(path, model, None)
        for name, value in whole.items():
            sums[name] += member.weight * value.double()
    for name, value in whole.items():
        value.copy_(sums[name])
