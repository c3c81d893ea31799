"""The ledger: what studies and the target cost in runs, tokens, FLOPs, seconds, and as a share of the target run. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import duration, si
from windtunnel.report.programme import Row, own_tokens
from windtunnel.train.stage import Stage

Fact = dict[str, Any]
COST = "cost"
"""Kind of the facts that say what was spent outside of any run."""
COORDINATES = "coordinates"
_SUMS = ("runs", "failed", "tokens", "flops", "seconds")


def target_flops(book: LabBook, program: str) -> float | None:
    """FLOPs of the target's trunk and branches as they were last planned, trained or not; None where nobody has planned."""
    fact = book.fact(program, "target", "cost")
    return float(fact["flops"]) if fact and fact["flops"] else None


def cost_of(stages: Iterable[Stage], results: Mapping[str, Fact], target: float | None) -> Fact:
    """What the runs of one study cost.

    Args:
        stages: with a result each.
        results: by stage key, as ``Desk.train`` returns them.
        target: FLOPs of the target run, see ``target_flops``.
    """
    ended = [(stage, results[stage.key]) for stage in {stage.key: stage for stage in stages}.values()]
    done = [stage for stage, result in ended if "failed" not in result]
    return {
        "runs": len(ended), "failed": len(ended) - len(done), "tokens": sum(stage.own_tokens for stage in done),
        "flops": sum(stage.flops for stage in done),
        "seconds": sum(sum(result.get("seconds", {}).values()) for _, result in ended), "target": target,
    }  # fmt: skip


def cost_of_rows(rows: Iterable[Row], target: float | None = None) -> Fact:
    """The same from rows of the lab book."""
    rows = list(rows)
    own = [row for row in rows if row["flops"] is not None]
    return {
        "runs": len(rows), "failed": sum(row["status"] == "failed" for row in rows), "tokens": sum(map(own_tokens, own)),
        "flops": sum(row["flops"] for row in own), "seconds": sum(row["seconds"] or 0.0 for row in rows), "target": target,
    }  # fmt: skip


def cost_of_studies(book: LabBook, program: str, studies: Iterable[str]) -> Fact:
    """Everything that was ever spent on some studies of a program; repeated and abandoned runs are included."""
    rows = (row for study in studies for row in book.runs(program=program, study=study))
    return cost_of_rows(rows, target_flops(book, program))


def together(costs: Iterable[Mapping[str, Any]]) -> Fact:
    """Several costs as one; a sum that one of them does not know is left out."""
    costs = list(costs)
    sums = {name: sum(cost[name] for cost in costs) for name in _SUMS if all(name in cost for cost in costs)}
    return {**sums, "target": next((t for cost in costs if (t := cost.get("target"))), None)}


def runs_of(cost: Mapping[str, Any]) -> int:
    """How many runs there were; earlier versions called them trials."""
    return cost["runs"] if "runs" in cost else cost["trials"]


def cost_line(cost: Mapping[str, Any]) -> str:
    """A cost in one line for every table and page. What an earlier version did not record is left out."""
    failed = f" ({cost['failed']} diverged or failed)" if cost.get("failed") else ""
    said = [f"{runs_of(cost)} run{'s' if runs_of(cost) != 1 else ''}{failed}"]
    if "tokens" in cost:
        said.append(f"{si(cost['tokens'])} tokens")
    if "flops" in cost:
        said.append(f"{si(cost['flops'])} FLOPs")
    said.append(f"{duration(cost['seconds'])} of training")
    if cost.get("target") and "flops" in cost:
        said.append(f"{100 * cost['flops'] / cost['target']:.3g} % of the target run")
    return ", ".join(said)


@dataclass(frozen=True)
class Part:
    """One part of the program with what it cost."""

    name: str
    runs: int
    failed: int
    tokens: int
    flops: float
    seconds: float
    tunnel: bool = False


@dataclass(frozen=True)
class Cost:
    """What everything cost: by part, in all, and on the clock; ``target`` is the FLOPs of the target's trunk and branches."""

    parts: tuple[Part, ...]
    sessions: int
    wall: float | None
    machine: str
    target: float | None = None

    def share(self, part: Part) -> float | None:
        """A part's FLOPs over those of the target run; None where that is not known."""
        return part.flops / self.target if self.target else None

    @property
    def tunnel(self) -> Part | None:
        """All studies on small models together."""
        parts = [part for part in self.parts if part.tunnel]
        if not parts:
            return None
        sums = (sum(getattr(p, name) for p in parts) for name in _SUMS)
        return Part("the tunnel in all", *sums, tunnel=True)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tunnel_share(self) -> float | None:
        """FLOPs of the tunnel over those of everything."""
        tunnel = sum(p.flops for p in self.parts if p.tunnel)
        return tunnel / self.flops if 0 < tunnel < self.flops else None


_STUDIES = {
    "search": "Search on the smallest model",
    "check": "Check on a wider model",
    "scaling": "Proxies for the law",
    "transfer": "Transfer study",
    "batch": "Batch study",
    COORDINATES: "Coordinate check",
    "decay-data": "What corpora are worth in the decay",
    "mixture": "Mixture study",
    "upcycling": "Experts beside a dense continuation",
    "adapt": "Short branches of the adaptation",
    "replicate": "The paper's claims",
}
_NAMES = {**_STUDIES, "trunk": "Trunk", "": "Branches"}


def read_cost(book: LabBook, program: str) -> Cost | None:
    """Seconds of training processes, FLOPs and tokens by part of the program; repeated and abandoned runs are included."""
    groups: dict[str, list[Row]] = {}
    for run in book.runs(program=program):
        part = "trunk" if run["study"] == "" and run["kind"] == "trunk" else run["study"]
        groups.setdefault(part, []).append(run)
    costs = {part: cost_of_rows(rows) for part, rows in groups.items()} | book.facts(program, COST)
    if not costs:
        return None
    parts = [
        Part(_NAMES.get(key, key), **{name: costs[key][name] for name in _SUMS}, tunnel=key not in ("trunk", ""))
        for key in [*_NAMES, *(k for k in costs if k not in _NAMES)]
        if key in costs
    ]
    sessions = [float(one["seconds"]) for one in book.facts(program, "session").values()]
    wall = sum(sessions) if sessions else None
    return Cost(
        tuple(parts),
        len(sessions),
        wall,
        _price(book.fact(program, "recipe", "resolved") or {}, wall),
        target_flops(book, program),
    )


def _price(recipe: Mapping[str, Any], wall: float | None) -> str:
    """Money and energy where the recipe states price or power and the sessions are known; otherwise nothing."""
    machine = recipe.get("machine") or {}
    if wall is None or not machine:
        return ""
    hours = wall / 3600 * machine.get("count", 1)
    said = [f"{hours:.3g} device-hours"]
    if machine.get("price") is not None:
        said.append(f"{hours * machine['price']:.2f} {machine.get('currency', '')}".strip())
    if machine.get("watts") is not None:
        said.append(f"{hours * machine['watts'] / 1000:.3g} kWh")
    return ", ".join(said)
