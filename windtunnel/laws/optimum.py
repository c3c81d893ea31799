"""The size and length that a law recommends: for a training budget, or for training and use together, with intervals.

Two conventions enter, and both are explicit: what N counts (``body``: non-embedding parameters, as in the paper; or
``body+head``, with the output matrix) and what a token costs (``6ND``, or the exact count of a shape with attention and
head, ``Shape.flops_per_token``). A law is only asked in the convention that it was fitted in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy import optimize as _optimize  # pyright: ignore[reportMissingTypeStubs]

from windtunnel.laws.fit import LawError
from windtunnel.laws.loss import LossLaw
from windtunnel.model.shape import Shape

_minimize = cast("Callable[..., Any]", _optimize.minimize_scalar)  # pyright: ignore[reportUnknownMemberType]
COUNTS = ("body", "body+head")
FLOPS = ("6ND", "exact")


def check_counts(counts: str) -> None:
    """Raises for an unknown way to count N.

    Raises:
        LawError: it is neither body nor body+head.
    """
    if counts not in COUNTS:
        raise LawError("law.counts", f"expected one of {', '.join(COUNTS)}, got {counts!r}")


def parameters_of(shape: Shape, counts: str) -> int:
    """N of a shape in a convention.

    Raises:
        LawError: there is no such convention.
    """
    check_counts(counts)
    return shape.body + (shape.vocab * shape.width if counts == "body+head" else 0)


def training_flops(shape: Shape, tokens: float, row: int, *, counts: str = "body", flops: str = "6ND") -> float:
    """FLOPs to train a shape on some tokens, in a convention.

    Args:
        row: tokens in a sequence; only the exact count depends on it.

    Raises:
        LawError: there is no such convention.
    """
    if flops not in FLOPS:
        raise LawError("law.flops", f"expected one of {', '.join(FLOPS)}, got {flops!r}")
    if flops == "6ND":
        return 6.0 * parameters_of(shape, counts) * tokens
    return shape.flops_per_token(row).total * tokens


@dataclass(frozen=True)
class Optimum:
    """Where a budget is best spent: N, D and the loss there, with the 90 % interval of each where the law has draws."""

    parameters: float
    tokens: float
    loss: float
    training_flops: float
    inference_flops: float
    intervals: dict[str, tuple[float, float]]
    """``parameters``, ``tokens``, ``tokens_per_parameter`` and ``loss``; empty without draws."""

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


def optimum(law: LossLaw, flops: float, *, inference_tokens: float = 0.0) -> Optimum:
    """The N and D of lowest loss at a budget that pays for training (6ND) and expected use (2N for each token served).

    Without inference this is ``LossLaw.optimum``. With it, D = (C - 2 N D_inf)/(6N) on the budget, and the loss along it
    has one minimum over log N: a smaller model, trained longer.

    Args:
        flops: C, for training and inference together.
        inference_tokens: D_inf, tokens read and written over the model's life.

    Raises:
        LawError: a number is not positive, or the law does not fall with N and D.
    """
    if not (math.isfinite(inference_tokens) and inference_tokens >= 0):
        raise LawError("law.inference_tokens", f"expected a number of at least zero, got {inference_tokens}")
    n, d = best_for(law, flops, inference_tokens)
    found = [(*best_for(one, flops, inference_tokens), one) for one in law.drawn()]
    intervals: dict[str, tuple[float, float]] = {}
    if found:
        columns = {
            "parameters": [a for a, _, _ in found], "tokens": [b for _, b, _ in found],
            "tokens_per_parameter": [b / a for a, b, _ in found],
            "loss": [one.predict(a, b, force=True) for a, b, one in found],
        }  # fmt: skip
        intervals = {key: percentiles90(values) for key, values in columns.items()}
    return Optimum(n, d, law.predict(n, d, force=True), 6 * n * d, 2 * n * inference_tokens, intervals)


def percentiles90(values: Sequence[float]) -> tuple[float, float]:
    """The central 90 %."""
    return float(np.percentile(values, 5)), float(np.percentile(values, 95))


def best_for(law: LossLaw, flops: float, inference_tokens: float) -> tuple[float, float]:
    """N and D of ``optimum``, without intervals.

    Raises:
        LawError: as ``optimum``, or the use alone costs more than the FLOPs at a single parameter.
    """
    if flops <= 2 * inference_tokens:
        words = f"expected tokens in use that {flops:.3g} FLOPs can pay for, got {inference_tokens:.3g}"
        raise LawError("--inference-tokens", words, "raise the budget")
    n, d = law.optimum(flops)
    if not inference_tokens:
        return n, d
    # Both ends of the bracket: never a larger model than without inference, and never below a billionth of it.
    low, high = math.log(n) - 20.0, min(math.log(n), math.log(flops / (2 * inference_tokens)) - 1e-9)

    def tokens(x: float) -> float:
        return (flops - 2 * math.exp(x) * inference_tokens) / (6 * math.exp(x))

    def loss(x: float) -> float:
        return law.predict(math.exp(x), max(tokens(x), 1e-300), force=True)

    x = float(_minimize(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x)
    return math.exp(x), tokens(x)
