"""The batch of a stage as a function of the step: one number, or one that changes at given steps. Needs no torch.

Sequences are consumed in order whatever the batch, so that a change keeps the stream of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from windtunnel.base.errors import RecipeError

Changes = tuple[tuple[int, int], ...]
"""(step, batch): updates after that step have that batch."""


@dataclass(frozen=True)
class Batches:
    """Sequences in each step: ``first`` up to the first change, then what each change says.

    Raises:
        RecipeError: changes do not rise from step 1, or a batch is not positive.
    """

    first: int
    changes: Changes = ()

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        if steps and (steps[0] < 1 or any(b <= a for a, b in pairwise(steps))):
            raise RecipeError("batch_schedule", f"expected changes at rising steps from 1, got {steps}")
        if any(batch < 1 for batch in (self.first, *(batch for _, batch in self.changes))):
            raise RecipeError("batch_schedule", "expected batches of one sequence or more, got less")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Batches:
        """From a stage as it is stored."""
        return cls(int(config["batch"]), tuple((int(s), int(b)) for s, b in config.get("batch_changes", ())))

    def at(self, step: int) -> int:
        """Sequences of update number ``step``, counted from 1."""
        return next((batch for after, batch in reversed(self.changes) if after < step), self.first)

    def sequences(self, step: int) -> int:
        """Sequences consumed by the updates 1 … ``step``."""
        total, begun, batch = 0, 0, self.first
        for after, next_batch in self.changes:
            if after >= step:
                break
            total, begun, batch = total + (after - begun) * batch, after, next_batch
        return total + (step - begun) * batch

    def steps(self, sequences: float) -> int:
        """The number of updates whose sequences come nearest to these, at least one."""
        for after, batch in reversed(self.changes):
            done = self.sequences(after)
            if done < sequences:
                return max(after, after + round((sequences - done) / batch))
        return max(1, round(sequences / self.first))

    def then(self, sequences: float, batch: int) -> Batches:
        """The same with another batch after this many sequences."""
        return Batches(self.first, (*self.changes, (self.steps(sequences), batch)))

    def until(self, step: int) -> Changes:
        """The changes before a step: those that a branch from there has met."""
        return tuple(change for change in self.changes if change[0] < step)
