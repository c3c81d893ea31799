"""What a trunk would reach if it decayed now, from curve laws fitted to smaller runs of the same batch and learning rate.

A law knows the level of the size that it was fitted to, not that of the trunk. What carries over is the *drop*: the log loss
after the decay minus that of the trunk at its last updates, each size's law asked about the trunk's own learning rates. Drops
grow slowly with size, so the trunk's is read off a straight line over log N (the only size's own where there is one). The
variance of the log loss is the sum of

- the nearest size's own variance of that drop (disagreement of laws, resampled blocks, decays not seen), as for
  ``CurveModel.contrast``,
- the square of half the step that the line takes from the nearest size to the trunk, and of the drops' distance from the line;
  with one size, the square of half its drop,
- the square of a tenth of the drop,
- the noise of the trunk's last mean loss.

The line and the tenth were chosen on one home (a 1.5M trunk, proxies of .05M, .1M and .3M with three branches each): what is
said there is a rehearsal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from windtunnel.laws.curve_fit import CurveModel
from windtunnel.laws.design import DecayRule, rates_of
from windtunnel.laws.fit import Array, LawError

_NORMAL_90 = 1.6449
_TENTH = 0.1


@dataclass(frozen=True)
class DecayNow:
    """Expected training loss after a decay from update ``step``, with its 90 % interval."""

    step: int
    decay: int
    rule: DecayRule
    loss: float
    """Mean loss over the trunk's last updates."""
    expected: float
    low90: float
    high90: float
    sizes: tuple[float, ...]
    """N of the runs behind the laws."""
    notes: tuple[str, ...] = ()

    @property
    def drop(self) -> float:
        """Relative change of the loss, negative for a gain."""
        return self.expected / self.loss - 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step, "decay": self.decay, "form": self.rule.form, "share": self.rule.share, "floor": self.rule.floor,
            "loss": self.loss, "expected": self.expected, "interval90": [self.low90, self.high90], "drop": self.drop,
            "sizes": list(self.sizes), "notes": list(self.notes),
        }  # fmt: skip


def decay_now(
    models: Mapping[float, CurveModel], losses: Array, *, peak: float, warmup: int, rule: DecayRule, size: float, longest: int,
) -> DecayNow:  # fmt: skip
    """What a decay from here would give.

    Args:
        models: laws by N, each fitted to runs of one size.
        losses: training loss of each update of the trunk up to now, NaN where none is known.
        peak: the trunk's base learning rate.
        warmup: its updates of warmup.
        rule: the decay; its share is that of all updates, decay included.
        size: N of the trunk.
        longest: updates of the longest run behind the laws.

    Raises:
        LawError: there is no law, or the trunk has fewer than 20 losses since its warmup.
    """
    step = len(losses)
    window = max(20, step // 20)
    last = losses[max(step - window, warmup) :]
    finite = last[np.isfinite(last)]
    if not models or len(finite) < 10:
        raise LawError(
            "decay now", f"expected laws and at least 10 losses after the warmup, got {len(models)} and {len(finite)}"
        )
    decay = max(1, round(step * rule.share / (1 - rule.share)))
    flat = peak * np.minimum(1.0, np.arange(1, step + 1) / max(1, warmup))
    schedule = DecayRule(decay / (step + decay), rule.form, rule.floor).schedule(step + decay, warmup)
    decayed = rates_of(schedule, peak, step + decay)
    level = math.log(float(finite.mean()))
    noise = float(np.log(finite).std(ddof=1)) / math.sqrt(len(finite))
    at = np.arange(step - len(last) + 1, step + 1, max(1, len(last) // 10), dtype=np.int64)
    drops: dict[float, tuple[float, float]] = {n: _drop(model, flat, decayed, at) for n, model in models.items()}
    nearest = min(drops, key=lambda n: abs(math.log(n / size)))
    drop, between = _at_size({n: value for n, (value, _) in drops.items()}, size, nearest)
    own = drops[nearest][1]
    sd = math.sqrt(own**2 + between**2 + noise**2)
    notes: list[str] = []
    if size > 1.05 * max(drops):
        notes.append(f"the trunk is {size / max(drops):.3g}× the largest size behind the law")
    if step + decay > 1.05 * longest:
        notes.append(f"the trunk would be {(step + decay) / longest:.3g}× the longest run behind the law")
    centre = level + drop
    return DecayNow(
        step, decay, rule, math.exp(level), math.exp(centre), math.exp(centre - _NORMAL_90 * sd),
        math.exp(centre + _NORMAL_90 * sd), tuple(sorted(models)), tuple(notes),
    )  # fmt: skip


def _at_size(drops: Mapping[float, float], size: float, nearest: float) -> tuple[float, float]:
    """The drop at N = ``size`` and the standard deviation of the step from the sizes that are known."""
    if len(drops) == 1:
        return drops[nearest], abs(drops[nearest]) / 2
    x: Array = np.log(np.array(list(drops), dtype=np.float64) / nearest)
    y: Array = np.array(list(drops.values()), dtype=np.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    step = slope * math.log(size / nearest)
    apart: Array = y - y.mean() - slope * (x - x.mean())
    beside = math.sqrt(float((apart**2).mean()))
    return drops[nearest] + step, math.hypot(step / 2, beside, _TENTH * drops[nearest])


def _drop(model: CurveModel, flat: Array, decayed: Array, at: Any) -> tuple[float, float]:
    """Log loss after the decay minus mean log loss of the trunk's last updates, and its standard deviation."""
    weights = np.array(model.weights)
    values = np.array(
        [math.log(f.law.final(decayed)) - float(np.log(f.law.losses(flat, at)).mean()) for f in model.fits]
    )
    value = float(weights @ values)
    # Of the contrast's variance all but its sign carries over: it is about these two schedules.
    apart = model.contrast(decayed, np.concatenate([flat, np.full(len(decayed) - len(flat), flat[-1])]))
    half = (apart.high90 - apart.low90) / 2 / model.best.final(decayed)
    return value, half / _NORMAL_90
