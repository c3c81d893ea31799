"""The best batch size as a function of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from windtunnel.base.units import si
from windtunnel.laws.fit import LawError


@dataclass(frozen=True)
class BatchLaw:
    """B = coefficient / loss^exponent: tokens in a batch, loss in nats per token."""

    name: str
    coefficient: float
    exponent: float
    losses: tuple[float, float]
    """The range of losses that it was measured over."""
    source: str
    warning: str

    def tokens(self, loss: float) -> float:
        """The batch in tokens.

        Raises:
            LawError: the loss is not a positive number.
        """
        if not (math.isfinite(loss) and loss > 0):
            raise LawError("law.loss", f"expected a positive loss in nats per token, got {loss}")
        return self.coefficient / loss**self.exponent

    def caveat(self, loss: float) -> str:
        """The warning to print beside an answer; names the range where the loss lies outside it."""
        low, high = self.losses
        if low <= loss <= high:
            return self.warning
        return f"{self.warning} A loss of {loss:.3g} lies outside {low:g} to {high:g}, where it was measured."


NAMED_BATCH: Mapping[str, BatchLaw] = MappingProxyType({
    "minicpm": BatchLaw(
        "minicpm", 1.21e9, 6.24, (2.4, 4.4),
        "arXiv 2404.06395, section 3.2 and appendix A.2 (0.009B to 0.17B, cosine, base learning rate 0.01)",
        "This law is tied to one tokenizer and corpus (nats per token on C4): with another it can miss the "
        f"best batch several times over. Below {si(9e6)} parameters take the batch from this tunnel's own fit.",
    )
})  # fmt: skip
"""Published batch laws by name."""
