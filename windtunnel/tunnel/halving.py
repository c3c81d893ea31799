"""Early stopping that knows WSD: trials are judged after a short decay from their trunk, never at the plateau. Needs no torch.

Every trial is a trunk at stable learning rate. On each rung a branch decays from its checkpoint and is scored; only some trunks
go on to the next rung. What is judged is therefore a finished, shorter model: at the plateau a high learning rate looks worse
than it is (arXiv 2404.06395, section 4). On recorded trials of 0.02M that made no difference, the rule of promotion does
(``bench/search.py pruning``). The trunk is shared by the rungs of one trial; the decays are the price, and are counted.

Who goes on is asked after each round of trials, of all that were judged on a rung, however early (``promotion.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from windtunnel.tunnel.promotion import ByRank, Promotion, Rung

RUNGS = (1 / 16, 1 / 4, 1.0)
"""Lengths of the judged models as shares of a whole trial."""


def rungs_of(steps: int, decay_share: float, warmup: int, shares: Sequence[float] = RUNGS) -> tuple[Rung, ...]:
    """The rungs of a trial of ``steps``: each a whole smaller trial, its warmup behind it, shortest first."""
    rungs: dict[int, Rung] = {}
    for share in shares:
        whole = steps if share == 1 else max(4, round(share * steps))
        while share != 1 and whole - max(2, round(decay_share * whole)) <= warmup:
            whole += 1
        decay = max(2, round(decay_share * whole))
        if whole < steps or share == 1:
            rungs[whole - decay] = Rung(whole - decay, decay)
    return tuple(rungs[trunk] for trunk in sorted(rungs))


@dataclass
class Ladder:
    """Which trials stand on which rung, and what they lost there.

    ``judged`` holds for each rung the losses by trial number; None for one that diverged, which never goes on.
    """

    rungs: tuple[Rung, ...]
    rule: Promotion = field(default_factory=ByRank)
    judged: list[dict[int, float | None]] = field(default_factory=list[dict[int, float | None]])

    def __post_init__(self) -> None:
        self.judged = self.judged or [{} for _ in self.rungs]

    def climb(self, new: Sequence[int], judge: Callable[[int, Sequence[int]], Mapping[int, float | None]]) -> None:
        """Judges new trials on the first rung and lets those that the rule chooses among all climb as far as they may."""
        if new:
            self.judged[0].update(judge(0, new))
        for rung in range(len(self.rungs) - 1):
            if numbers := self.rule.promoted(self.judged, rung):
                self.judged[rung + 1].update(judge(rung + 1, numbers))

    def finished(self, number: int) -> float | None:
        """The loss of a trial that reached the last rung, else None."""
        return self.judged[-1].get(number)

    def guess(self, number: int) -> float | None:
        """What a trial that was given up would probably have reached."""
        return self.rule.guess(self.judged, number)

    def steps_spent(self, *, decays: bool = True) -> int:
        """Steps that all trials took: each trunk once up to its last rung, and a decay on every rung."""
        spent = 0
        for rung, judged in enumerate(self.judged):
            before = self.rungs[rung - 1].trunk if rung else 0
            last = rung == len(self.rungs) - 1
            decay = self.rungs[rung].decay if decays or last else 0
            spent += len(judged) * (self.rungs[rung].trunk - before + decay)
        return spent


@dataclass(frozen=True)
class Replay:
    """What a pruner would have done with recorded trials: the trial it ends with, and the share of all tokens it used."""

    kept: int
    share: float
    finished: int


def replay(
    table: Sequence[Sequence[float]], order: Sequence[int], rungs: tuple[Rung, ...], *, per_round: int = 4,
    rule: Promotion | None = None, plateau: Sequence[Sequence[float]] | None = None,
) -> Replay:  # fmt: skip
    """Runs the pruner on recorded trials.

    Args:
        table: for each trial its loss after the decay on each rung.
        order: the order in which the trials come.
        rule: who goes on; without it, the best quarter.
        plateau: the losses at the plateau instead; then no decay is spent except on the last rung. With the best quarter this
            is plain asynchronous halving.
    """
    ladder = Ladder(rungs, rule or ByRank())
    last = len(rungs) - 1

    def judge(rung: int, numbers: Sequence[int]) -> dict[int, float | None]:
        source = table if plateau is None or rung == last else plateau
        return {number: float(source[number][rung]) for number in numbers}

    for first in range(0, len(order), per_round):
        ladder.climb(list(order[first : first + per_round]), judge)
    ends = [(loss, number) for number, loss in ladder.judged[-1].items() if loss is not None]
    whole = len(order) * (rungs[-1].trunk + rungs[-1].decay)
    return Replay(min(ends)[1], ladder.steps_spent(decays=plateau is None) / whole, len(ends))
