"""What all stages of one program share. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from windtunnel.model.parametrization import Parametrization
from windtunnel.train.stage import AdamW

Mixture = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Setting:
    """Data, hyper-parameters and batch of a program: the same for its trials, proxies and target.

    ``corpora`` pairs names with content hashes, ``batch`` counts sequences of ``row`` tokens, ``warmup`` counts steps, and
    ``score`` names the held-out parts on which finished stages are scored.
    """

    corpora: tuple[tuple[str, str], ...]
    mixture: Mixture
    row: int
    batch: int
    warmup: int
    seed: int
    parametrization: Parametrization
    optimizer: AdamW
    score: tuple[str, ...]
    score_tokens: int | None = None
    masking: str = "document"

    @property
    def step_tokens(self) -> int:
        return self.row * self.batch

    def steps(self, tokens: int) -> int:
        """Steps that come nearest to a number of tokens, at least one."""
        return max(1, round(tokens / self.step_tokens))

    def only(self, names: set[str]) -> tuple[tuple[str, str], ...]:
        """The corpora with these names, sorted: what a stage that reads only them depends on."""
        return tuple(sorted(pair for pair in self.corpora if pair[0] in names))

    def with_seed(self, seed: int) -> Setting:
        """The same with another seed for weights and data order."""
        return replace(self, seed=seed)
