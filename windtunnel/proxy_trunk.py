"""A small trunk at a seed, with the point where short branches leave it: what studies of data grow from. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from windtunnel.base.units import Length
from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.pretrain.trunk import trial_stage, trunk_stage
from windtunnel.program import Program
from windtunnel.train.stage import Stage

_SEED_STEP = 1000


def proxy_shape(program: Program, size: str | None) -> Shape:
    """A stated size, the tunnel's smallest proxy, or the target."""
    tunnel = program.recipe.tunnel
    smallest = size or (tunnel.proxies[0] if tunnel else None)
    return program.shape if smallest is None else program.shape_of(smallest)


@dataclass(frozen=True)
class ProxyTrunk:
    """The setting of one seed, and steps: stable ones before ``at``, then ``decay`` more. ``word`` begins the runs' names."""

    word: str
    shape: Shape
    setting: Setting
    at: int
    decay: int

    @classmethod
    def of(
        cls, program: Program, word: str, seed_number: int, *, size: str | None, tokens: Length, decay: float,
        score: Iterable[str],
    ) -> ProxyTrunk:  # fmt: skip
        """The trunk of the seed with that number, counted from the recipe's own.

        Args:
            tokens: the whole length, its decay included.
            decay: share of it that decays.
            score: corpora whose held-out parts are scored.
        """
        shape, seed = proxy_shape(program, size), program.recipe.seed + _SEED_STEP * seed_number
        setting = replace(program.setting().with_seed(seed), score=tuple(dict.fromkeys(score)))
        steps = setting.steps(tokens.tokens(parameters=shape.body))
        short = max(1, round(decay * steps))
        setting = replace(setting, warmup=max(1, min(setting.warmup, steps // 10)))
        return cls(word, shape, setting, max(1, steps - short), short)

    @property
    def trunk(self) -> Stage:
        return trunk_stage(f"{self.word}-trunk-s{self.setting.seed}", self.shape, self.setting, self.at, [self.at])

    def branch(self, name: str, mixture: Mixture | None = None) -> Stage:
        """A decay from the trunk's end, on its own data or on a mixture."""
        word = f"{self.word}-{name}-s{self.setting.seed}"
        return decay_stage(self.trunk, word, self.setting, at=self.at, steps=self.decay, mixture=mixture)

    def whole(self, name: str, mixture: Mixture) -> Stage:
        """A run of its own with one mixture from warmup to the end of the decay; it leaves no checkpoint."""
        setting, word = replace(self.setting, mixture=mixture), f"{self.word}-{name}-s{self.setting.seed}"
        return trial_stage(word, self.shape, setting, self.at + self.decay, self.decay)
