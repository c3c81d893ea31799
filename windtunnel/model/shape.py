"""The shape of a decoder and what follows from it by arithmetic: parameters and FLOPs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from windtunnel.base.errors import RecipeError
from windtunnel.base.identity import as_identity, later

ROPE_SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn")


@dataclass(frozen=True)
class Flops:
    """Training FLOPs (forward and backward) for one token, by where they are spent."""

    body: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.body + self.head + self.attention


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder as in MiniCPM (arXiv 2404.06395, table 2).

    ``vocab`` is the tokenizer's size; the matrices have ``padded_vocab`` rows, whose surplus is never predicted and never
    counted. ``base_width`` is the width at which the parametrization is neutral (256 for the released models). ``qk_norm``
    normalises every head's query and key before they are rotated (arXiv 2302.05442), with one gain for all query heads of a
    layer and one for all its key heads; the paper tried it and did not keep it. With more than one expert, each layer has that
    many MLPs of inner width ``ff`` and a router that sends every token through ``top_k``.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    base_width: int
    tied: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 4096
    qk_norm: bool = later(False)
    experts: int = later(1)
    top_k: int = later(1)
    rope_scaling: str = later("none")
    rope_factor: float = later(1.0)
    rope_original: int = later(0)
    """How rotary positions are stretched over a longer context (``model/rope.py``), by how much, and from how many positions;
    0 means ``max_positions``."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "head_dim", "ff", "vocab", "base_width", "max_positions"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}", f"expected a positive whole number, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise RecipeError(
                "model.kv_heads",
                f"expected a divisor of the {self.heads} query heads, got {self.kv_heads}",
                "choose a divisor, or as many as there are query heads",
            )
        if self.rope_scaling not in ROPE_SCALINGS:
            raise RecipeError("rope.scaling", f"expected {', '.join(ROPE_SCALINGS)}, got {self.rope_scaling!r}")
        if not 1 <= self.rope_factor < float("inf"):
            raise RecipeError(
                "rope.factor", f"expected a number from 1 on, got {self.rope_factor}", "4 stretches fourfold"
            )
        if not 1 <= self.top_k <= self.experts:
            problem = f"expected from 1 to the number of experts, {self.experts}, got {self.top_k}"
            raise RecipeError("model.top_k", problem, "choose fewer experts for a token, or more experts")
        if self.head_dim % 2:
            raise RecipeError("model.head_dim", f"expected an even number (rotary pairs), got {self.head_dim}")

    @property
    def body(self) -> int:
        """Non-embedding parameters N = L(2·d·(n_q+n_kv)·d_h + 3·d·d_ff + 2·d) + d, with QK-norm 2·d_h more a layer; with experts
        E·3·d·d_ff + E·d for the MLP."""
        return self.matrices + self.routers + self.gains

    @property
    def active(self) -> int:
        """The part of N that one token passes through: k of the E experts; all of it without experts."""
        return self.active_matrices + self.routers + self.gains

    @property
    def matrices(self) -> int:
        """Parameters of the hidden matrices: those of all experts."""
        return self._matrices(self.experts)

    @property
    def active_matrices(self) -> int:
        """Those of them that one token passes through."""
        return self._matrices(self.top_k)

    def _matrices(self, experts: int) -> int:
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + experts * 3 * self.width * self.ff)

    @property
    def routers(self) -> int:
        """Parameters of the routers; none without experts."""
        return self.layers * self.experts * self.width if self.experts > 1 else 0

    @property
    def gains(self) -> int:
        """Parameters of the norms."""
        return self.layers * (2 * self.width + (2 * self.head_dim if self.qk_norm else 0)) + self.width

    @property
    def embedding(self) -> int:
        """Parameters of the embedding and, if untied, of the head, without padding rows."""
        return self.vocab * self.width * (1 if self.tied else 2)

    @property
    def total(self) -> int:
        return self.body + self.embedding

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding matrix: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab // 64) * 64

    def flops_per_token(self, row: int) -> Flops:
        """Exact training FLOPs for one token in rows of ``row`` tokens.

        Six for each weight of a matrix product (two forward, four backward), the head included, and causal attention, in
        which a token sees row/2 others on average: 3 · 2 · 2 · (row/2) · heads · head_dim in each layer. Of the experts,
        those that a token passes through.
        """
        attention = 6 * row * self.heads * self.head_dim * self.layers
        return Flops(6 * (self.active_matrices + self.routers), 6 * self.vocab * self.width, attention)

    def to_dict(self) -> dict[str, Any]:
        return as_identity(self)

    @property
    def rope(self) -> tuple[float, str, float, int]:
        """All that decides what a position does, but for lengths beyond ``max_positions``."""
        original = self.rope_original or self.max_positions
        return self.rope_theta, self.rope_scaling, self.rope_factor, 0 if self.rope_scaling == "none" else original

    def untied(self) -> Shape:
        return replace(self, tied=False)
