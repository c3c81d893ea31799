"""From a law and a budget of FLOPs to a size of a family and its tokens, with the next smaller and larger choice beside it.

FLOPs are exact (body, head and attention of each shape), unlike the 6ND of the published laws: for tiny models the head
alone costs more than the body.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from windtunnel.base.units import si
from windtunnel.laws.fit import LawError
from windtunnel.laws.loss import REACH, LossLaw
from windtunnel.model.family import Family


@dataclass(frozen=True)
class Option:
    """One member of a family, trained with the whole budget."""

    name: str
    parameters: int
    tokens: int
    flops: float
    loss: float
    limited: bool
    """Whether the tokens stop at the data at hand, so that part of the budget stays unused."""

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Choice:
    """The best member for a budget and its neighbours (None at the end of the family)."""

    best: Option
    smaller: Option | None
    larger: Option | None
    law: str
    notes: tuple[str, ...]


def choose(
    law: LossLaw, flops: float, family: Family, vocab: int, row: int, *,
    tied: bool = True, max_tokens: float | None = None, force: bool = False,
) -> Choice:  # fmt: skip
    """The member with the lowest predicted loss at a budget of exact training FLOPs.

    Args:
        law: a fitted or a named law, in non-embedding parameters and tokens.
        flops: the budget.
        family: whose members may be chosen.
        vocab: the tokenizer's size; the head's share of the FLOPs depends on it.
        row: tokens in a sequence; the attention's share depends on it.
        max_tokens: the most tokens there are (corpus times tolerable epochs).
        force: also consider members that a law without a floor should not be asked about.

    Raises:
        LawError: the budget is not positive or too small for a batch of one row, or no member may be predicted.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise LawError("budget.flops", f"expected a positive number, got {flops}")
    options: list[Option] = []
    refused: list[str] = []
    for member in sorted(family.members, key=family.body):
        shape = family.shape(member.name, vocab, tied=tied)
        if law.floor is None and not force and shape.body > REACH * law.sizes[1]:
            refused.append(member.name)
            continue
        each = shape.flops_per_token(row).total
        wanted = flops / each
        tokens = int(min(wanted, max_tokens or wanted))
        if tokens >= row:
            loss = law.predict(shape.body, tokens, force=True)
            options.append(Option(member.name, shape.body, tokens, tokens * each, loss, tokens < int(wanted)))
    if not options:
        smallest = min(family.members, key=family.body).name
        raise LawError(
            "budget.flops", f"{flops:.3g} FLOPs do not pay for one row of the smallest member '{smallest}' that may be predicted",
            "raise the budget, choose another family or force it",
        )  # fmt: skip
    index = min(range(len(options)), key=lambda i: options[i].loss)
    best = options[index]
    notes = law.outside(best.parameters, best.tokens)
    if best.limited:
        notes.append(f"the data end at {si(best.tokens)} tokens: {flops / best.flops:.2g}× the budget that is used")
    if index == len(options) - 1:
        notes.append(f"'{best.name}' is the largest member that may be chosen; a larger one might be better")
    if index == 0:
        notes.append(f"'{best.name}' is the smallest member; a smaller one might be better")
    if refused:
        notes.append(f"the {law.form} law has no floor and says nothing about {', '.join(refused)}")
    return Choice(
        best, options[index - 1] if index else None, options[index + 1] if index + 1 < len(options) else None,
        law.name, tuple(notes),
    )  # fmt: skip
