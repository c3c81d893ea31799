"""How a trained model's positions reach further when it is used: dynamic NTK, as in the released 128K model. Needs no torch.

For sequences of n tokens, more than n₀, the base is multiplied by (factor·n/n₀ − (factor − 1))^(d/(d−2)); shorter ones are as
they were (``model/rope.py``; arXiv 2404.06395's MiniCPM-2B-128k has factor 4 and n₀ = 65,536). No weight changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from windtunnel.base.errors import UserError
from windtunnel.model.shape import Shape

_WISH = "expected FACTOR or FACTOR@TOKENS, such as 4 or 4@65536"


@dataclass(frozen=True)
class DynamicNtk:
    """A factor, and the tokens n₀ from which on it counts; None means the model's positions."""

    factor: float
    tokens: int | None = None

    @classmethod
    def parse(cls, value: object, where: str = "--dynamic-ntk") -> DynamicNtk:
        """From ``4`` or ``4@65536``.

        Raises:
            UserError: it is neither.
        """
        factor, at, tokens = str(value).strip().partition("@")
        try:
            found = cls(float(factor), int(tokens) if at else None)
        except ValueError:
            raise UserError(where, f"{_WISH}, got {value!r}") from None
        if not 1 <= found.factor < math.inf or (found.tokens is not None and found.tokens < 1):
            raise UserError(where, f"{_WISH}, got {value!r}", "a factor is 1 or more")
        return found

    def __str__(self) -> str:
        return f"{self.factor:g}" + (f"@{self.tokens}" if self.tokens else "")

    def of(self, shape: Shape, where: str = "--dynamic-ntk") -> Shape:
        """The shape as it is served, with positions for factor × n₀ tokens.

        Where n₀ lies within the positions that static NTK was trained on, this takes its place; from their end on it goes
        on from the base that static NTK has made.

        Raises:
            UserError: positions are stretched in another way already, to which the weights are used.
        """
        if shape.rope_scaling not in ("none", "ntk"):
            problem = f"expected positions as they are or with static NTK, got {shape.rope_scaling!r}"
            raise UserError(where, problem, "leave it out: the model is used to its own way")
        tokens, theta, d = self.tokens or shape.max_positions, shape.rope_theta, shape.head_dim
        if shape.rope_scaling == "ntk" and tokens >= shape.max_positions:
            theta *= shape.rope_factor ** (d / (d - 2))
        positions = max(shape.max_positions, round(self.factor * tokens))
        return replace(
            shape, rope_theta=theta, rope_scaling="dynamic", rope_factor=self.factor, rope_original=tokens,
            max_positions=positions,
        )  # fmt: skip
