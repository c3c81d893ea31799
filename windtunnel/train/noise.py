"""The gradient noise scale from the micro-batches of a step (arXiv 1812.06162, appendix A.1).

A gradient of m tokens is the true one plus noise: E‖g‖² = ‖G‖² + S/m, with S the trace of the noise of one token. The step
has the gradients of its micro-batches and their sum, so both numbers follow from their norms. Their ratio S/‖G‖² is the noise
scale in tokens; a single step's is worth little, so both are recorded and averages divided (``noise_scale``).

No extra pass is needed. Only a trunk whose whole step is one micro-batch takes one, over half of its rows, now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EVERY = 16
"""Steps from one measurement to the next: the norms cost 1 to 3 % of a tiny model's step, and a copy of gradients."""
EVERY_HALVED = 128
"""The same where a step is one micro-batch and half of its rows pass once more, in trunks alone: .8 % of their time (lab log)."""
TRACE, SQUARE = "noise_trace", "gradient_square"
"""Names of the two metrics."""


@dataclass(frozen=True)
class Noise:
    """Unbiased estimates of S, the trace of one token's gradient covariance, and of ‖G‖², which may come out negative."""

    trace: float
    square: float

    def metrics(self) -> dict[str, float]:
        return {TRACE: self.trace, SQUARE: self.square}


def split(parts: Sequence[tuple[float, float]], whole: float) -> Noise | None:
    """Separates noise from signal.

    With m_i tokens and the mean gradient g_i in part i, M = Σm_i and g = Σ m_i g_i / M: Σ (m_i/M)‖g_i‖² has the expectation
    ‖G‖² + nS/M, and ‖g‖² has ‖G‖² + S/M, however the tokens are shared out over the n parts.

    Args:
        parts: (tokens, ‖g_i‖²) of each micro-batch.
        whole: ‖g‖².

    Returns:
        None with fewer than two parts that have tokens, or if a norm is not finite.
    """
    filled = [(tokens, square) for tokens, square in parts if tokens]
    total, count = sum(tokens for tokens, _ in filled), len(filled)
    if count < 2:
        return None
    small = sum(tokens / total * square for tokens, square in filled)
    if not (math.isfinite(small) and math.isfinite(whole)):
        return None
    trace = (small - whole) * total / (count - 1)
    return Noise(trace, whole - trace / total)


def noise_scale(traces: Iterable[float], squares: Iterable[float]) -> float | None:
    """Tokens at which noise and signal of the gradient are equally large, from many steps; None where it cannot be told."""
    pairs = [(s, g) for s, g in zip(traces, squares, strict=True) if math.isfinite(s) and math.isfinite(g)]
    trace, square = (sum(pair[i] for pair in pairs) for i in (0, 1))
    return trace / square if pairs and trace > 0 and square > 0 else None
