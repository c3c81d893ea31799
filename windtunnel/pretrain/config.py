"""The tables ``[trunk]`` and ``[branch.NAME]`` of a recipe. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from windtunnel.base.config import Config, Count, LengthValue, Positive, Tuple, Weights, refuse
from windtunnel.base.errors import UserError
from windtunnel.base.units import Length
from windtunnel.model.serving import DynamicNtk
from windtunnel.train.schedule import Form


def _dynamic_ntk(value: object) -> object:
    try:
        return str(DynamicNtk.parse(value))
    except UserError as error:
        raise refuse(error.problem, error.fix) from None


class BatchChange(Config):
    """One change of the batch of the trunk, or of a branch."""

    after: LengthValue = Field(
        description="tokens of the trunk or branch, or steps, after which the batch changes; no share, so that the trunk can be "
        "extended",
        examples=["1B"],
    )
    batch: Count = Field(description="tokens in a step from there on, a multiple of model.row", examples=["4M"])


class TrunkConfig(Config):
    """The one run at a stable learning rate from which every branch grows."""

    start: str | None = Field(
        default=None,
        min_length=1,
        description="a finished model of this home, PROGRAM/RUN, whose weights it starts from; tokenizer and shape have to be "
        "its own; without it, from fresh weights",
        examples=["evening/same"],
    )
    tokens: LengthValue | None = Field(
        default=None,
        description="D, the length of a finished model's training, its decay included: the trunk itself ends where the decay "
        "begins; without it, from the budget or 20N",
        examples=["6.4M"],
    )
    batch: Count | None = Field(
        default=None,
        description="tokens in a step, a multiple of model.row; without it, what tunnel batch answered here before the first "
        "run, else 0.58·D^0.571 (arXiv 2503.04715)",
        examples=["4096"],
    )
    batch_schedule: Tuple[BatchChange] = Field(
        default=(),
        description="where the batch grows, at the same learning rate: the paper's 1.2B went from 2M to 4M tokens; branches keep "
        "the batch of where they begin, and the tunnel's models the first one",
        examples=[[{"after": "100B", "batch": "4M"}]],
    )
    warmup: LengthValue = Field(
        default=Length(0.01, "fraction"),
        description="linear rise of the learning rate; a share is of trunk.tokens",
        examples=["1%"],
    )
    mixture: Weights | None = Field(
        default=None,
        description="corpus = weight; token shares follow the weights; needed when there are several corpora",
        examples=[{"wiki": 2, "books": 1}],
    )
    masking: Literal["document", "causal"] = Field(
        default="document",
        description="whether a token attends only to its own document, or to all earlier tokens of its row",
        examples=["document"],
    )
    checkpoint_every: LengthValue = Field(
        default=Length(0.05, "fraction"),
        description="distance of checkpoints; a share is of trunk.tokens",
        examples=["5%"],
    )
    keep: int = Field(
        default=3, ge=1, le=10_000, description="newest checkpoints that stay; branch points always stay", examples=[3]
    )
    dynamics: LengthValue | None = Field(
        default=None,
        description="every so many steps, look at two consecutive updates of trunk and branches: gradients, slope and "
        "curvature of the path, for windtunnel law dynamics --live; changes no number",
        examples=["50 steps"],
    )


class ExpertsConfig(Config):
    """A mixture of experts in the place of every MLP, each grown from a copy of it."""

    count: int = Field(default=8, ge=2, le=1024, description="experts in a layer", examples=[8])
    top_k: int = Field(default=2, ge=1, le=1024, description="experts that a token passes through", examples=[2])
    drop: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of each expert's inner columns drawn anew (drop-upcycling); 0 copies the MLP whole",
        examples=[0.5],
    )
    router: Positive = Field(
        default=1.0, description="factor on the deviation of the fresh router's weights", examples=[0.1]
    )
    balance: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="weight of the Switch balancing loss", examples=[0.01]
    )
    z: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of the router's z-loss", examples=[0.001]
    )
    bias: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="how far a step moves the bias by which experts are chosen, towards an even load; 0 has none",
        examples=[0.001],
    )


class ContextConfig(Config):
    """A longer context: longer rows, and positions that reach them."""

    row: int = Field(ge=8, le=1 << 24, description="tokens in a row of this branch", examples=[2048])
    theta: Positive | None = Field(
        default=None, description="new base frequency (ABF); without it, the parent's", examples=[1000000]
    )
    scaling: Literal["none", "linear", "ntk", "dynamic", "yarn"] | None = Field(
        default=None,
        description="how positions are stretched besides: none, linear, ntk, dynamic or yarn; without it, as the parent's",
        examples=["ntk"],
    )
    factor: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="by how much; without it, the ratio of the rows",
        examples=[4],
    )
    dynamic_ntk: Annotated[str, BeforeValidator(_dynamic_ntk)] | None = Field(
        default=None,
        description="FACTOR@TOKENS: export and chat stretch positions beyond so many tokens by dynamic NTK, in the place of "
        "static NTK within the trained row; without @TOKENS, beyond the trained row. No number of the training depends on it",
        examples=["4@65536"],
    )
    untie: bool = Field(
        default=True, description="a head of its own, which begins as a copy of the embedding", examples=[True]
    )
    long_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the tokens that come from long documents, all packed whole into rows (the paper: 0.44); without "
        "it, rows are slices of the corpora as they come",
        examples=[0.44],
    )
    long_from: int | None = Field(
        default=None,
        ge=2,
        le=1 << 24,
        description="tokens from which a document counts as long; without it, as many as its parent's row",
        examples=[1024],
    )
    items: int = Field(
        default=10,
        ge=0,
        le=1000,
        description="hidden keys asked for at each length and depth once it is trained; 0 asks for none",
        examples=[10],
    )


class BranchConfig(Config):
    """A finished model: the trunk's checkpoint at one point, decayed on a mixture of data."""

    kind: Literal["decay", "moe", "long"] = Field(
        default="decay",
        description="what grows here: a decay of the trunk, a mixture of experts (moe), or a longer context (long)",
        examples=["decay"],
    )
    parent: str = Field(default="trunk", description="what it grows from", examples=["trunk"])
    at: LengthValue | None = Field(
        default=None,
        description="tokens of the trunk at which it begins; without it, trunk.tokens less its own tokens. Of a branch "
        "that grows from another: a step of that one, counted from its beginning; without it, its last",
        examples=["5.4M"],
    )
    tokens: LengthValue | None = Field(
        default=None,
        description="its length, of moe and long that of its decay; a share is of trunk.tokens; without it, a decay takes 10%, "
        "and a long branch with a stable part does not decay",
        examples=["10%"],
    )
    form: Form = Field(default="exponential", description="how the learning rate falls", examples=["exponential"])
    floor: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the learning rate at which it ends; without it, 0.1, or wherever the half-life leads",
        examples=[0.1],
    )
    half_life: LengthValue | None = Field(
        default=None,
        description="exponential only: halve the rate every so often, as the paper does, instead of aiming at a floor",
        examples=["5000 steps"],
    )
    mixture: Weights | None = Field(
        default=None,
        description="corpus = weight; without it, the trunk's: a branch that a forecast is about",
        examples=[{"wiki": 1, "chats": 1}],
    )
    batch: Count | None = Field(
        default=None, description="tokens in a step; without it, the trunk's", examples=["4096"]
    )
    batch_schedule: Tuple[BatchChange] | None = Field(
        default=None,
        min_length=1,
        description="moe, long: where its batch changes, counted from its beginning; without it, nowhere",
        examples=[[{"after": "2B", "batch": "2M"}]],
    )
    stable: LengthValue | None = Field(
        default=None,
        description="moe, long: tokens at the stable rate before its decay; a share is of trunk.tokens; without it, moe takes "
        "as many as the decay's, long none",
        examples=["10%"],
    )
    experts: ExpertsConfig | None = Field(
        default=None, description="moe only: its experts", examples=[{"count": 8, "top_k": 2}]
    )

    context: ContextConfig | None = Field(
        default=None, description="long only: its rows and positions", examples=[{"row": 2048, "theta": 1000000}]
    )

    @property
    def decays(self) -> bool:
        """Whether its learning rate falls in the end: a long branch may leave that to one that grows from it."""
        return self.kind != "long" or self.tokens is not None or self.stable is None

    @property
    def length(self) -> Length:
        """Its tokens, stated or not; of a branch with a stable part, those of its decay."""
        return self.tokens or Length(0.1, "fraction")
