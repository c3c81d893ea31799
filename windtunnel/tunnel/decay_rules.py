"""Rules for weight decay along an axis of a transfer study: what each makes of the smallest model's best one. Needs no torch.

A step shrinks a hidden matrix by the share λ·η_W, with plain weight decay λ and the matrix's own learning rate η_W. A rule says
how that share follows width, batch or tokens; from it and from how η_W does follows the exponent of λ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecayRule:
    """λ goes with factor^exponent; ``name`` says what stays the same or how the share of a step falls."""

    name: str
    exponent: float
    source: str


def decay_rules(axis: str, *, rate: float) -> tuple[DecayRule, ...]:
    """The rules for an axis of which the hidden matrices' learning rate goes with factor^rate.

    The timescale τ of the average that AdamW keeps of its updates, as a share of the run, is B/(η_W·λ·D): kept, it asks for
    the same share a step at any width, for twice the share at twice the batch, and for half of it at twice the tokens.
    """
    kept = {"batch": 1.0, "horizon": -1.0}.get(axis, 0.0)
    rules = [
        DecayRule("one weight decay", 0.0, "arXiv 2404.06395: the same number for all tensors and sizes"),
        DecayRule("timescale τ kept", kept - rate, "arXiv 2405.13698, 2505.13738"),
    ]
    if axis == "width":
        rules.append(DecayRule("1/√width a step", -0.5 - rate, "arXiv 2510.15262: λ ∝ √width where η_W ∝ 1/width"))
        rules.append(DecayRule("1/width a step", -1.0 - rate, "one number under a rate that falls as 1/width"))
    return tuple({rule.exponent: rule for rule in reversed(rules)}.values())[::-1]
