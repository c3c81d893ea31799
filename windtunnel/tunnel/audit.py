"""The audit of a transfer: how far does the best learning rate move along one axis, and what does the proxy's cost at the target?

Plain numbers in, a verdict out: nothing here trains. A *valley* is the loss over the base learning rate at one size and
seed. Its minimum is that of a parabola in log2 of the rate through the points around the lowest one; drift is counted in
steps of √2 (half an octave), and regret is what the target loses with the proxy's best rate in place of its own.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from scipy import special as _special  # pyright: ignore[reportMissingTypeStubs]

from windtunnel.base.errors import WindtunnelError

Losses = Mapping[float, float | None]
"""Base learning rate → held-out loss in nats per byte; None for a trial that diverged."""
_stdtrit = cast("Callable[[float, float], float]", _special.stdtrit)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
_WINDOW = 2
"""Points on either side of the lowest one that the parabola is fitted to."""


@dataclass(frozen=True)
class Bars:
    """What a verdict asks for. Drift in steps of √2, regret as a share of the loss."""

    steps: float = 1.0
    regret: float = 0.005
    near_steps: float = 3.0
    near_regret: float = 0.02


BARS = Bars()
"""The thresholds: half an octave and .5 % carry over, as issue and paper ask; up to three steps and 2 % carry over nearly."""


@dataclass(frozen=True)
class Valley:
    """The fitted valley: best base learning rate, loss there, loss per octave² around it.

    ``edge`` is ``"low"`` or ``"high"`` if the lowest trial is the last one on that side: the minimum may lie beyond it, and
    rate and loss are those of that trial; ``"none"`` if it lies at or below a floor under which a value does nothing.
    ``reach`` are the rates between which the parabola was fitted.
    """

    rate: float
    loss: float
    curvature: float
    edge: str
    reach: tuple[float, float]
    points: int
    diverged: int

    def at(self, rate: float) -> float:
        """The parabola's loss at a base learning rate."""
        return self.loss + self.curvature * math.log2(rate / self.rate) ** 2


def find_valley(losses: Losses, floor: float = 0.0) -> Valley:
    """The valley of one size and seed.

    Args:
        losses: of each base learning rate, or of each weight decay.
        floor: a value from which on downwards it does nothing, so that none is as good; 0 where there is no such value.

    A least-squares parabola over five points where they are there (two on either side of the lowest), through three at
    least; diverged trials are no points, but one above the lowest point shows that the grid did not end there.

    Raises:
        WindtunnelError: fewer than three trials ended with a finite loss.
    """
    found = sorted((rate, loss) for rate, loss in losses.items() if loss is not None and math.isfinite(loss))
    failed = [rate for rate in losses if rate not in dict(found)]
    if len(found) < 3:
        raise WindtunnelError(
            f"a valley needs 3 learning rates that do not diverge, got {len(found)} of {len(losses)}; lower the rates"
        )
    x, y = np.log2([r for r, _ in found]), np.array([v for _, v in found])
    lowest = int(np.argmin(y))
    if lowest == 0 or (lowest == len(found) - 1 and not any(rate > found[-1][0] for rate in failed)):
        rate, loss = found[lowest]
        side = "high" if lowest else "none" if rate <= floor * (1 + 1e-6) else "low"
        return Valley(rate, loss, 0.0, side, (rate, rate), 1, len(failed))
    for first, last in ((lowest - _WINDOW, lowest + _WINDOW), (lowest - 1, lowest + 1), (lowest - 2, lowest)):
        first, last = max(0, first), min(len(found) - 1, last)
        if last - first < 2:
            continue
        base = x[lowest]
        c, b, a = (float(v) for v in np.polyfit(x[first : last + 1] - base, y[first : last + 1], 2))
        if c > 0:  # noise can bend five points the wrong way; three around the lowest never bend so
            place = float(np.clip(-b / (2 * c), x[first] - base, x[last] - base + 0.25 * (last == lowest)))
            loss = a + b * place + c * place * place
            return Valley(
                float(2 ** (base + place)),
                loss,
                c,
                "",
                (found[first][0], found[last][0]),
                last - first + 1,
                len(failed),
            )
    rate, loss = found[lowest]
    return Valley(rate, loss, 0.0, "", (rate, rate), 1, len(failed))


def loss_at(losses: Losses, valley: Valley, rate: float) -> float:
    """The loss of a size at any base learning rate: the parabola within its reach, else a line between neighbouring trials.

    Beyond the trials it is the parabola again, or infinite if the next trial on that side diverged.
    """
    if valley.curvature and valley.reach[0] <= rate <= valley.reach[1]:
        return valley.at(rate)
    found = sorted((r, v) for r, v in losses.items() if v is not None and math.isfinite(v))
    rates = [r for r, _ in found]
    if rates[0] <= rate <= rates[-1]:
        return float(np.interp(math.log2(rate), np.log2(rates), [v for _, v in found]))
    if any(rate >= r > rates[-1] or rate <= r < rates[0] for r in losses if r not in rates):
        return math.inf
    return valley.at(rate)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 90 % interval (Student's t); without a second seed there is no interval."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and interval of one value a seed."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2 or not math.isfinite(mean):
            return cls(mean, None, None, count)
        half = _stdtrit(count - 1, 0.95) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    def to_dict(self) -> dict[str, Any]:
        return {name: v if v is None or math.isfinite(v) else None for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Slope:
    """How fast the target's loss falls with tokens, −dL/d ln D in nats per byte, and where that comes from."""

    value: float
    source: str

    def compute(self, regret: float) -> float:
        """The share of extra training that makes up for a regret in nats per byte: exp(regret / slope) − 1."""
        return math.expm1(regret / self.value) if self.value > 0 else math.inf


_EDGES = {
    "low": "is the lowest that was tried: the minimum may lie beyond it",
    "high": "is the highest that was tried: the minimum may lie beyond it",
    "none": "is so low that it does nothing in a run of that length: none is as good",
}


@dataclass(frozen=True)
class Audit:
    """One axis under one parametrization, smallest value first.

    ``valleys`` [value][seed]. ``drift``: log√2 of the target's best base rate over the proxy's. ``regret``: nats per byte at
    the target; ``regret_share`` of its loss; ``compute``: extra training that makes up for it, None without a slope.
    """

    valleys: tuple[tuple[Valley, ...], ...]
    drift: Estimate
    regret: Estimate
    regret_share: Estimate
    compute: Estimate | None
    verdict: str
    at_worst: str
    notes: tuple[str, ...]


def audit(
    grids: Sequence[Sequence[Losses]], slope: Slope | None = None, bars: Bars = BARS, *, floors: Sequence[float] = (),
    what: str = "rate",
) -> Audit:  # fmt: skip
    """Judges one axis. Where none is best at one end, there is no drift, and what the proxy's value costs decides.

    Args:
        grids: the losses of each value of the axis (proxy first, target last) for each seed, paired by seed.
        slope: of the target's loss over tokens.
        bars: thresholds of the verdict.
        floors: for each value of the axis, what does nothing (``find_valley``); without them, no such value is known.
        what: is looked for.

    Raises:
        WindtunnelError: a valley has fewer than three finite trials.
    """
    under = floors or [0.0] * len(grids)
    valleys = tuple(
        tuple(find_valley(losses, floor) for losses in seeds) for seeds, floor in zip(grids, under, strict=True)
    )
    proxy, target = valleys[0], valleys[-1]
    drift = Estimate.of([2 * math.log2(b.rate / a.rate) for a, b in zip(proxy, target, strict=True)])
    regrets = [
        max(0.0, loss_at(losses, own, small.rate) - own.loss)
        for losses, own, small in zip(grids[-1], target, proxy, strict=True)
    ]
    regret = Estimate.of(regrets)
    share = Estimate.of([r / own.loss for r, own in zip(regrets, target, strict=True)])
    compute = Estimate.of([slope.compute(r) for r in regrets]) if slope else None
    edges = [("proxy", v.edge) for v in proxy if v.edge] + [("target", v.edge) for v in target if v.edge]
    notes = tuple(f"the {who}'s best {what} {_EDGES[side]}" for who, side in dict.fromkeys(edges))
    beyond, none = any(side != "none" for _, side in edges), any(side == "none" for _, side in edges)
    verdict = judge(0.0 if none else drift.value, share.value, bars, edge=beyond, what=what)
    worst_drift = max((abs(v) for v in (drift.value, drift.low, drift.high) if v is not None and not none), default=0.0)
    worst_share = share.value if share.high is None else share.high
    at_worst = judge(worst_drift, worst_share, bars, edge=beyond, what=what)
    return Audit(valleys, drift, regret, share, compute, verdict, at_worst, notes)


def regret_of(found: Audit, target: Sequence[Losses], factor: float) -> Estimate:
    """What the target loses, as a share of its loss, with its proxy's best value times a factor in place of its own."""
    return Estimate.of([
        max(0.0, loss_at(losses, own, small.rate * factor) - own.loss) / own.loss
        for losses, own, small in zip(target, found.valleys[-1], found.valleys[0], strict=True)
    ])  # fmt: skip


def judge(drift: float, share: float, bars: Bars = BARS, *, edge: bool = False, what: str = "rate") -> str:
    """The verdict in words; with a minimum on an edge only ``does not carry over`` can be known."""
    steps = abs(drift)
    if steps > bars.near_steps or share > bars.near_regret:
        return "does not carry over"
    if edge:
        return f"undecided: a best {what} lies on the grid's edge"
    if steps <= bars.steps and share <= bars.regret:
        return "carries over"
    count = max(1, math.ceil(steps - 1e-9))
    price = f", at {100 * share:.1f} % more loss" if share > bars.regret else ""
    return f"carries over within {count} step{'s' if count > 1 else ''} of √2{price}"
