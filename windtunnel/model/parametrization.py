"""The parametrization: one table from the role of a tensor to its initialisation, learning rate and weight decay. Needs no torch.

Every parameter is tagged with its role when it is created, and nothing outside this file multiplies anything by a width or
depth ratio. With m_N = width / base width and m_L = layers / base layers, a table holds for each role the exponents of both in
init deviation, learning rate, weight decay and epsilon, with a column for AdamW and one for Muon.

Sources. ``mup``: MiniCPM, arXiv 2404.06395, table 7 and appendix A.1, after width scaling (arXiv 2203.03466) and depth
scaling (arXiv 2310.02244); the residual factor counts layers, not blocks, as in the released model. Init and learning rate
of norm gains, embedding and head, which table 7 leaves open, follow the trainer that the authors released later. Weight
decay is one number for all tensors, multiplied by each tensor's own learning rate. ``standard``: one standard deviation and
one learning rate for all matrices, no forward multipliers, as in GPT-2 (init 0.02) and Llama. ``completep``: arXiv 2505.01618,
table 1 with α = 1, on top of ``mup``, whose numbers it has at the base width and depth: residual branches fall as 1/m_L
instead of 1/√m_L, weight decay of hidden matrices grows as their learning rate falls, and epsilon shrinks like the gradient
that it is compared with: 1/m_N outside the blocks, 1/(m_N·m_L) inside. The gain of QK-norm gathers over heads, so its epsilon
does not know the width (arXiv 2512.22382). Adapters: the matrix from the stream scales like a hidden one, the one from the rank,
which does not grow with the width, like an embedding: LoRA+ (arXiv 2402.12354) finds that this is what carries over.

The vocabulary enters by its regime, not by an exponent. Width scaling holds it fixed while the width grows; where it is much
larger than the width, most rows of the embedding see few gradients, and arXiv 2506.15025 finds the best rate of the embedding at
√width times the hidden one instead of width times. ``vocabulary_regime="large"`` adds that to ``mup`` and ``completep``: the
embedding's rate falls as 1/√m_N. It is derived for an embedding with a head beside it; a tied matrix gets the same factor here.

Muon: the update of a matrix has spectral norm η·√(d_out/d_in), the spectral condition of arXiv 2310.17813, so its learning rate
has no exponent of width, and none of depth where the residual branches carry it. Plain weight decay then needs none either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from windtunnel.base.errors import RecipeError
from windtunnel.base.identity import as_identity, later
from windtunnel.model.shape import Shape

if TYPE_CHECKING:
    from torch import nn

Name = Literal["mup", "standard", "completep"]
Kind = Literal["adamw", "muon"]
Axis = Literal["batch", "tokens", "vocabulary"]
Regime = Literal["fixed", "large"]
P = TypeVar("P")


class Role(Enum):
    """What a parameter does in the network; decides how it scales."""

    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied embedding"
    """One matrix at both ends: the embedding's init and learning rate, and the head's divisor in the forward pass."""
    HEAD = "head"
    HIDDEN = "hidden"
    NORM = "norm"
    """The gain of a norm inside a block."""
    HEAD_NORM = "head norm"
    """The gain of QK-norm, shared by all heads."""
    LAST_NORM = "last norm"
    ADAPTER_DOWN = "adapter down"
    """Of a low-rank adapter, from the stream to its few dimensions."""
    ADAPTER_UP = "adapter up"
    """Of a low-rank adapter, from its few dimensions back; begins at zero."""
    ROUTER = "router"
    """From the stream to one logit for each expert, in every layer."""


NORMS = (Role.NORM, Role.HEAD_NORM, Role.LAST_NORM)


@dataclass(frozen=True)
class Rule:
    """How to initialise and train one tensor: N(init_mean, init_std²), and factors on learning rate, weight decay and epsilon.

    Plain weight decay is multiplied by the tensor's learning rate, so a ``decay_multiplier`` of 1 keeps one decay number for
    all tensors.
    """

    init_mean: float
    init_std: float
    lr_multiplier: float
    decay_multiplier: float
    epsilon_multiplier: float = 1.0


@dataclass(frozen=True)
class Multipliers:
    """Factors of the forward pass: on the embedding's output, on each block's output, on the final norm's output."""

    embedding: float
    residual: float
    logits: float


@dataclass(frozen=True)
class Power:
    """The factor m_N^width · m_L^depth."""

    width: float = 0.0
    depth: float = 0.0

    def of(self, m_N: float, m_L: float) -> float:
        return m_N**self.width * m_L**self.depth


_ONE = Power()


@dataclass(frozen=True)
class Column:
    """What one optimizer does with one role: on learning rate, on weight decay (multiplied by that rate), on epsilon."""

    lr: Power = _ONE
    decay: Power = _ONE
    epsilon: Power = _ONE


_FLAT_COLUMN = Column()


@dataclass(frozen=True)
class Row:
    """One line of the table. Muon trains hidden matrices only: the other roles have no column for it and follow AdamW's."""

    init: Power = _ONE
    adamw: Column = _FLAT_COLUMN
    muon: Column | None = None


@dataclass(frozen=True)
class Factors:
    """What a ratio of one axis does to an optimizer's constants. ``half_life``: of both moments, counted in steps."""

    lr: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0
    half_life: float = 1.0


@dataclass(frozen=True)
class AxisRule:
    """Exponents of a ratio (of batch, tokens or vocabulary) in an optimizer's constants, and who says so.

    ``decay`` is of plain weight decay; independent decay has the exponent ``lr + decay``. All exponents zero: no rule is known.

    One rule for both columns. A stage has one base rate for Muon's matrices and AdamW's rest, and no source derives a rule of
    Muon's own; Marin's ``completed_adamh.py`` takes √batch and tokens^-0.3 for matrices whose update has a fixed norm, as
    Muon's has. Muon's momentum keeps its half-life with the moments; it has no epsilon.
    """

    lr: float = 0.0
    decay: float = 0.0
    epsilon: float = 0.0
    half_life: float = 0.0
    source: str = ""

    @property
    def known(self) -> bool:
        """Whether the rule changes anything."""
        return any((self.lr, self.decay, self.epsilon, self.half_life))

    def carried(self, ratio: float) -> Factors:
        """What becomes of an optimizer's constants where the axis changes by a ratio."""
        return Factors(ratio**self.lr, ratio**self.decay, ratio**self.epsilon, ratio**self.half_life)


@dataclass(frozen=True)
class Table:
    """A parametrization.

    Attributes:
        rows: one for each role.
        logits: the logits' exponent of m_N.
        layers: the residual branch's exponent of the number of layers itself.
        residual: the residual branch's exponent of m_L, on top.
        axes: what it says about batch, tokens and vocabulary. A stage's constants are what its recipe says: these rules are
            not applied to it. ``AxisRule.carried`` gives their factors to whoever changes an axis: the transfer study.
        large_vocabulary: factors on learning rates, on top, where the vocabulary is large against the width and the
            parametrization is told so.
    """

    rows: Mapping[Role, Row]
    logits: float
    layers: float
    residual: float = 0.0
    axes: Mapping[Axis, AxisRule] = field(default_factory=dict[Axis, AxisRule])
    large_vocabulary: Mapping[Role, Power] = field(default_factory=dict[Role, Power])


def _inside(width: float) -> Column:
    return Column(epsilon=Power(width, -1.0))


_OUTSIDE = Column(epsilon=Power(-1.0))
_FLAT: dict[Role, Row] = {role: Row(muon=_FLAT_COLUMN if role is Role.HIDDEN else None) for role in Role}
_MUP_HIDDEN = Row(init=Power(-0.5), adamw=Column(lr=Power(-1.0)), muon=_FLAT_COLUMN)
_MUP_DOWN = replace(_MUP_HIDDEN, muon=None)
_MUP_ROUTER = replace(_MUP_HIDDEN, muon=None)
_COMPLETE_HIDDEN = replace(_MUP_HIDDEN, adamw=Column(lr=Power(-1.0), decay=Power(1.0), epsilon=Power(-1.0, -1.0)))
_REGIME = AxisRule(
    source="no exponent of its own: where it is large against the width, vocabulary_regime = 'large' lets the embedding's rate "
    "fall as 1/√width, arXiv 2506.15025; off unless asked for"
)
_LARGE_VOCABULARY = {Role.EMBEDDING: Power(-0.5), Role.TIED_EMBEDDING: Power(-0.5)}
_PAPER_AXES: dict[Axis, AxisRule] = {
    "batch": AxisRule(source="nothing: arXiv 2404.06395, section 3.3, keeps 0.01 while the batch follows its own law"),
    "tokens": AxisRule(source="nothing: arXiv 2404.06395, appendix A.1, finds equal rankings at 10N and 20N"),
    "vocabulary": _REGIME,
}
_NO_AXES: dict[Axis, AxisRule] = {
    "batch": AxisRule(source="nothing"),
    "tokens": AxisRule(source="nothing"),
    "vocabulary": AxisRule(source="nothing"),
}
_SDE_AXES: dict[Axis, AxisRule] = {
    "batch": AxisRule(
        lr=0.5, decay=0.5, epsilon=-0.5, half_life=-1.0,
        source="square-root rule of AdamW's stochastic differential equation, arXiv 2205.10287; decay keeps "
        "τ = B/(η·λ·D), arXiv 2405.13698",
    ),
    "tokens": AxisRule(lr=-0.3, decay=-0.7, source="η ~ D^-0.3, arXiv 2409.19913; decay keeps τ, arXiv 2405.13698"),
    "vocabulary": _REGIME,
}  # fmt: skip
TABLES: dict[str, Table] = {
    "mup": Table(
        {**_FLAT, Role.HIDDEN: _MUP_HIDDEN, Role.ROUTER: _MUP_ROUTER, Role.ADAPTER_DOWN: _MUP_DOWN},
        logits=-1.0, layers=-0.5, axes=_PAPER_AXES, large_vocabulary=_LARGE_VOCABULARY,
    ),
    "standard": Table(_FLAT, logits=0.0, layers=0.0, axes=_NO_AXES),
    "completep": Table(
        {
            Role.EMBEDDING: Row(adamw=_OUTSIDE), Role.TIED_EMBEDDING: Row(adamw=_OUTSIDE), Role.HEAD: Row(adamw=_OUTSIDE),
            Role.LAST_NORM: Row(adamw=_OUTSIDE), Role.NORM: Row(adamw=_inside(-1.0)), Role.HEAD_NORM: Row(adamw=_inside(0.0)),
            Role.HIDDEN: _COMPLETE_HIDDEN, Role.ROUTER: replace(_COMPLETE_HIDDEN, muon=None),
            Role.ADAPTER_DOWN: replace(_COMPLETE_HIDDEN, muon=None),
            Role.ADAPTER_UP: Row(adamw=_inside(-1.0)),
        },
        logits=-1.0, layers=-0.5, residual=-0.5, axes=_SDE_AXES, large_vocabulary=_LARGE_VOCABULARY,
    ),
}  # fmt: skip
ROUTER_STD = 0.3
"""Of a router at the base width, where the table scales its init. With m^-1/2 it is the paper's variance 0.01 at its width ratio
of 9 (arXiv 2404.06395, section 7.3), and the router's first logits are as large in every width."""
WIDTH_MULTIPLIERS = ("hidden_init", "hidden_lr", "logits")
"""The width multipliers that ``Parametrization.without`` can switch off, each of which the coordinate check must notice."""
_POSITIVE = ("init_std", "scale_emb", "scale_depth", "hidden_init", "hidden_lr", "logits", "base_layers", "rebased")


@dataclass(frozen=True)
class Parametrization:
    """A table by name with its free constants.

    ``hidden_init``, ``hidden_lr``, ``logits`` and ``rebased`` compensate for a change of base width (see ``rebase``); 1
    otherwise. ``without`` names width multipliers that are switched off: for the coordinate check's negative controls only.
    ``base_layers`` is the depth at which ``completep`` is ``mup``; the other tables do not know it. ``vocabulary_regime`` says
    whether the vocabulary is large against every width of the family.
    """

    name: Name = "mup"
    init_std: float = 0.1
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    hidden_init: float = 1.0
    hidden_lr: float = 1.0
    logits: float = 1.0
    without: tuple[str, ...] = ()
    base_layers: int = later(2)
    rebased: float = later(1.0)
    vocabulary_regime: Regime = later("fixed")

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise RecipeError("model.parametrization", f"expected {' or '.join(TABLES)}, got {self.name!r}")
        if self.vocabulary_regime not in ("fixed", "large"):
            raise RecipeError("model.vocabulary_regime", f"expected fixed or large, got {self.vocabulary_regime!r}")
        if self.vocabulary_regime == "large" and not TABLES[self.name].large_vocabulary:
            raise RecipeError(
                "model.vocabulary_regime", f"expected 'fixed': the table {self.name!r} knows no width", "leave it out"
            )
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"model.{name}", f"expected a positive number, got {getattr(self, name)!r}")
        if unknown := set(self.without) - set(WIDTH_MULTIPLIERS):
            raise RecipeError("model.without", f"expected names among {WIDTH_MULTIPLIERS}, got {sorted(unknown)}")

    @classmethod
    def named(cls, name: Name, base_layers: int = 2) -> Parametrization:
        """The parametrization with its own defaults: ``standard`` has init 0.02 and no forward multipliers.

        Args:
            base_layers: of the family; used by ``completep`` alone.
        """
        if name == "standard":
            return cls(name, init_std=0.02, scale_emb=1.0, scale_depth=1.0)
        return cls(name, base_layers=base_layers) if name == "completep" else cls(name)

    def rule(self, role: Role, shape: Shape, kind: Kind = "adamw") -> Rule:
        """Initialisation and factors of a tensor with that role, trained by that kind of optimizer."""
        table = TABLES[self.name]
        row = table.rows[role]
        column = row.muon if kind == "muon" and row.muon is not None else row.adamw
        m_N, m_L = shape.width / shape.base_width, shape.layers / self.base_layers
        std = ROUTER_STD if role is Role.ROUTER and row.init.width else self.init_std
        init, lr = std * row.init.of(m_N, m_L), column.lr.of(m_N, m_L)
        decay, epsilon = (power.of(m_N * self.rebased, m_L) for power in (column.decay, column.epsilon))
        if self.vocabulary_regime == "large" and role in table.large_vocabulary:
            lr *= table.large_vocabulary[role].of(m_N * self.rebased, m_L)
        if role in NORMS:
            return Rule(1.0, 0.0, lr, decay, epsilon)
        if role is Role.ADAPTER_UP:
            return Rule(0.0, 0.0, lr, decay, epsilon)
        if role in (Role.HIDDEN, Role.ROUTER, Role.ADAPTER_DOWN):  # of which the exponents are the hidden ones
            init = std if "hidden_init" in self.without else init * self.hidden_init
            if column is row.adamw:
                lr = 1.0 if "hidden_lr" in self.without else lr * self.hidden_lr
        return Rule(0.0, init, lr, decay, epsilon)

    def multipliers(self, shape: Shape) -> Multipliers:
        """Factors of the forward pass. Under µP: scale_emb, scale_depth/√layers and base width/width."""
        table = TABLES[self.name]
        m_N, m_L = shape.width / shape.base_width, shape.layers / self.base_layers
        logits = 1.0 if "logits" in self.without else self.logits * m_N**table.logits
        return Multipliers(self.scale_emb, self.scale_depth * shape.layers**table.layers * m_L**table.residual, logits)

    def over(self, axis: Axis) -> AxisRule:
        """What the table says of a change of batch, tokens or vocabulary."""
        return TABLES[self.name].axes[axis]

    def to_dict(self) -> dict[str, Any]:
        return {**as_identity(self), "without": list(self.without)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Parametrization:
        """Reads what ``to_dict`` wrote.

        Raises:
            RecipeError: a key or a value is unknown.
        """
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise RecipeError("parametrization", f"expected known keys, got {sorted(unknown)}")
        return cls(**{**values, "without": tuple(values.get("without", ()))})


def rebase(parametrization: Parametrization, shape: Shape, base_width: int) -> tuple[Parametrization, Shape]:
    """The same training written with another base width.

    Width ratios change by r = new/old; the compensation factors undo that in every column and in the logits, so every size
    of the family is initialised and trained exactly as before. The base depth stays.
    """
    table, r = TABLES[parametrization.name], base_width / shape.base_width
    row = table.rows[Role.HIDDEN]
    changed = replace(
        parametrization,
        hidden_init=parametrization.hidden_init * r**row.init.width,
        hidden_lr=parametrization.hidden_lr * r**row.adamw.lr.width,
        logits=parametrization.logits * r**table.logits,
        rebased=parametrization.rebased * (r if _knows_width(table, parametrization.vocabulary_regime) else 1.0),
    )
    return changed, replace(shape, base_width=base_width)


def _knows_width(table: Table, regime: Regime) -> bool:
    """Whether weight decay, epsilon or, in a large vocabulary, a rate outside the hidden matrices depends on the width."""
    if regime == "large":
        return True
    columns = [column for row in table.rows.values() for column in (row.adamw, row.muon) if column is not None]
    return any(column.decay.width or column.epsilon.width for column in columns)


def tag(parameter: P, role: Role) -> P:
    """Gives a parameter its role, where it is created."""
    setattr(parameter, "windtunnel_role", role)  # noqa: B010 (a tensor takes attributes, its type does not know them)
    return parameter


def role_of(parameter: object) -> Role:
    """The role of a tagged parameter.

    Raises:
        ValueError: the parameter was never tagged, or is a copy that lost its tag.
    """
    role = getattr(parameter, "windtunnel_role", None)
    if role is None:
        shape = tuple(getattr(parameter, "shape", ()))
        raise ValueError(f"a parameter of shape {shape} has no role: tag it where it is created")
    return role


def named_roles(module: nn.Module) -> dict[str, Role]:
    """The role of every parameter by name.

    Raises:
        ValueError: a parameter has no role; the message names it.
    """
    return dict(_roles(module))


def _roles(module: nn.Module) -> Iterator[tuple[str, Role]]:
    for name, parameter in module.named_parameters():
        try:
            yield name, role_of(parameter)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
