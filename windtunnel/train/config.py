"""The table ``[optimizer]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from windtunnel.base.config import Config
from windtunnel.train.stage import Decay

Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class OptimizerConfig(Config):
    """AdamW. The defaults are those of the code that the paper's authors released later (arXiv 2404.06395)."""

    lr: float | None = Field(
        default=None,
        gt=0,
        lt=10,
        allow_inf_nan=False,
        description="base learning rate; without it, from the tunnel or the paper (0.01)",
        examples=[0.01],
    )
    beta1: Beta = Field(default=0.9, description="decay of the first moment", examples=[0.9])
    beta2: Beta = Field(default=0.95, description="decay of the second moment", examples=[0.95])
    eps: float = Field(default=1e-8, gt=0, lt=1, allow_inf_nan=False, description="AdamW's epsilon", examples=[1e-8])
    weight_decay: float = Field(
        default=0.1, ge=0, lt=10, allow_inf_nan=False, description="decoupled, times the learning rate", examples=[0.1]
    )
    decay: Decay = Field(
        default="plain",
        description="plain: weight_decay is multiplied by the learning rate; independent: it is the share that a step at full "
        "rate takes off every tensor, and has to be stated",
        examples=["plain"],
    )
    clip: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="limit of the gradient's global norm", examples=[1.0]
    )
