"""The table ``[model]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from windtunnel.base.config import Config, Positive
from windtunnel.model.parametrization import Name, Regime

Dimension = Annotated[int, Field(ge=1, le=1 << 20)]


class ShapeConfig(Config):
    """An explicit shape instead of a size by name; head dimension and base width stay the family's."""

    width: Dimension = Field(
        description="d, the width of the residual stream; a multiple of the head dimension", examples=[96]
    )
    layers: Dimension = Field(description="number of blocks", examples=[3])
    heads: Dimension | None = Field(
        default=None, description="query heads; without it, width / head dimension", examples=[6]
    )
    kv_heads: Dimension | None = Field(
        default=None, description="key and value heads; without it, as many as query heads", examples=[2]
    )
    ff: Dimension | None = Field(
        default=None, description="inner width of the MLP; without it, 2.5 × width", examples=[240]
    )


class ModelConfig(Config):
    """Family, size and parametrization of the target; everything else of its shape follows."""

    family: Literal["tiny", "tiny-wide", "minicpm"] = Field(
        default="minicpm",
        description="the rule from size to shape; all sizes share head dimension, base width and depth/width rule",
        examples=["tiny"],
    )
    size: str | None = Field(
        default=None,
        min_length=1,
        description="the dial: a size of the family by name or parameter count; or use [budget]",
        examples=["0.3M"],
    )
    shape: ShapeConfig | None = Field(default=None, description="an explicit shape instead of a size")
    tied: bool = Field(default=True, description="one matrix for embedding and head", examples=[True])
    qk_norm: bool = Field(
        default=False,
        description="normalise queries and keys: less sensitive to the learning rate; exported as Qwen3 instead of Llama",
        examples=[True],
    )
    row: int = Field(
        default=256,
        ge=8,
        le=1 << 20,
        description="tokens in a row: the context that the model is trained on",
        examples=[256],
    )
    recompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="compute layers again in the backward pass instead of keeping what it needs: a third more FLOPs, memory for "
        "one layer; auto does so for rows whose layers would keep more than 1 GiB on a CPU, 16 GiB on a GPU",
        examples=["always"],
    )
    parametrization: Name = Field(
        default="mup",
        description="how init, learning rate and residual branches scale: the paper's µP, none, or µP with branches that fall as "
        "1/layers (CompleteP)",
        examples=["mup"],
    )
    vocabulary_regime: Regime = Field(
        default="fixed",
        description="large, where the vocabulary is many times the width: the embedding's rate falls as 1/√width "
        "(arXiv 2506.15025); for mup and completep",
        examples=["large"],
    )
    base_width: Dimension | None = Field(
        default=None, description="the width at which µP is neutral; without it, the family's", examples=[32]
    )
    base_layers: Dimension | None = Field(
        default=None,
        description="the depth at which completep is mup; without it, the family's",
        examples=[2],
    )
    init_std: Positive | None = Field(
        default=None, description="base init deviation; without it, from the tunnel or the paper (0.1)", examples=[0.1]
    )
    scale_emb: Positive | None = Field(
        default=None,
        description="factor on the embedding's output; without it, from the tunnel or the paper (12)",
        examples=[12.0],
    )
    scale_depth: Positive | None = Field(
        default=None,
        description="factor on each block's output, over √layers (under completep: at the base depth); without it, from the "
        "tunnel or the paper (1.4)",
        examples=[1.4],
    )
