"""Rotary positions, and the ways to stretch them over a longer context. All tables are fp32, as in the runtimes that exported
models meet.

Shapes: K frequencies (half the head dimension d), T positions. With θ the base and i = 0, 2, …, d − 2 a frequency is θ^(−i/d).

- ``none``: as it is. A larger ``rope_theta`` alone is ABF, adjusted base frequency (arXiv 2309.16039).
- ``linear``: all frequencies divided by the factor (arXiv 2306.15595).
- ``ntk``: the base times factor^(d/(d−2)): the slowest frequency is divided by the factor, the fastest stays.
- ``dynamic``: the same with factor·n/n₀ − (factor − 1) in the place of the factor for sequences of n > n₀ tokens; shorter ones
  are as they were. For inference with a model that was trained on n₀ positions.
- ``yarn``: frequencies that turn often within n₀ positions stay, those that turn less than once are divided by the factor,
  with a ramp between, and cos and sin grow by 0.1·ln(factor) + 1 (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from windtunnel.model.shape import Shape

_FAST_TURNS, _SLOW_TURNS = 32.0, 1.0
"""YaRN's β and α: turns within n₀ positions from which a frequency stays, and below which it is divided by the whole factor."""


def position_tables(
    shape: Shape, positions: int, *, length: int | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, K] for a sequence of ``length`` tokens, which counts for ``dynamic`` alone."""
    frequency_K = frequencies(shape, positions if length is None else length)
    if device is not None:
        frequency_K = frequency_K.to(device)
    angle_TK = torch.arange(positions, dtype=torch.float32, device=frequency_K.device)[:, None] * frequency_K
    grown = 0.1 * math.log(shape.rope_factor) + 1 if shape.rope_scaling == "yarn" else 1.0
    return angle_TK.cos() * grown, angle_TK.sin() * grown


def frequencies(shape: Shape, length: int = 0) -> Tensor:
    """Radians a position, fp32 [K]."""
    d, factor, scaling = shape.head_dim, shape.rope_factor, shape.rope_scaling
    theta, original = shape.rope_theta, shape.rope_original or shape.max_positions
    if scaling == "ntk":
        theta *= factor ** (d / (d - 2))
    if scaling == "dynamic" and length > original:
        theta *= (factor * length / original - (factor - 1)) ** (d / (d - 2))
    frequency_K = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if scaling == "linear":
        return frequency_K / factor
    return _blended(frequency_K, shape, original) if scaling == "yarn" else frequency_K


def _blended(frequency_K: Tensor, shape: Shape, original: int) -> Tensor:
    d = shape.head_dim

    def place(turns: float) -> float:
        """The (fractional) index of the frequency that turns so often within the original positions."""
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    low, high = max(math.floor(place(_FAST_TURNS)), 0), min(math.ceil(place(_SLOW_TURNS)), d - 1)
    ramp_K = ((torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency_K / shape.rope_factor * ramp_K + frequency_K * (1 - ramp_K)
