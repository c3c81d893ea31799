"""Low-rank adapters as values of a stage. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from windtunnel.model.shape import Shape


@dataclass(frozen=True)
class Lora:
    """W + (alpha/rank)·B·A beside every hidden matrix, of which only A [rank, in] and B [out, rank] train (arXiv 2106.09685).

    B begins at zero, so that training starts from the parent's function.
    """

    rank: int = 8
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameters(self, shape: Shape) -> int:
        """Parameters that train."""
        query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sides = 2 * (shape.width + query) + 2 * (shape.width + keys) + 3 * (shape.width + shape.ff)
        return shape.layers * self.rank * sides

    def flops_per_token(self, shape: Shape, row: int) -> float:
        """Exact training FLOPs of a token: four for each frozen weight (no gradient of its own), six for each of an adapter."""
        whole = shape.flops_per_token(row)
        return 4 / 6 * (whole.body + whole.head) + whole.attention + 6 * self.parameters(shape)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
