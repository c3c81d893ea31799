"""The table ``[tunnel]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from windtunnel.base.config import Config, Count, LengthValue, Positive, Tuple
from windtunnel.train.stage import Decay, Kind
from windtunnel.tunnel.study_config import BatchConfig, TransferConfig

LawForm = Literal["additive", "coupled", "skaling"]
Range = Annotated[Tuple[Positive] | None, Field(min_length=2, max_length=2)]


class SpaceConfig(Config):
    """What the search varies instead of the paper's four axes: [low, high] on a log axis each, or a list of words."""

    learning_rate: Range = Field(default=None, description="base learning rate", examples=[[0.002, 0.08]])
    init_std: Range = Field(default=None, description="base init deviation", examples=[[0.03, 0.3]])
    scale_emb: Range = Field(default=None, description="factor on the embedding's output", examples=[[2, 40]])
    scale_depth: Range = Field(
        default=None, description="factor on each block's output, over √layers", examples=[[0.4, 4]]
    )
    weight_decay: Range = Field(default=None, description="AdamW's weight decay", examples=[[0.01, 1]])
    beta2: Range = Field(
        default=None,
        description="decay of the second moment, searched on the logarithm of 1 − β₂",
        examples=[[0.9, 0.999]],
    )
    warmup: Range = Field(default=None, description="warmup as a share of a run's steps", examples=[[0.005, 0.1]])
    qk_norm: Tuple[bool] | None = Field(
        default=None, description="queries and keys normalised or not", examples=[[False, True]]
    )
    optimizer: Tuple[Kind] | None = Field(
        default=None, description="the kinds of optimizer that compete", examples=[["adamw", "muon"]]
    )
    decay: Tuple[Decay] | None = Field(
        default=None,
        description="the forms of weight decay that compete, equally strong at a learning rate of 0.01",
        examples=[["plain", "independent"]],
    )


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "proxies": ["9M", "30M", "70M"], "tokens": ["10N", "20N", "40N"], "search_size": "9M", "check_size": "30M",
        "sampler": "gp", "trials": 64, "per_round": 8, "on_edge": "widen", "stop": "enough",
    },
    "paper-tiny": {
        "proxies": ["0.02M", "0.05M", "0.1M"], "tokens": ["10N", "20N", "40N"], "search_size": "0.05M", "check_size": "0.1M",
        "sampler": "gp", "trials": 32, "on_edge": "widen", "stop": "enough",
    },
}  # fmt: skip
"""Values of [tunnel] that a preset gives where the recipe gives none. Both leave ``trial_tokens`` at ten for each parameter and
the space at the paper's four axes (arXiv 2404.06395, appendix A.1: N = 0.009B, D = 10N, Bayesian search). The paper prints
neither the number of trials nor the ranges: those, the stopping rule, the check and the scaling study's lengths are ours."""


class TunnelConfig(Config):
    """The studies on tiny models: a search for hyper-parameters, and trunks with decay branches from which the law is fitted."""

    preset: Literal["paper", "paper-tiny"] | None = Field(
        default=None,
        description="values for the keys of this table that are left out: the paper's protocol (Bayesian search on 9M with ten "
        "tokens for each parameter, family minicpm), or its twin for a CPU (0.05M, family tiny)",
        examples=["paper-tiny"],
    )
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
    space: SpaceConfig | None = Field(default=None, description="what the search varies, and between which ends")
    sampler: Literal["tpe", "gp", "sobol", "random", "grid"] = Field(
        default="tpe",
        description="who proposes trials: a tree of Parzen estimators or a Gaussian process (Bayesian), a Sobol or random "
        "sequence that does not look at results, or a whole grid (625 trials are five places on each of four axes)",
        examples=["gp"],
    )
    prune: Literal["none", "halving", "forecast"] = Field(
        default="none",
        description="judge trials after short decay branches of their trunks; halving lets the better quarter go on, forecast "
        "those whose end it forecasts lowest, with 30 % of the tokens in all",
        examples=["forecast"],
    )
    per_round: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="trials that are proposed together; the search does not depend on the number of workers",
        examples=[4],
    )
    on_edge: Literal["say", "widen", "refuse"] = Field(
        default="say",
        description="what a best value on the edge of the space means: a notice, a wider space with a quarter more trials, or "
        "an error",
        examples=["widen"],
    )
    stop: Literal["trials", "enough"] = Field(
        default="trials",
        description="enough: end the search before its last trial once the gap to the tuned optimum is under the seed noise",
        examples=["enough"],
    )
    noise: Positive | None = Field(
        default=None,
        lt=1,
        description="seed noise as a share of the loss; without it, stop = enough trains the best trial on other seeds",
        examples=[0.002],
    )
    repeats: int = Field(
        default=3, ge=2, le=100, description="other seeds on which the best trial measures the seed noise", examples=[3]
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
    batch: BatchConfig | None = Field(default=None, description="the batch study, run on its own")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS.get(str(preset), {}), **given} if preset else given  # pyright: ignore[reportUnknownVariableType]
