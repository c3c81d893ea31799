"""Preference learning: a branch that goes on from a chat model's weights, on pairs of answers. Needs no torch.

One epoch with a cosine to a tenth (arXiv 2404.06395, section 7.1: cosine from 1e-5). Two presets of the rate: the paper's, 1e-5
for every tensor, without the roles' multipliers (OpenBMB/MiniCPM issue 40); and the default, the base rate where the parent
ended, with them, which carries over between widths as in every other stage.
"""

from __future__ import annotations

from dataclasses import replace

from windtunnel.train.preference import Preference
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Stage

PAPER_RATE = 1e-5


def cosine(steps: int, warmup: int, floor: float = 0.1) -> Schedule:
    """Warmup, then a cosine over the whole stage."""
    return Schedule(warmup=warmup, stable_end=0, decay_steps=steps, form="cosine", floor=floor, kind="cosine")


def on_pairs(stage: Stage, preference: Preference) -> Stage:
    """A stage from ``fresh_stage`` with the objective of pairs; experts are not balanced any more."""
    return replace(stage, objective="dpo", preference=preference, balance=None)
