"""The transfer study: which trials it needs. Needs no torch; the driver trains them, ``audit.py`` judges them.

A *cell* is everything of a trial but its learning rate and seed. Rates lie on one lattice for each parametrization,
centre · spacing^k, so that grids of all cells meet. A grid starts with the same few k everywhere and grows until two rates
on either side of its best have been tried; what to try next is a pure function of the losses so far, so that a study that
was killed asks for the same trials again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from windtunnel.base.units import si
from windtunnel.model.parametrization import AxisRule, Factors, Parametrization
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trial_stage
from windtunnel.train.stage import AdamW, Decay, Muon, Stage

SPACINGS = {"sqrt2": math.sqrt(2), "2": 2.0}
DECAY = 0.2
"""The share of a trial that decays, as in the search."""
_SIDE = 2
_FARTHEST = 14
_IDLE = 0.01


@dataclass(frozen=True)
class Cell:
    """Parametrization, shape, batch in sequences, tokens, and what the axis's rule makes of the optimizer's constants."""

    parametrization: Parametrization
    shape: Shape
    batch: int
    tokens: int
    factors: Factors = field(default_factory=Factors)


@dataclass(frozen=True)
class Rung:
    """One value of an axis: how it is shown, and its cell."""

    label: str
    cell: Cell


Grid = Mapping[int, Sequence[float | None]]
"""k → one loss a seed; None for a trial that diverged."""


@dataclass(frozen=True)
class Rules:
    """How an optimizer's constants follow the batch and the tokens: as the parametrization's table says, or with an exponent of
    the learning rate that is given here, which is then all that follows.

    Where a table has no rule over the batch, the learning rate follows its square root (arXiv 2205.10287), as in the batch study.
    ``decay``: the optimizer's kind of weight decay.
    """

    batch: float | None = None
    horizon: float | None = None
    decay: Decay = "plain"

    def of(self, parametrization: Parametrization, axis: str) -> AxisRule:
        """The rule over an axis; one that changes nothing where the parametrization's rows do."""
        if axis not in ("batch", "horizon"):
            return AxisRule()
        given, table = getattr(self, axis), parametrization.over("batch" if axis == "batch" else "tokens")
        if given is None and axis == "batch" and not table.known:
            given = 0.5
        # An independent decay is plain decay times the rate: for it to stay, the plain one falls as the rate grows.
        return table if given is None else AxisRule(lr=given, decay=-given if self.decay == "independent" else 0.0)

    def words(self, parametrization: Parametrization, axis: str) -> str:
        """The rule over an axis, as it is shown."""
        if axis not in ("batch", "horizon"):
            return "by the parametrization"
        rule = self.of(parametrization, axis)
        decay = rule.decay + (rule.lr if self.decay == "independent" else 0.0)
        rest = {"weight decay": decay, "epsilon": rule.epsilon, "the moments' half-life": rule.half_life}
        powers = {"base rate": rule.lr, **{name: power for name, power in rest.items() if power}}
        return ", ".join(f"{name} {_power(power)}" for name, power in powers.items())


def _power(exponent: float) -> str:
    if exponent in (0, 0.5):
        return "× √factor" if exponent else "× 1"
    return f"{'×' if exponent > 0 else '/'} factor^{abs(exponent):g}"


def rungs(axis: str, base: Cell, factors: Sequence[int], rules: Rules = Rules()) -> list[Rung]:
    """The values of an axis from one base cell: one of width, depth, batch and horizon, all else kept."""
    out, rule = [], rules.of(base.parametrization, axis)
    for factor in factors:
        shape, cell = base.shape, base
        if axis == "width":
            wide = replace(
                shape, width=shape.width * factor, heads=shape.heads * factor, kv_heads=shape.kv_heads * factor,
                ff=shape.ff * factor,
            )  # fmt: skip
            label, cell = f"width {wide.width}", replace(base, shape=wide)
        elif axis == "depth":
            deep = replace(shape, layers=shape.layers * factor)
            label, cell = f"{deep.layers} layers", replace(base, shape=deep)
        elif axis == "batch":
            label = f"batch × {factor}"
            cell = replace(base, batch=base.batch * factor, factors=rule.carried(factor))
        else:
            cell = replace(base, tokens=base.tokens * factor, factors=rule.carried(factor))
            label = f"{si(cell.tokens)} tokens"
        out.append(Rung(label, cell))
    return out


def rate_at(centre: float, spacing: str, k: int) -> float:
    """A base learning rate of the lattice, with the four digits that are shown and used."""
    return float(f"{centre * SPACINGS[spacing] ** k:.4g}")


def carried(optimizer: AdamW, factors: Factors) -> AdamW:
    """The constants after a change of batch or tokens; what changes has four digits. Muon's momentum is a moment."""

    def times(value: float, factor: float) -> float:
        return value if math.isclose(factor, 1) else float(f"{value * factor:.4g}")

    def forgetting(beta: float) -> float:
        return beta if factors.half_life == 1 else 1 - float(f"{1 - beta ** (1 / factors.half_life):.4g}")

    independent = optimizer.decay == "independent"  # a step takes this share itself, not times the rate
    changed = replace(
        optimizer, learning_rate=float(f"{optimizer.learning_rate * factors.lr:.4g}"),
        weight_decay=times(optimizer.weight_decay, factors.decay * (factors.lr if independent else 1.0)),
        epsilon=times(optimizer.epsilon, factors.epsilon), beta1=forgetting(optimizer.beta1), beta2=forgetting(optimizer.beta2),
    )  # fmt: skip
    return replace(changed, momentum=forgetting(changed.momentum)) if isinstance(changed, Muon) else changed


def make_trial(cell: Cell, value: float, seed: int, setting: Setting, over: str = "learning_rate") -> Stage:
    """The stage of one trial: warmup, stable, a fifth of decay, scored on the corpora of its mixture.

    Args:
        value: the base learning rate before the axis's rule, or with ``over`` "weight_decay" the plain weight decay.
    """
    if over == "learning_rate":
        optimizer = carried(replace(setting.optimizer, learning_rate=value), cell.factors)
    else:
        optimizer = replace(carried(setting.optimizer, cell.factors), weight_decay=value)
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    steps = max(10, round(cell.tokens / (cell.batch * setting.row)))
    own = replace(
        setting.with_seed(seed), parametrization=cell.parametrization, batch=cell.batch,
        warmup=max(1, min(setting.warmup, steps // 10)), score=tuple(name for name, _ in setting.mixture), optimizer=optimizer,
    )  # fmt: skip
    shape = cell.shape
    name = (
        f"transfer-{cell.parametrization.name}-w{shape.width}-l{shape.layers}-b{cell.batch}-{si(cell.tokens)}"
        f"-lr{rate:g}{'' if over == 'learning_rate' else f'-wd{decay:g}'}-s{seed}"
    )
    return trial_stage(name, shape, own, steps, max(2, round(DECAY * steps)))


def first_rates(count: int) -> list[int]:
    """The k of a grid's first trials, around 0."""
    return [k - (count - 1) // 2 for k in range(count)]


def idle_decay(cell: Cell, setting: Setting, centre: float, spacing: str) -> int:
    """The largest k whose plain weight decay takes less than 1 % of a weight over the whole run: from there on it is none.

    A step takes λ·η, at most with the base learning rate η itself.
    """
    rate = carried(setting.optimizer, cell.factors).learning_rate
    least = _IDLE / (rate * cell.tokens / (cell.batch * setting.row))
    return max(-_FARTHEST, math.floor(math.log(least / centre) / math.log(SPACINGS[spacing])))


def next_rates(grid: Grid, count: int, floor: int = -_FARTHEST) -> list[int]:
    """The k that a grid still needs: its first ones, then those that put two tried rates on either side of the best.

    Nothing is tried below ``floor``, but for the first ones.

    A seed whose own lowest trial is the last one on a side wants the next one too: the audit needs a valley of every seed.

    A rate that diverged for half of the seeds ends the grid on its side. A grid none of whose rates is finite is tried at
    ever lower ones.
    """
    if missing := [k for k in first_rates(count) if k not in grid]:
        return missing
    means = {k: mean for k, losses in grid.items() if (mean := _mean(losses)) is not None}
    if not means:
        lowest = min(grid)
        return [lowest - 2, lowest - 1] if lowest > floor else []
    around = [(min(means, key=lambda k: (means[k], k)), _SIDE)]
    for seed in range(max(map(len, grid.values()))):
        own = {k: loss for k in means if len(grid[k]) > seed and (loss := grid[k][seed]) is not None}
        if own:
            around.append((min(own, key=lambda k: (own[k], k)), 1))
    wanted: set[int] = set()
    for best, reach in around:
        for side in (-1, 1):
            for k in range(best + side, best + side * (reach + 1), side):
                if k in grid and k not in means:
                    break
                if k not in grid and floor <= k <= _FARTHEST:
                    wanted.add(k)
    return sorted(wanted)


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    return sum(finite) / len(finite) if 2 * len(finite) > len(losses) else None


def bridging_rates(target: Grid, lowest: float, highest: float, centre: float, spacing: str) -> list[int]:
    """The k that the target lacks around the proxy's best rates, so that what these cost is measured and not extrapolated."""
    step = math.log(SPACINGS[spacing])  # rates are rounded to four digits: a hundredth of a step is none
    first, last = (math.log(rate / centre) / step for rate in (lowest, highest))
    wanted = range(max(-_FARTHEST, math.floor(first + 1e-2)), min(_FARTHEST, math.ceil(last - 1e-2)) + 1)
    return [k for k in wanted if k not in target]


def best_rate(grid: Grid) -> int | None:
    """The k with the lowest mean loss, or None if all diverged."""
    means = {k: mean for k, losses in grid.items() if (mean := _mean(losses)) is not None}
    return min(means, key=lambda k: (means[k], k)) if means else None
