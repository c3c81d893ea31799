"""The scaling study: a trunk for each small size, a decay branch for each token count (arXiv 2404.06395, section 4.5).

Costs m trunks instead of m·k whole runs. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.schedule import Form
from windtunnel.train.stage import Stage


@dataclass(frozen=True)
class Decay:
    """A decay rule: the share of all tokens that the decay takes, its form and floor."""

    share: float = 0.2
    form: Form = "exponential"
    floor: float = 0.1
    half_life: float | None = None

    def split(self, steps: int) -> tuple[int, int]:
        """Stable and decay steps of a run of ``steps``."""
        decay = max(1, round(self.share * steps))
        return steps - decay, decay


@dataclass(frozen=True)
class ScalingRun:
    """One trunk of the study with its branches, each with the tokens that a point of the law has (decay included)."""

    trunk: Stage
    branches: tuple[tuple[int, Stage], ...]


def scaling_runs(
    sizes: list[tuple[str, Shape]], tokens: list[int], seeds: list[int], setting: Setting, decay: Decay
) -> list[ScalingRun]:
    """All trunks and branches of a study: every size, every seed, a branch for every token count."""
    runs = []
    for seed in seeds:
        own = setting.with_seed(seed)
        for name, shape in sizes:
            splits = [decay.split(own.steps(count)) for count in sorted(tokens)]
            points = [stable for stable, _ in splits]
            trunk = trunk_stage(f"proxy-{name}-seed{seed}", shape, own, points[-1], points)
            branches = []
            for count, (stable, steps) in zip(sorted(tokens), splits, strict=True):
                branch = decay_stage(
                    trunk, f"{trunk.name}-{count}", own, at=stable, steps=steps,
                    form=decay.form, floor=decay.floor, half_life=decay.half_life,
                )  # fmt: skip
                branches.append((branch.tokens, branch))
            runs.append(ScalingRun(trunk, tuple(branches)))
    return runs
