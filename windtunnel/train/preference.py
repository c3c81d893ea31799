"""What a stage that learns from pairs of answers minimises, as values. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from windtunnel.base.identity import as_identity, later

PreferenceLoss = Literal["dpo", "dpo-normalised", "simpo"]
Reference = Literal["precomputed", "live"]


@dataclass(frozen=True)
class Preference:
    """−(1 − smoothing)·log σ(h) − smoothing·log σ(−h), with h the difference of the two answers' rewards, less ``margin``.

    Rewards, with y the answer and x the question: ``dpo``: beta·log(p(y|x)/p_ref(y|x)) (arXiv 2305.18290, equation 7);
    ``dpo-normalised``: the same divided by the tokens of y (arXiv 2411.15124, section 5); ``simpo``: beta·log p(y|x) divided by
    the tokens of y, without a reference, and a margin (arXiv 2405.14734, equation 6). ``smoothing`` is the assumed share of
    pairs that are labelled the wrong way round. ``reference`` says whether p_ref is computed once for all pairs and kept, or in
    every step by a frozen model beside the one that trains.
    """

    loss: PreferenceLoss = "dpo"
    beta: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.0
    reference: Reference = later("precomputed")

    @property
    def has_reference(self) -> bool:
        return self.loss != "simpo"

    @property
    def is_beside(self) -> bool:
        """Whether the reference is asked in every step."""
        return self.has_reference and self.reference == "live"

    @property
    def normalised(self) -> bool:
        return self.loss != "dpo"

    def to_dict(self) -> dict[str, Any]:
        return as_identity(self)
