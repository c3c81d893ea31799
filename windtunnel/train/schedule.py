"""Learning-rate schedules as pure functions of the step (arXiv 2404.06395, section 4.2 and appendix B.1). Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Form = Literal["linear", "cosine", "exponential", "1-sqrt"]
FORMS: tuple[Form, ...] = ("linear", "cosine", "exponential", "1-sqrt")


@dataclass(frozen=True)
class Schedule:
    """Warmup, stable, decay; or warmup and a cosine.

    ``factor(s)`` multiplies the base learning rate of update number s, counted from 1. It rises linearly to 1 at
    ``warmup``, stays there up to ``stable_end`` (for ever if that is None) and then decays over ``decay_steps`` updates
    towards ``floor``, where it stays. An exponential decay with a ``half_life`` (in steps) is 0.5^((s − stable_end)/half_life),
    the form in which the paper trained its models; without one it reaches the floor at the end of the decay.

    ``kind="cosine"``: from warmup to ``stable_end + decay_steps`` the half cosine of the released code,
    floor + (1 − floor)/2·(1 + cos πp). ``kind="cosine-loop"``: the same without an end, so that the rate rises again.
    """

    warmup: int = 0
    stable_end: int | None = None
    decay_steps: int = 0
    form: Form = "exponential"
    floor: float = 0.1
    half_life: float | None = None
    kind: Literal["wsd", "cosine", "cosine-loop"] = "wsd"

    def factor(self, step: int) -> float:
        """The share of the base learning rate at update ``step`` (1 is the first)."""
        if step < self.warmup:
            return step / self.warmup
        if self.kind != "wsd":
            end = (self.stable_end or 0) + self.decay_steps
            progress = (step - self.warmup) / max(1, end - self.warmup)
            progress = progress if self.kind == "cosine-loop" else min(1.0, progress)
            return self.floor + 0.5 * (1 - self.floor) * (1 + math.cos(math.pi * progress))
        if self.stable_end is None or step <= self.stable_end:
            return 1.0
        if self.half_life is not None:
            return max(self.floor, 0.5 ** ((step - self.stable_end) / self.half_life))
        progress = min(1.0, (step - self.stable_end) / max(1, self.decay_steps))
        return decay(self.form, progress, self.floor)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decay(form: Form, progress: float, floor: float) -> float:
    """A decay from 1 to ``floor`` as its progress goes from 0 to 1."""
    if form == "exponential":
        return max(floor, 1e-4) ** progress if progress < 1 else floor
    share = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "1-sqrt": 1 - math.sqrt(progress),
    }[form]
    return floor + (1 - floor) * share
