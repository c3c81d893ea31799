"""The recipe as a strict model: its own tables here, those of the rooms beside their code. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from windtunnel.base.artefact import content_hash
from windtunnel.base.config import Config, Count, Positive, Tuple, refuse
from windtunnel.base.toml import KeyPath
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.tokenizer_config import TokenizerConfig
from windtunnel.model.config import ModelConfig
from windtunnel.model.family import FAMILIES, Family
from windtunnel.model.shape import Shape
from windtunnel.posttrain.config import POSTTRAINED, GrownConfig
from windtunnel.pretrain.config import TrunkConfig
from windtunnel.train.config import OptimizerConfig
from windtunnel.tunnel.config import TunnelConfig

_RESERVED = {"con", "prn", "aux", "nul", "com1", "lpt1"}
"""Names that no folder can have on Windows."""


def _plain_name(name: str) -> str:
    good = name[:1].isalnum() and name.isascii() and all(c.isalnum() or c in "-_" for c in name) and len(name) <= 64
    if not good or name.lower() in _RESERVED:
        raise refuse(
            f"expected a name of letters, digits, - and _, got {name[:60]!r}", "it becomes the name of a folder"
        )
    return name


def _program_name(name: str) -> str:
    for part in name.split("."):
        _plain_name(part)
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
ProgramName = Annotated[str, AfterValidator(_program_name)]
"""As a name, with single dots between its parts (minicpm-1.2b); never a key, so that ``--set`` stays unambiguous."""
Sink = Literal["tensorboard", "wandb", "trackio"]
NamedLaw = Literal[
    "minicpm-average", "minicpm-code", "minicpm-english", "minicpm-chinese", "minicpm-ultratext", "minicpm-chinese-yayi"
]


class BudgetConfig(Config):
    """Instead of ``model.size``: what may be spent. Size and tokens then follow from the law."""

    hours: Positive | None = Field(default=None, description="hours on this machine", examples=[2.5])
    gpu_hours: Positive | None = Field(default=None, description="device hours on the [machine]", examples=[1000])
    flops: Count | None = Field(default=None, description="training FLOPs", examples=["1e18"])
    money: Positive | None = Field(
        default=None, description="cost in machine.currency; needs machine.price", examples=[500]
    )
    law: NamedLaw = Field(
        default="minicpm-average",
        description="the named law that chooses size and tokens before the tunnel has run",
        examples=["minicpm-english"],
    )


class EvaluateConfig(Config):
    """What finished models are scored on."""

    corpora: Tuple[str] | None = Field(
        default=None,
        min_length=1,
        description="corpora whose held-out parts are scored; without it, all",
        examples=[["wiki"]],
    )
    tokens: Count | None = Field(
        default=None, description="score at most this many held-out tokens of each corpus", examples=["200k"]
    )
    tasks: dict[Name, str] = Field(
        default_factory=dict,
        description="name = JSONL file of {query, choices, gold}: multiple choice",
        examples=[{"piqa": "piqa.jsonl"}],
    )


class ExportConfig(Config):
    """Which finished model is exported, and as what."""

    branch: str | None = Field(
        default=None, description="the branch; without it, the last one of the recipe", examples=["better"]
    )
    format: Literal["llama"] = Field(
        default="llama", description="a Hugging Face Llama folder with the multipliers folded in", examples=["llama"]
    )


class MachineConfig(Config):
    """The machine that the plan is for, when it is not this one."""

    count: int = Field(default=1, ge=1, le=1_000_000, description="devices", examples=[8])
    tflops: Positive | None = Field(
        default=None,
        description="TFLOP/s that one device reaches in training; without it, this machine is measured",
        examples=[400],
    )
    price: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="price of one device for an hour", examples=[2.5]
    )
    watts: Positive | None = Field(
        default=None, description="power that one device draws, cooling included", examples=[1000]
    )
    currency: str = Field(
        default="USD", min_length=1, max_length=8, description="what the price is in", examples=["EUR"]
    )


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from, for error messages and relative paths; it takes no part in comparison."""

    shown: str = field(default="recipe", compare=False)
    base: Path = field(default_factory=Path, compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict[KeyPath, int], compare=False)
    overrides: frozenset[KeyPath] = field(default_factory=frozenset[KeyPath], compare=False)
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)

    def where(self, path: KeyPath) -> str:
        """``file.toml:12: trunk.tokens``, or ``--set trunk.tokens`` for an overridden key."""
        name = ".".join(path).replace(".[", "[")
        plain = tuple(part for part in path if not part.startswith("["))
        for depth in range(len(plain), 0, -1):
            if plain[:depth] in self.overrides:
                return f"--set {name}"
        for depth in range(len(plain), 0, -1):
            if plain[:depth] in self.lines:
                return f"{self.shown}:{self.lines[plain[:depth]]}: {name}"
            if any(override[:depth] == plain[:depth] for override in self.overrides):
                return f"--set {name}"
        return f"{self.shown}: {name}" if name else self.shown


class Recipe(Config):
    """A whole program: corpora, tokenizer, family and target size, tunnel, trunk, branches, evaluation, export."""

    name: ProgramName = Field(
        max_length=64, description="name of the program and of its folder in the home", examples=["quickstart"]
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of weights and data order", examples=[0])
    max_loss: Positive | None = Field(
        default=None,
        description="run stops after the forecast if the expected loss (bits per byte) is higher",
        examples=[1.9],
    )
    max_hours: Positive | None = Field(
        default=None, description="run stops after the forecast if the rest would take longer", examples=[3]
    )
    max_cost: Positive | None = Field(
        default=None,
        description="run stops after the forecast if the rest would cost more; needs machine.price",
        examples=[50],
    )
    track: Tuple[Sink] = Field(
        default=(), description="mirror metrics to tensorboard, wandb or trackio", examples=[["tensorboard"]]
    )
    corpus: dict[Name, SourceConfig] = Field(min_length=1, description="named corpora, one table each")
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="the tokenizer")
    model: ModelConfig = Field(default=ModelConfig(), description="family and size")
    budget: BudgetConfig | None = Field(default=None, description="what may be spent, instead of model.size")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW or Muon")
    tunnel: TunnelConfig | None = Field(
        default=None, description="the studies on tiny models; without it, nothing is tuned or forecast"
    )
    trunk: TrunkConfig = Field(default=TrunkConfig(), description="the stable run")
    branch: dict[Name, GrownConfig] = Field(default_factory=dict, description="finished models, one table each")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="scoring")
    export: ExportConfig = Field(default=ExportConfig(), description="export")
    machine: MachineConfig | None = Field(
        default=None, description="the machine that the plan is for; without it, this one is measured"
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        return self._origin

    @property
    def base(self) -> Path:
        """The folder that relative paths in the recipe refer to."""
        return self._origin.base

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as JSON; lengths keep the unit in which they were asked for."""
        tables = self.model_dump(mode="json")
        for name, corpus in self.corpus.items():
            if corpus.chats:  # chats have no text field, and a recipe that states one is refused
                del tables["corpus"][name]["text"]
        return tables

    @property
    def hash(self) -> str:
        """Hash of the resolved recipe: equal recipes have equal hashes, however they were written."""
        return content_hash(self.resolved())

    def given(self, path: str) -> bool:
        """Whether the recipe or an override states the value at ``a.b``; otherwise it is a default or derived."""
        here: Any = self._origin.raw
        for part in path.split("."):
            if not isinstance(here, Mapping) or part not in here:
                return False
            here = here[part]  # pyright: ignore[reportUnknownVariableType]
        return True

    def where(self, path: str) -> str:
        """``file.toml:12: a.b``: the place of a value in the words of an error message."""
        return self._origin.where(tuple(path.split(".")))

    @property
    def mixture(self) -> dict[str, float]:
        """The trunk's mixture; a single corpus needs none."""
        return dict(self.trunk.mixture) if self.trunk.mixture else {next(iter(self.corpus)): 1.0}

    @property
    def tokenizer_corpora(self) -> tuple[str, ...]:
        """The corpora on which the tokenizer is trained."""
        return self.tokenizer.corpora or tuple(self.mixture)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The corpora whose held-out parts are scored."""
        return self.evaluate.corpora or tuple(name for name, corpus in self.corpus.items() if not corpus.pairs)

    @property
    def decays(self) -> tuple[str, ...]:
        """The branches that decay from the trunk."""
        return tuple(name for name, branch in self.branch.items() if branch.kind == "decay")

    @property
    def from_trunk(self) -> tuple[str, ...]:
        """The branches that grow from the trunk: decays, and those that change its model."""
        grown = ((name, branch) for name, branch in self.branch.items() if branch.kind in ("decay", "moe", "long"))
        return tuple(name for name, branch in grown if branch.parent == "trunk" or branch.kind != "long")

    def line_of(self, name: str) -> frozenset[str]:
        """A branch with those that it grows from or averages."""
        above = (self.branch[name].parent, *(self.branch[name].of or ()))
        return frozenset({name}).union(*(self.line_of(one) for one in above if one in self.branch))

    @property
    def packed(self) -> tuple[str, ...]:
        """The corpora whose documents are packed whole into rows: those of post-trained branches."""
        used = (branch.mixture or {} for branch in self.branch.values() if branch.kind in POSTTRAINED)
        return tuple(sorted({name for mixture in used for name in mixture}))

    def long_mixture(self, name: str) -> dict[str, float]:
        """The mixture of a long branch: its own, or that of what it grows from."""
        branch = self.branch[name]
        if branch.mixture:
            return dict(branch.mixture)
        return self.mixture if branch.parent not in self.branch else self.long_mixture(branch.parent)

    def long_from(self, name: str) -> int:
        """Tokens from which a long branch counts a document as long."""
        branch = self.branch[name]
        assert branch.context is not None
        above = self.branch[branch.parent].context if branch.parent in self.branch else None
        return branch.context.long_from or (self.model.row if above is None else above.row)

    @property
    def by_length(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """The corpora whose long and short documents are packed apart, each with the rows and dividing lengths that need it."""
        out: dict[str, set[tuple[int, int]]] = {}
        for name, branch in self.branch.items():
            if branch.kind == "long" and branch.context is not None and branch.context.long_share is not None:
                for corpus in self.long_mixture(name):
                    out.setdefault(corpus, set()).add((branch.context.row, self.long_from(name)))
        return {corpus: tuple(sorted(found)) for corpus, found in sorted(out.items())}

    @property
    def forecast_branch(self) -> str | None:
        """The branch that the forecast is about: the first decay on the trunk's own mixture."""
        return next((n for n in self.decays if self.branch[n].mixture in (None, self.trunk.mixture)), None)

    @property
    def exported(self) -> str | None:
        """The branch that is exported."""
        return self.export.branch or next(reversed(self.branch), None)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.family]

    def shape_of(self, size: object, vocab: int | None = None, where: str = "model.size") -> Shape:
        """The shape of a size of this recipe's family, with its vocabulary, tying, base width and QK-norm.

        Raises:
            RecipeError: the family has no such size.
        """
        shape = self.family.shape(size, vocab or self.tokenizer.vocab, tied=self.model.tied, where=where)
        return self._based(shape)

    def target_shape(self, vocab: int | None = None) -> Shape | None:
        """The shape of the target; None if it follows from a budget."""
        explicit = self.model.shape
        if explicit is None:
            return None if self.model.size is None else self.shape_of(self.model.size, vocab)
        shape = self.shape_at(explicit.width, explicit.layers, vocab)
        heads = explicit.heads or shape.heads
        return replace(shape, heads=heads, kv_heads=explicit.kv_heads or heads, ff=explicit.ff or shape.ff)

    def shape_at(self, width: int, layers: int, vocab: int | None = None) -> Shape:
        """A shape of this family's head dimension and rule for d_ff, with any width and depth."""
        family = self.family
        heads = max(1, width // family.head_dim)
        shape = Shape(
            width=width, layers=layers, heads=heads, kv_heads=heads, head_dim=family.head_dim, ff=5 * width // 2,
            vocab=vocab or self.tokenizer.vocab, base_width=family.base_width, tied=self.model.tied,
            max_positions=family.max_positions,
        )  # fmt: skip
        return self._based(shape)

    def _based(self, shape: Shape) -> Shape:
        # Recipe values that the shape carries, so that no other place needs to know the recipe.
        return replace(shape, base_width=self.model.base_width or shape.base_width, qk_norm=self.model.qk_norm)
