"""The table ``[tunnel]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from windtunnel.base.config import Config, Count, LengthValue, Tuple
from windtunnel.tunnel.study_config import TransferConfig

LawForm = Literal["additive", "coupled", "skaling"]


class TunnelConfig(Config):
    """The studies on tiny models: a search for hyper-parameters, and trunks with decay branches from which the law is fitted."""

    proxies: Tuple[str] = Field(
        min_length=3,
        max_length=20,
        description="sizes whose trunks give the law, three or more",
        examples=[["0.02M", "0.05M", "0.1M"]],
    )
    tokens: Tuple[LengthValue] = Field(
        min_length=3,
        max_length=20,
        description="lengths of each proxy's finished runs, decay included, three or more; in tokens, or as 20N",
        examples=[["0.8M", "1.6M", "3.2M"]],
    )
    seeds: int = Field(
        default=1,
        ge=1,
        le=20,
        description="seeds of each proxy's trunk; two or more measure the seed noise",
        examples=[2],
    )
    trials: int = Field(
        default=16,
        ge=0,
        le=10_000,
        description="trials of the search over learning rate, init_std, scale_emb and scale_depth; 0 skips it",
        examples=[16],
    )
    trial_tokens: Count | None = Field(
        default=None,
        description="tokens of a trial; without it, ten for each parameter as in the paper",
        examples=["250k"],
    )
    search_size: str | None = Field(
        default=None, description="size that is searched on; without it, the smallest proxy", examples=["0.02M"]
    )
    check_size: str | None = Field(
        default=None,
        description="a wider size on which the found learning rate is checked; without it, the largest proxy",
        examples=["0.1M"],
    )
    forms: Tuple[LawForm] = Field(
        default=("additive", "coupled", "skaling"),
        min_length=1,
        description="forms of the law that compete; weighed by how well they predict held-out proxies",
        examples=[["additive", "coupled"]],
    )
    transfer: TransferConfig | None = Field(default=None, description="the transfer study, run on its own")
