"""A stage: start, surgery, data plan, objective, schedule, batch. The only way to train anything. Needs no torch.

A trunk, a decay branch and a tunnel trial are stages that differ in these values and in nothing else. A stage is a pure
function of its identity: equal identities give equal weights, bit for bit in one numeric class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from windtunnel.base.artefact import content_hash
from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.identity import as_identity, later
from windtunnel.corpus.mixture import DataPlan
from windtunnel.model.parametrization import Kind, Parametrization
from windtunnel.model.shape import Shape
from windtunnel.train.batches import Batches, Changes
from windtunnel.train.growth import Balance, Surgery
from windtunnel.train.lora import Lora
from windtunnel.train.preference import Preference
from windtunnel.train.schedule import Schedule

NUMERICS = 2
"""Raised whenever our own arithmetic changes (the golden losses force it): no stale trial may enter a law."""
NOT_IDENTITY = (
    "name", "keep", "score", "score_tokens", "save_every", "save_final", "keep_last", "open_ended", "dynamics_every",
    "recompute",
)  # fmt: skip
"""What decides no number of a stage: how it is called, kept, scored and watched."""
FINISHED = ("decay", "sft", "dpo", "adapt", "soup")
"""Kinds of stages that end in a finished model."""

Decay = Literal["plain", "independent"]
Recompute = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class AdamW:
    """Base learning rate and AdamW's constants (arXiv 2404.06395 released code: betas .9/.95, decay .1, clip 1).

    ``learning_rate`` is the *base* rate; each role multiplies it. ``weight_decay`` is decoupled. With ``decay`` "plain" it is
    multiplied by the tensor's own rate of the step, as in torch. With "independent" it is the share of every tensor that a
    step at full rate takes away, w ← w − f·weight_decay·w with the schedule's factor f, whatever the learning rate (arXiv
    2309.14322, section 3.2; 2405.13698 gives the reason: it keeps the time over which weights average their updates).
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    decay: Decay = later("plain")
    kind: ClassVar[Kind] = "adamw"

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise RecipeError("optimizer.decay", f"expected {' or '.join(get_args(Decay))}, got {self.decay!r}")

    def to_dict(self) -> dict[str, Any]:
        return as_identity(self)


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon for the hidden matrices, AdamW with the other constants for the rest.

    Muon (K. Jordan, kellerjordan.github.io/posts/muon; arXiv 2502.16982) keeps B ← momentum·B + (1 − momentum)·g, looks ahead
    (Nesterov), and takes the polar factor of that by five Newton-Schulz steps in bf16: a step has spectral norm near
    η·√(d_out/d_in), whatever the gradient's size.
    """

    momentum: float = 0.95
    kind = "muon"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise RecipeError("optimizer.momentum", f"expected a number from 0 on and below 1, got {self.momentum}")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **as_identity(self)}


def optimizer_of(kind: str, base: AdamW) -> AdamW:
    """The same constants for that kind of optimizer, "adamw" or "muon".

    Raises:
        RecipeError: there is no such kind.
    """
    kinds = {made.kind: made for made in (AdamW, Muon)}
    if kind not in kinds:
        raise RecipeError("optimizer.kind", f"expected {' or '.join(kinds)}, got {kind!r}")
    if base.kind == kind:
        return base
    return kinds[kind](**{f.name: getattr(base, f.name) for f in fields(AdamW)})


def check_ranks(optimizer: AdamW, ranks: int, lora: Lora | None = None) -> None:
    """Raises where a stage cannot be trained with its matrices cut into slices.

    Raises:
        UserError: Muon and adapters need whole matrices, and several processes hold slices of them.
    """
    if ranks > 1 and lora is not None:
        raise UserError(
            "branch.lora", f"expected one process for adapters, got {ranks} with slices of the weights",
            "restrict --devices to one, or leave lora out",
        )  # fmt: skip
    if ranks > 1 and isinstance(optimizer, Muon):
        raise UserError(
            "optimizer.kind",
            f"expected one process for Muon, which needs whole matrices, got {ranks} with slices of them",
            "restrict --devices to one, or choose adamw",
        )


@dataclass(frozen=True)
class Start:
    """Where a stage begins if it has no checkpoint of its own: at a step of another stage, moments and all.

    ``fresh``: with that checkpoint's weights alone; moments are empty, and steps and sequences count from 0.
    """

    stage: str
    step: int
    fresh: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON; ``fresh`` only where it is set, so that the keys of other stages stay what they were."""
        return {"stage": self.stage, "step": self.step, **({"fresh": True} if self.fresh else {})}


@dataclass(frozen=True)
class Member:
    """A checkpoint in an average: the key of its stage, its step, its share of the weights."""

    stage: str
    step: int
    weight: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """Everything that one training run depends on.

    ``batch`` counts sequences in a step (``batch_changes`` says from where on it is another), and ``steps`` is the number of
    the last update, counted from the beginning of the trunk, or of this stage if its start is fresh. ``open_ended`` marks a
    trunk: its identity does not contain its length, so more tokens extend it. ``keep`` lists the steps whose checkpoints
    stay; ``score`` names the held-out parts that are scored at the end.
    """

    name: str
    kind: str
    shape: Shape
    parametrization: Parametrization
    optimizer: AdamW
    schedule: Schedule
    plan: DataPlan
    corpora: tuple[tuple[str, str], ...]
    batch: int
    steps: int
    seed: int
    start: Start | None = None
    objective: str = "lm"
    masking: str = "document"
    open_ended: bool = False
    keep: tuple[int, ...] = ()
    score: tuple[str, ...] = ()
    score_tokens: int | None = None
    save_every: int | None = None
    save_final: bool = True
    keep_last: int = 2
    lr_by_role: bool = True
    """Whether roles multiply the learning rate; without, every tensor trains at the same one."""
    preference: Preference | None = None
    """What the objective ``dpo`` minimises."""
    lora: Lora | None = None
    """Trains low-rank adapters beside frozen weights, instead of the weights."""
    average: tuple[Member, ...] = ()
    """Instead of training: checkpoints whose weights are averaged."""
    surgery: Surgery | None = None
    """What makes this stage's model of its parent's, where their shapes differ."""
    balance: Balance | None = None
    """What keeps experts equally busy; a stage without experts has none."""
    batch_changes: Changes = ()
    """(step, batch) pairs: updates after that step have that batch."""
    dynamics_every: int = 0
    """Steps from one look at two consecutive updates to the next (``train/pairs.py``); 0 for none. No number depends on it."""
    recompute: Recompute = "auto"
    """Whether layers are computed again in the backward pass instead of keeping what it needs: no part of the identity."""

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON."""
        out = self.to_dict()
        for name in NOT_IDENTITY:
            out.pop(name, None)
        if self.open_ended:
            out.pop("steps")
        return {**out, "numerics": NUMERICS}

    @property
    def key(self) -> str:
        """The hash of the identity, 64 hexadecimal digits."""
        return content_hash(self.identity())

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.key[:10]}"

    @property
    def batches(self) -> Batches:
        return Batches(self.batch, self.batch_changes)

    @property
    def step_tokens(self) -> int:
        """Tokens in the last step, the padding of no row subtracted."""
        return self.batches.at(self.steps) * self.plan.row

    @property
    def tokens(self) -> int:
        """Tokens consumed at the last step, those of the trunk included."""
        return self.batches.sequences(self.steps) * self.plan.row

    @property
    def own_tokens(self) -> int:
        """Tokens that this stage itself reads."""
        return self.tokens - self.batches.sequences(self.first_step) * self.plan.row

    @property
    def own_steps(self) -> int:
        """Updates that this stage itself makes."""
        return self.steps - self.first_step

    @property
    def first_step(self) -> int:
        """The step at which this stage begins."""
        return self.start.step if self.start and not self.start.fresh else 0

    @property
    def flops(self) -> float:
        """Exact training FLOPs of this stage's own updates."""
        row = self.plan.row
        per_token = self.lora.flops_per_token(self.shape, row) if self.lora else self.shape.flops_per_token(row).total
        return self.own_tokens * per_token

    def to_dict(self) -> dict[str, Any]:
        return {
            **{f: getattr(self, f) for f in ("name", "kind", "batch", "steps", "seed", "objective", "masking", "open_ended",
                                             "save_every", "save_final", "keep_last", "score_tokens")},
            "keep": list(self.keep),
            "score": list(self.score),
            "corpora": dict(self.corpora),
            "shape": self.shape.to_dict(),
            "parametrization": self.parametrization.to_dict(),
            "optimizer": self.optimizer.to_dict(),
            "schedule": self.schedule.to_dict(),
            "plan": self.plan.to_dict(),
            "start": self.start.to_dict() if self.start else None,
            **({} if self.lr_by_role else {"lr_by_role": False}),
            **({"preference": self.preference.to_dict()} if self.preference else {}),
            **({"lora": self.lora.to_dict()} if self.lora else {}),
            **({"average": [member.to_dict() for member in self.average]} if self.average else {}),
            **{name: asdict(value) for name in ("surgery", "balance") if (value := getattr(self, name)) is not None},
            **({"batch_changes": [list(change) for change in self.batch_changes]} if self.batch_changes else {}),
            **({"dynamics_every": self.dynamics_every} if self.dynamics_every else {}),
            **({"recompute": self.recompute} if self.recompute != "auto" else {}),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Stage:
        return cls(
            **{
                **raw,
                "keep": tuple(raw["keep"]),
                "score": tuple(raw["score"]),
                "corpora": tuple(sorted(raw["corpora"].items())),
                "shape": Shape(**raw["shape"]),
                "parametrization": Parametrization.from_dict(raw["parametrization"]),
                "optimizer": _read_optimizer(raw["optimizer"]),
                "schedule": Schedule(**raw["schedule"]),
                "plan": DataPlan.from_dict(raw["plan"]),
                "start": Start(**raw["start"]) if raw["start"] else None,
                "preference": Preference(**raw["preference"]) if raw.get("preference") else None,
                "lora": Lora(**raw["lora"]) if raw.get("lora") else None,
                "average": tuple(Member(**member) for member in raw.get("average", ())),
                "surgery": Surgery(**raw["surgery"]) if raw.get("surgery") else None,
                "balance": Balance(**raw["balance"]) if raw.get("balance") else None,
                "batch_changes": Batches.of(raw).changes,
            }
        )

    def with_steps(self, steps: int) -> Stage:
        return replace(self, steps=steps)


def _read_optimizer(raw: dict[str, Any]) -> AdamW:
    values = dict(raw)
    return (Muon if values.pop("kind", "adamw") == "muon" else AdamW)(**values)
