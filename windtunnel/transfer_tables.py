"""What ``windtunnel tunnel transfer`` prints: a table and a verdict for each axis. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.console import RenderableType

from windtunnel.base.units import si
from windtunnel.report.cost import cost_line
from windtunnel.views import line, table

WORDS = {"learning_rate": "base rate", "weight_decay": "weight decay"}
"""What is looked for, in the words of tables and verdicts."""

_EDGES = {"low": "low edge", "high": "high edge", "none": "none is as good"}


def transfer_parts(program: str, found: Mapping[str, dict[str, Any]]) -> Iterable[RenderableType]:
    """Tables and verdicts of the axes that were studied, and what that cost."""
    for axis, fact in found.items():
        rows = []
        for name, part in fact["parametrizations"].items():
            for value in part["values"]:
                valleys = value.get("valleys", [])
                best = float(np.exp(np.mean(np.log([v["rate"] for v in valleys])))) if valleys else float("nan")
                loss = float(np.mean([v["loss"] for v in valleys])) if valleys else float("nan")
                span = " – ".join(f"{pick(v['rate'] for v in valleys):.4g}" for pick in (min, max)) if valleys else ""
                edge = ", ".join(dict.fromkeys(_EDGES[v["edge"]] for v in valleys if v["edge"]))
                rows.append((name, value["label"], si(value["parameters"]), f"{best:.4g}", span, f"{loss:.4f}", edge))
        columns = ("parametrization", axis, "N", f"best {WORDS[fact['over']]}", "over seeds", "nats per byte", "")
        yield table(columns, rows, title=f"{axis}: {fact['rule']}", right=(2, 3, 5))
        for name, part in fact["parametrizations"].items():
            yield line(f"{axis}, {name}: {sentence(part)}", "bold")
            yield from (line(f"  {note}", "yellow") for note in part["notes"])
        rules = [(n, r["name"], r["exponent"], r["regret_share"], r["source"]) for n, p in fact["parametrizations"].items()
                 for r in p.get("rules", ())]  # fmt: skip
        if rules:
            shown = [(n, rule, f"factor^{e:.2g}", f"{_shown(cost, 100, 2)} %", by) for n, rule, e, cost, by in rules]
            yield table(("parametrization", "rule", "weight decay", "costs at the target", "source"), shown)
    cost = next(iter(found.values()))["cost"]  # of all axes together
    yield line(f"{cost_line(cost)}; windtunnel report {program} draws the valleys")


def sentence(part: Mapping[str, Any]) -> str:
    """The verdict with its numbers."""
    if "drift" not in part:
        return part["verdict"]
    regret = part["regret_share"]["value"]
    loss = "the proxy's value diverges at the target" if regret is None else (
        f"the proxy's value costs {_shown(part['regret'], 1, 4)} nats per byte, {_shown(part['regret_share'], 100, 2)} %"
    )  # fmt: skip
    compute = part["compute"]
    more = ""
    if compute and compute["value"] is not None:
        more = f", as much as {_shown(compute, 100, 1)} % more training would give back (by {part['slope']['source']})"
    worst = f"; at the worse ends of the intervals: {part['at_worst']}" if part["at_worst"] != part["verdict"] else ""
    alone = "" if part["drift"]["seeds"] > 1 else "; one seed, so without intervals"
    idle = any(v["edge"] == "none" for value in (part["values"][0], part["values"][-1]) for v in value["valleys"])
    drift = "" if idle else f"drift {_shown(part['drift'], 1, 2)} steps of √2, "
    return f"{part['verdict']}: {drift}{loss}{more}{worst}{alone}"


def _shown(estimate: Mapping[str, Any], scale: float, digits: int) -> str:
    value = f"{scale * estimate['value']:.{digits}f}"
    if estimate["low"] is None:
        return value
    return f"{value} [{scale * estimate['low']:.{digits}f}, {scale * estimate['high']:.{digits}f}]"
