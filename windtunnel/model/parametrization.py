"""The parametrization: one table from the role of a tensor to its initialisation, learning rate and weight decay. Needs no torch.

Every parameter is tagged with its role when it is created, and nothing outside this file multiplies anything by a width.

Sources. ``mup``: MiniCPM, arXiv 2404.06395, table 7 and appendix A.1, after width scaling (arXiv 2203.03466) and depth
scaling (arXiv 2310.02244); the residual factor counts layers, not blocks, as in the released model. Init and learning rate
of norm gains, embedding and head, which table 7 leaves open, follow the trainer that the authors released later. Weight
decay is one number for all tensors, multiplied by each tensor's own learning rate. ``standard``: one standard deviation and
one learning rate for all matrices, no forward multipliers, as in GPT-2 (init 0.02) and Llama.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from windtunnel.base.errors import RecipeError
from windtunnel.model.shape import Shape

if TYPE_CHECKING:
    from torch import nn

Name = Literal["mup", "standard"]
P = TypeVar("P")


class Role(Enum):
    """What a parameter does in the network; decides how it scales."""

    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied embedding"
    """One matrix at both ends: the embedding's init and learning rate, and the head's divisor in the forward pass."""
    HEAD = "head"
    HIDDEN = "hidden"
    NORM = "norm"
    ROUTER = "router"
    """From the stream to one logit for each expert, in every layer."""


@dataclass(frozen=True)
class Rule:
    """How to initialise and train one tensor: N(init_mean, init_std²), and factors on learning rate and weight decay.

    AdamW multiplies weight decay by the learning rate, so a ``decay_multiplier`` of 1 keeps one decay number for all tensors.
    """

    init_mean: float
    init_std: float
    lr_multiplier: float
    decay_multiplier: float


@dataclass(frozen=True)
class Multipliers:
    """Factors of the forward pass: on the embedding's output, on each block's output, on the final norm's output."""

    embedding: float
    residual: float
    logits: float


@dataclass(frozen=True)
class Row:
    """One line of the table: exponents of the width ratio m = width / base width."""

    init: float = 0.0
    lr: float = 0.0


@dataclass(frozen=True)
class Table:
    """A parametrization: a row for each role, the logits' exponent of m, and the residual branch's exponent of depth."""

    rows: dict[Role, Row]
    logits: float
    residual: float


_FLAT = {role: Row() for role in Role}
TABLES: dict[str, Table] = {
    "mup": Table(
        rows={**_FLAT, Role.HIDDEN: Row(init=-0.5, lr=-1.0), Role.ROUTER: Row(init=-0.5, lr=-1.0)},
        logits=-1.0,
        residual=-0.5,
    ),
    "standard": Table(rows=_FLAT, logits=0.0, residual=0.0),
}
ROUTER_STD = 0.3
"""Of a router at the base width, under µP. With init m^-1/2 it is the paper's variance 0.01 at its width ratio of 9 (arXiv
2404.06395, section 7.3), and the router's first logits are as large in every width."""
WIDTH_MULTIPLIERS = ("hidden_init", "hidden_lr", "logits")
"""The width multipliers that ``Parametrization.without`` can switch off, each of which the coordinate check must notice."""


@dataclass(frozen=True)
class Parametrization:
    """A table by name with its free constants.

    ``hidden_init``, ``hidden_lr`` and ``logits`` compensate for a change of base width (see ``rebase``); 1 otherwise.
    ``without`` names width multipliers that are switched off: for the coordinate check's negative controls only.
    """

    name: Name = "mup"
    init_std: float = 0.1
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    hidden_init: float = 1.0
    hidden_lr: float = 1.0
    logits: float = 1.0
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise RecipeError("model.parametrization", f"expected {' or '.join(TABLES)}, got {self.name!r}")
        for name in ("init_std", "scale_emb", "scale_depth", "hidden_init", "hidden_lr", "logits"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"model.{name}", f"expected a positive number, got {getattr(self, name)!r}")
        if unknown := set(self.without) - set(WIDTH_MULTIPLIERS):
            raise RecipeError("model.without", f"expected names among {WIDTH_MULTIPLIERS}, got {sorted(unknown)}")

    @classmethod
    def named(cls, name: Name) -> Parametrization:
        """The parametrization with its own defaults: ``standard`` has init 0.02 and no forward multipliers."""
        return cls(name, init_std=0.02, scale_emb=1.0, scale_depth=1.0) if name == "standard" else cls(name)

    def rule(self, role: Role, shape: Shape) -> Rule:
        """Initialisation, learning-rate and weight-decay factors of a tensor with that role."""
        row, m = TABLES[self.name].rows[role], shape.width / shape.base_width
        if role is Role.NORM:
            return Rule(1.0, 0.0, m**row.lr, 1.0)
        std = ROUTER_STD if role is Role.ROUTER and row.init else self.init_std
        init, lr = std * m**row.init, m**row.lr
        if role in (Role.HIDDEN, Role.ROUTER):  # the router's exponents are the hidden ones
            init = self.init_std if "hidden_init" in self.without else init * self.hidden_init
            lr = 1.0 if "hidden_lr" in self.without else lr * self.hidden_lr
        return Rule(0.0, init, lr, 1.0)

    def multipliers(self, shape: Shape) -> Multipliers:
        """Factors of the forward pass. Under µP: scale_emb, scale_depth/√layers and base width/width."""
        table = TABLES[self.name]
        m = shape.width / shape.base_width
        logits = 1.0 if "logits" in self.without else self.logits * m**table.logits
        return Multipliers(self.scale_emb, self.scale_depth * shape.layers**table.residual, logits)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "without": list(self.without)}

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

    Width ratios change by r = new/old; the compensation factors undo that in the table's hidden rows and in the logits, so
    every size of the family is initialised and trained exactly as before.
    """
    table, r = TABLES[parametrization.name], base_width / shape.base_width
    row = table.rows[Role.HIDDEN]
    changed = replace(
        parametrization,
        hidden_init=parametrization.hidden_init * r**row.init,
        hidden_lr=parametrization.hidden_lr * r**row.lr,
        logits=parametrization.logits * r**table.logits,
    )
    return changed, replace(shape, base_width=base_width)


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
