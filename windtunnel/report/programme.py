"""What a lab book tells about the trained models of a program: the tree, the branches' losses, samples, cost, provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.model.shape import Shape
from windtunnel.report.curves import Limb
from windtunnel.report.story import losses, without_paths
from windtunnel.train.batches import Batches

Row = dict[str, Any]


def target_runs(book: LabBook, program: str) -> list[Row]:
    """The newest trunk of the target and everything grown from it, parents before children."""
    runs = [run for run in book.runs(program=program, study="") if run["kind"] != "trial"]
    trunks = [run for run in runs if run["kind"] == "trunk"]
    if not trunks:
        return []
    tree = [trunks[-1]]
    for limb in tree:  # the list grows while it is walked
        tree.extend(run for run in runs if run["parent"] == limb["id"])
    return tree


def tokens_at(run: Row, step: int) -> int:
    """Tokens that a run has consumed after a step, counted as its steps are."""
    return Batches.of(run["config"]).sequences(step) * int(run["config"]["plan"]["row"])


def _read_at(before: float, run: Row, step: int) -> float:
    """Tokens that a run's model has read at a step; ``before`` are those that the run's own steps do not count."""
    return before + tokens_at(run, step)


def _fresh(run: Row) -> bool:
    """Whether a run began with its parent's weights alone, counting steps from 0."""
    return bool((run["config"].get("start") or {}).get("fresh"))


def first_step(run: Row) -> int:
    """The step at which a run began."""
    return 0 if _fresh(run) else int((run["config"].get("start") or {}).get("step", 0))


def read_limbs(book: LabBook, runs: list[Row]) -> list[Limb]:
    """Curves of the tree over the tokens that a model has read in all."""
    numbers = {run["id"]: i for i, run in enumerate(runs)}
    limbs: list[Limb] = []
    begins: dict[str, Callable[[int], float]] = {}
    for run in runs:
        parent = numbers.get(run["parent"])
        # Steps of another size, or counted from 0, go on from what the parent's model had read.
        first = first_step(run)
        start = (
            limbs[parent].end
            if parent is not None and _fresh(run)
            else begins.get(run["parent"], partial(tokens_at, run))(first)
        )
        before = start - tokens_at(run, first)
        begins[run["id"]] = partial(_read_at, before, run)
        curves = {}
        for name in ("loss", "learning_rate"):
            steps, values = book.metrics(run["id"], name)
            curves[name] = tuple((_read_at(before, run, s), v) for s, v in zip(steps, values, strict=True) if v == v)
        own = own_tokens(run) if run["tokens"] else 0
        end = start + own if own else max([start, *(d for d, _ in curves["loss"])])
        note = f"{si(end)} tokens" + ("" if run["status"] == "done" else f", {run['status']}")
        limbs.append(Limb(str(run["name"]), note, start, float(end), curves["loss"], curves["learning_rate"], parent))
    return limbs


@dataclass(frozen=True)
class Finished:
    """One run of the tree in words."""

    name: str
    parent: str
    depth: int
    status: str
    what: str
    """Steps, tokens and schedule."""
    seconds: float | None
    reason: str


def read_tree(runs: list[Row]) -> list[Finished]:
    """The tree as rows for a nested list."""
    depth: dict[str, int] = {}
    out = []
    for run in runs:
        depth[run["id"]] = depth.get(run["parent"], -1) + 1
        config = run["config"]
        start = None if _fresh(run) else (config.get("start") or {}).get("step")
        since = "since its fresh start" if _fresh(run) else "read in all"
        words = [_schedule(config)]
        if not config.get("average"):  # a mean of weights takes no step and reads nothing
            tokens = f"{si(run['tokens'])} tokens {since}" if run["tokens"] else "tokens not yet counted"
            words = [f"steps {(start or 0) + 1:,} – {config['steps']:,}", tokens, *words]
        out.append(Finished(
            str(run["name"]), str(run["parent"]), depth[run["id"]], str(run["status"]), "; ".join(words), run["seconds"],
            without_paths(str(run["reason"] or "")),
        ))  # fmt: skip
    return out


def _schedule(config: Row) -> str:
    if config.get("average"):
        return f"the mean of the weights of {len(config['average'])} checkpoints"
    rate, schedule = config["optimizer"]["learning_rate"], config["schedule"]
    if not schedule.get("decay_steps"):
        return f"constant learning rate {rate:g} after {schedule.get('warmup', 0)} warmup steps"
    return f"{schedule['form']} decay of the learning rate from {rate:g} to {rate * schedule['floor']:.3g}"


@dataclass(frozen=True)
class Decay:
    """Held-out losses of the branches and their change against the branch on the trunk's own data."""

    branches: tuple[str, ...]
    reference: str | None
    corpora: tuple[str, ...]
    loss: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float]]
    others: tuple[str, ...]

    def share(self, branch: str, corpus: str) -> str:
        """The share of a corpus in what a branch read during its decay."""
        value = self.shares.get(branch, {}).get(corpus, 0.0)
        return f"{100 * value:.0f} %"

    def change(self, branch: str, corpus: str) -> float | None:
        """Relative change of loss in percent, or None."""
        new = self.loss.get(branch, {}).get(corpus)
        old = self.loss.get(self.reference or "", {}).get(corpus)
        return 100 * (new / old - 1) if new is not None and old else None


def read_decay(book: LabBook, runs: list[Row]) -> Decay | None:
    """The finished decays side by side, or None without any score."""
    trunk = runs[0] if runs else None
    done = [run for run in runs if run["kind"] == "decay" and run["status"] == "done"]
    loss = {str(run["name"]): losses(book, run["id"]) for run in done}
    loss = {name: found for name, found in loss.items() if found}
    if not loss or trunk is None:
        return None
    shares = {str(run["name"]): _last_mixture(run) for run in done}
    same = [str(r["name"]) for r in done if r["config"]["plan"]["segments"] == trunk["config"]["plan"]["segments"]]
    reference = next((name for name in same if name in loss), None)
    corpora = sorted({corpus for found in loss.values() for corpus in found})
    fair = {name for name in loss if reference and _comparable(done, name, reference)}
    others = tuple(name for name in loss if name != reference and name in fair)
    return Decay(tuple(loss), reference, tuple(corpora), loss, shares, others)


def _comparable(done: list[Row], name: str, reference: str) -> bool:
    """Whether two branches differ in their data only."""
    one, two = (next(r["config"] for r in done if r["name"] == n) for n in (name, reference))
    return all(one.get(key) == two.get(key) for key in ("start", "steps", "schedule", "optimizer", "batch", "seed"))


def _last_mixture(run: Row) -> dict[str, float]:
    mixture = dict(run["config"]["plan"]["segments"][-1]["mixture"])
    return {name: weight / sum(mixture.values()) for name, weight in mixture.items()}


_OTHER_STEPS = ("moe", "long")
"""Kinds of branch whose steps may have another number of tokens than those of the stage from which they count on."""


def own_tokens(run: Row) -> int:
    """Tokens that a run itself read, without those of its parent."""
    before = tokens_at(run, first_step(run))
    if run["kind"] in _OTHER_STEPS:
        return tokens_at(run, int(run["config"]["steps"])) - before if run["status"] == "done" else 0
    return int(run["tokens"] or 0) - before


def shape_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The target's shape as (what, value) pairs."""
    shape = Shape(**config["shape"])
    step = int(config["batch"]) * int(config["plan"]["row"])
    heads = f"{shape.heads}" if shape.heads == shape.kv_heads else f"{shape.heads} query, {shape.kv_heads} key-value"
    return [
        ("parameters", f"{si(shape.body)} body + {si(shape.embedding)} table of tokens = {si(shape.total)}"),
        ("layers × width", f"{shape.layers} × {shape.width}"),
        ("attention heads", f"{heads}, {shape.head_dim} wide"),
        ("inner width", f"{shape.ff}"),
        ("vocabulary", f"{shape.vocab:,} tokens"),
        ("batch", f"{step:,} tokens a step, rows of {config['plan']['row']}"),
        ("seed", f"{config['seed']}"),
    ]
