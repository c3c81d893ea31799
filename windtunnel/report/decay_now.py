"""What a trunk would give if it decayed now, in terminal and report: by the law, and by the mean of its last checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from windtunnel.base.units import minus
from windtunnel.laws.now import DecayNow

NOW_COLUMNS = ("what", "gives", "after", "change")


@dataclass(frozen=True)
class Now:
    """What law and averaged checkpoints say about one trunk; either may have nothing to say."""

    trunk: str
    law: DecayNow | None
    averaged: Mapping[str, Any] | None
    bytes_per_token: float | None = None
    """Of the trunk's text, so that the law's nats per token can be compared with bits per byte."""
    why: str = ""
    """Why the law says nothing."""

    def __bool__(self) -> bool:
        return self.law is not None or self.averaged is not None

    def rows(self) -> list[tuple[str, ...]]:
        """What is done, what it gives, the loss before it, and the change."""
        rows: list[tuple[str, ...]] = []
        if (law := self.law) is not None:
            rows.append((
                f"decayed now (step {law.step:,}, {law.rule.form} over {law.decay:,} steps)",
                f"training loss {law.expected:.3f} [{law.low90:.3f}, {law.high90:.3f}] nats per token{self._in_bits()}",
                f"{law.loss:.3f}", _percent(law.drop),
            ))  # fmt: skip
        if (found := self.averaged) is not None:
            count = found["best"]
            rows.append((
                f"mean of its last {count} checkpoints (up to step {found['step']:,}), without further training",
                f"{found['averages'][str(count)]:.4f} bits per byte", f"{found['newest']:.4f}",
                _percent(found["drop"]),
            ))  # fmt: skip
        return rows

    def bits(self) -> dict[str, Any] | None:
        """The law's losses in bits per byte, as the mean of checkpoints is given; None where the text is not known."""
        if self.law is None or not self.bytes_per_token:
            return None
        unit = math.log(2) * self.bytes_per_token
        value, *limits, before = (v / unit for v in (self.law.expected, self.law.low90, self.law.high90, self.law.loss))
        return {"expected": value, "interval90": limits, "loss": before}

    def _in_bits(self) -> str:
        found = self.bits()
        if found is None:
            return ""
        low, high = found["interval90"]
        return f", {found['expected']:.4f} [{low:.4f}, {high:.4f}] bits per byte (now {found['loss']:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        law = self.law and {**self.law.to_dict(), "bits_per_byte": self.bits()}
        return {"law": law, "averaged": self.averaged, "why": self.why}

    def notes(self) -> list[str]:
        """What limits the law's answer."""
        return [f"note: {note}" for note in self.law.notes] if self.law is not None else []

    def lines(self) -> list[str]:
        """The lines that ``status`` shows under a trunk: the rows as sentences."""
        said = [f"  {what}: {gives} after {before}, {change}" for what, gives, before, change in self.rows()]
        beneath = [f"    {note}" for note in self.notes()]
        silent = [f"  decayed now: nothing can be said, {self.why}"] if self.why else []
        return [*said[:1], *beneath, *said[1:]] if self.law is not None else [*silent, *said]


def _percent(share: float) -> str:
    return minus(f"{100 * share:+.1f} %")
