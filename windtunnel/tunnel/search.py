"""The search: proposals in rounds, each a pure function of seed, round and earlier results. Needs no torch.

Optuna only proposes. The results lie in our run folders, so a search that was killed asks for the same trials again, finds
most of them done and goes on; its final table equals that of a search that nobody killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.tunnel.propose import Sampler, Trial, propose, propose_apart
from windtunnel.tunnel.space import DEFAULT_SPACE, Axis, Space, Values, edges

__all__ = [
    "AllFailed",
    "OnEdge",
    "SearchResult",
    "Trial",
    "Values",
    "first_round",
    "numbered_points",
    "propose",
    "search",
]
Thing = TypeVar("Thing")
OnEdge = Literal["say", "widen", "refuse"]
_WIDENINGS = 3
Evaluate = Callable[[Sequence[tuple[int, Values]]], Sequence[float | None]]


class AllFailed(WindtunnelError):
    """No trial of a search has a loss."""

    def __init__(self, trials: int, where: str = "tunnel.space", fix: str = "lower its learning rates") -> None:
        self.trials = trials
        super().__init__(f"{where}: expected a trial with a loss, got {trials}, all failed or diverged; {fix}")


@dataclass(frozen=True)
class SearchResult:
    """All trials in order, the best one, the axes on whose edge it lies, and the space as it was in the end.

    ``stopped`` says why the search ended before its last trial, if it did.
    """

    trials: tuple[Trial, ...]
    best: Trial
    edges: tuple[str, ...]
    space: Space = DEFAULT_SPACE
    stopped: str = ""


def first_round(space: Space, per_round: int) -> int:
    """Trials of the first round: two for each axis, but not fewer than in later rounds."""
    return max(per_round, 2 * len(space))


def part_of(text: str) -> tuple[int, int]:
    """``3/28`` as (3, 28).

    Raises:
        UserError: it is no share of a whole.
    """
    number, slash, whole = text.partition("/")
    if slash and number.isdecimal() and whole.isdecimal() and 1 <= int(number) <= int(whole) <= 100_000:
        return int(number), int(whole)
    raise UserError("--part", f"expected a share such as 3/28, got {text[:40]!r}", "parts count from 1")


def share_of(things: Sequence[Thing], part: tuple[int, int]) -> list[Thing]:
    """Every n-th thing, so that neighbours, which cost alike, go to different parts."""
    return list(things[part[0] - 1 :: part[1]])


@dataclass
class _Run:
    """One search in progress."""

    seed: int
    evaluate: Evaluate
    per_round: int
    first: Values | None
    sampler: Sampler
    revise: Callable[[Trial], Trial]
    enough: Callable[[Space, Sequence[Trial]], str]

    def until(self, space: Space, trials: int, done: list[Trial]) -> str:
        """Adds rounds up to a number of trials; returns why it stopped before, or an empty string."""
        while len(done) < trials:
            whole = trials if self.sampler == "grid" else self.per_round if done else first_round(space, self.per_round)
            number = min(whole, trials - len(done))
            opening = [self.first] if self.first and not done else []
            points = opening + propose_apart(space, done, number - len(opening), self.seed, self.sampler)
            numbered = [(len(done) + i, values) for i, values in enumerate(points)]
            losses = self.evaluate(numbered)
            done += [Trial(i, values, loss) for (i, values), loss in zip(numbered, losses, strict=True)]
            done[:] = [self.revise(trial) for trial in done]
            if len(done) < trials and number == whole and (reason := self.enough(space, done)):
                return reason
        return ""


def search(
    space: Space, trials: int, seed: int, evaluate: Evaluate, *, per_round: int = 4, first: Values | None = None,
    sampler: Sampler = "tpe", on_edge: OnEdge = "say", revise: Callable[[Trial], Trial] = lambda trial: trial,
    enough: Callable[[Space, Sequence[Trial]], str] = lambda space, done: "",
) -> SearchResult:  # fmt: skip
    """Runs a search. A longer one with the same arguments begins with the same trials.

    Args:
        evaluate: trains the given (number, values) pairs and returns their losses, None for a diverged trial.
        per_round: trials of a round; it does not follow the number of workers, so the search is the same on any machine.
        first: a point that opens the first round, the defaults for example. A grid, which is one round, has its own points.
        on_edge: a best value on the edge of the space is only named ("say"), or the axis is made half as long again on that
            side, up to three times, with a quarter more trials each time ("widen"), or it is an error ("refuse").
        revise: a trial as it stands after each round: a pruner may have taken an earlier one further.
        enough: asked after each round; a reason ends the search.

    Raises:
        AllFailed: every trial failed or diverged.
        UserError: the best value lies on the edge and ``on_edge`` is "refuse"; the trials are kept.
    """
    run = _Run(seed, evaluate, per_round, None if sampler == "grid" else first, sampler, revise, enough)
    done: list[Trial] = []
    stopped = run.until(space, trials, done)
    best = best_of(done)
    more = max(per_round, trials // 4)
    for _ in range(_WIDENINGS if on_edge == "widen" else 0):
        wider = widened(space, edges(space, best.values))
        if wider == space:
            break
        space = wider
        stopped = run.until(space, len(done) + more, done)
        best = best_of(done)
    found = edges(space, best.values)
    if found and on_edge == "refuse":
        name, side = next(iter(found.items()))
        axis = next(a for a in space if isinstance(a, Axis) and a.name == name)
        raise UserError(
            f"tunnel.space.{name}",
            f"expected the best value inside the range, got {best.values[name]:.4g} at the {side} end of "
            f"[{axis.low:g}, {axis.high:g}]",
            'widen the range, or write on_edge = "say" or "widen"; the trials are kept',
        )
    return SearchResult(tuple(done), best, tuple(f"{name} ({side})" for name, side in found.items()), space, stopped)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest loss, of equals the first.

    Raises:
        AllFailed: no trial has a finite loss.
    """
    finite = [(t.loss, t.number, t) for t in trials if t.loss is not None and math.isfinite(t.loss)]
    if not finite:
        raise AllFailed(len(trials))
    return min(finite, key=lambda one: one[:2])[2]


def widened(space: Space, sides: dict[str, str]) -> Space:
    """The space with the named axes longer on the named side."""
    return tuple(a.wider(sides[a.name]) if isinstance(a, Axis) and a.name in sides else a for a in space)


def numbered_points(
    space: Space, trials: int, seed: int, sampler: Sampler, per_round: int = 4, first: Values | None = None
) -> list[tuple[int, Values]]:
    """All points of a search whose sampler does not look at results, in order: what its parts share among themselves."""
    points: list[tuple[int, Values]] = []

    def blind(numbered: Sequence[tuple[int, Values]]) -> list[float | None]:
        points.extend(numbered)
        return [0.0] * len(numbered)

    search(space, trials, seed, blind, per_round=per_round, first=first, sampler=sampler)
    return [(number, dict(values)) for number, values in points]
