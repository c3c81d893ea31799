"""Bits per byte: the one loss for people, the same for any batch size, row packing or number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from windtunnel.corpus.evaluation_rows import scored, scoring_rows
from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.corpus.store import HeldOut
from windtunnel.train.parallel import sum_over_ranks
from windtunnel.train.step import Trainer, to_device


@dataclass(frozen=True)
class HeldOutScore:
    """Summed loss of a held-out part: nats over ``tokens`` predicted tokens that spell ``bytes`` UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes


def score_heldout(trainer: Trainer, heldout: HeldOut, row: int, limit_tokens: int | None = None) -> HeldOutScore:
    """Scores whole held-out documents, end of text included, in non-overlapping windows of ``row`` tokens.

    Each token is predicted once. Micro-batch sums are added in float64, so the result does not depend on the batch size
    beyond 1e-6. Documents are kept apart here even where training lets them see each other. Ranks take batches in turn;
    a rank without one scores an empty batch, since sharded weights need all ranks.
    """
    trainer = replace(trainer, masked=True)
    runtime, total, tokens = trainer.runtime, 0.0, 0
    scale = torch.ones(len(trainer.objective.names), device=runtime.torch_device)
    trainer.model.eval()
    batches = scoring_rows(heldout, row, limit_tokens, batch=trainer.micro)
    while group := list(islice(batches, runtime.world)):
        nothing = Rows(group[0].inputs, np.full_like(group[0].targets, IGNORED), group[0].documents)
        mine = group[runtime.rank] if runtime.rank < len(group) else nothing
        tokens += int((mine.targets != IGNORED).sum())
        # The training graph is reused, gradients and all: compiling a second one costs more than it would save.
        _, sums = trainer.compute(trainer.model, *to_device(mine, 0, trainer), scale)
        total += float(sums[0])
    trainer.model.train()
    summed = sum_over_ranks(np.array([total, float(tokens)]), runtime)
    return HeldOutScore(float(summed[0]), int(summed[1]), scored(heldout, limit_tokens).bytes)
