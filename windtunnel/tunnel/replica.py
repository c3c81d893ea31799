"""The runs of a replication: sizes by name and the stages of the paper's sections 3 to 5. Needs no torch; the driver trains.

The paper counts tokens in N (20N to 80N for its 0.036B model). ``Scale.unit`` says how many N stand for its 20N here, so that
the same experiments fit a laptop; every length below is in the paper's numbers. Whole lengths include the decay:
WSD(40N) is 36N of stable rate and 4N of decay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from windtunnel.base.errors import UserError
from windtunnel.laws.design import DecayRule
from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Mixture, Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Stage, Start

PERIODS = (20, 40, 60, 80)
"""Ends S and periods T of figure 4, in the paper's N."""
SHARES = (0.025, 0.05, 0.1, 0.2, 0.3)
"""Shares of all tokens that a decay takes; the paper compares the first with the third."""
SHARE_LENGTHS = (40, 80)
AXIS = (10, 20, 30, 40, 50, 60, 70, 80)
"""Whole lengths of the runs on the data axis."""
TENTH = 0.1
_WARMUP = 0.01
_LONGEST = 80


@dataclass(frozen=True)
class Scale:
    """How large a replication is: sizes of a family, N that stand for the paper's 20N, tokens in a step, usual seeds."""

    name: str
    about: str
    family: str
    ladder: tuple[str, ...]
    model: str
    larger: str
    unit: float
    batch: int
    seeds: int


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", "minutes", "tiny", ("0.02M", "0.05M"), "0.02M", "0.05M", 5, 1024, 3),
        Scale("small", "about an hour on 2 cores", "tiny", ("0.02M", "0.05M", "0.1M"), "0.05M", "0.2M", 20, 2048, 3),
        Scale("medium", "a night on 2 cores", "tiny", ("0.02M", "0.05M", "0.1M", "0.3M"), "0.1M", "0.6M", 20, 4096, 3),
        Scale("paper", "the paper's sizes, for GPUs", "minicpm", ("9M", "30M", "70M", "0.1B"), "30M", "0.17B", 20, 524288, 3),
    )
}  # fmt: skip


def scale_of(name: str) -> Scale:
    """The scale of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCALES:
        raise UserError("--size", f"expected one of {', '.join(SCALES)}, got {name[:40]!r}")
    return SCALES[name]


@dataclass(frozen=True)
class Model:
    """One size at one seed and base learning rate: builds the stages of its runs. Lengths are in the paper's N."""

    shape: Shape
    setting: Setting
    unit: float
    name: str

    def steps(self, length: float) -> int:
        """Steps of a length."""
        return max(1, round(length / 20 * self.unit * self.shape.body / self.setting.step_tokens))

    @property
    def warm(self) -> Setting:
        """The setting with the one warmup of all runs: a hundredth of the longest."""
        return replace(self.setting, warmup=max(2, round(_WARMUP * self.steps(_LONGEST))))

    def split(self, length: float, share: float = TENTH) -> tuple[int, int]:
        """Stable and decay steps of a whole length."""
        whole = self.steps(length)
        decay = max(1, round(share * whole))
        return whole - decay, decay

    def scored(self, stage: Stage, name: str) -> Stage:
        """A stage that ends at its last step with a score and a checkpoint to go on from."""
        return replace(
            stage, name=name, kind="trial", open_ended=False, keep=(), save_every=None, score=self.setting.score,
            score_tokens=self.setting.score_tokens,
        )  # fmt: skip

    def cosine(self, period: float, ends: tuple[int, ...] = PERIODS, *, loop: bool = False) -> list[Stage]:
        """One run under a cosine of that period, cut into stages that end, and are scored, at each of the lengths."""
        schedule = Schedule(
            warmup=self.warm.warmup, decay_steps=self.steps(period), kind="cosine-loop" if loop else "cosine"
        )
        word = f"{'loop' if loop else 'cosine'}-{period:g}N"
        out: list[Stage] = []
        for end in ends:
            stage = replace(trunk_stage("x", self.shape, self.warm, self.steps(end)), schedule=schedule)
            stage = self.scored(stage, f"{self.name}-{word}-at-{end:g}N")
            out.append(replace(stage, start=Start(out[-1].key, out[-1].steps) if out else None))
        return out

    def trunk(self, upto: float) -> Stage:
        """The stable run as far as the longest length needs it, with a checkpoint wherever some decay begins."""
        points = {self.split(length)[0] for length in AXIS if length <= upto}
        points |= {self.split(length, share)[0] for length in SHARE_LENGTHS if length <= upto for share in SHARES}
        return trunk_stage(f"{self.name}-trunk", self.shape, self.warm, max(points), points)

    def decay(self, trunk: Stage, length: float, share: float = TENTH, mixture: Mixture | None = None) -> Stage:
        """WSD of a whole length: the trunk's decay, exponential to a tenth, over the last share of it."""
        at, steps = self.split(length, share)
        word = "" if mixture is None else "-better"
        name = f"{self.name}-wsd-{length:g}N-{100 * share:g}%{word}".replace("%", "pc").replace(".", "_")
        return decay_stage(trunk, name, self.warm, at=at, steps=steps, mixture=mixture)

    def onward(self, trunk: Stage, length: float) -> Stage:
        """The stable rate kept to the end of a length, from where a tenth's decay would begin, and scored there."""
        at, steps = self.split(length)
        stage = replace(trunk, steps=at + steps, start=Start(trunk.key, at))
        return replace(self.scored(stage, f"{self.name}-stable-{length:g}N"), save_final=False)

    def whole(self, kind: str, length: float, rule: DecayRule | None = None) -> Stage:
        """A run of its own from warmup to end: ``wsd``, ``cosine``, or a decay of another name by a rule. No checkpoint."""
        at, decay = self.split(length)
        schedule = Schedule(warmup=self.warm.warmup, stable_end=at, decay_steps=decay)
        if kind == "cosine":
            schedule = Schedule(warmup=self.warm.warmup, decay_steps=at + decay, kind="cosine")
        if rule is not None:
            schedule = rule.schedule(at + decay, self.warm.warmup)
        stage = replace(trunk_stage("x", self.shape, self.warm, at + decay), schedule=schedule)
        return replace(self.scored(stage, f"{self.name}-{kind}-{length:g}N"), save_final=False)
