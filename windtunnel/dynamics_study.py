"""``windtunnel law dynamics``: a watched second pass over a run's last steps, or what a probe recorded while it trained.

With a figure of either. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import RenderableType

from windtunnel.base.artefact import content_hash, read_json, write_bytes, write_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.comparison import find_run
from windtunnel.home import Home
from windtunnel.pipeline import finishing
from windtunnel.pretrain.branch import whole_run
from windtunnel.report.dynamics import MEASURES, dynamics_figure, level_cells, moves_by_kind, phase_columns, phase_rows
from windtunnel.train.folder import RESULT, STAGE, checkpoint_path, steps_saved
from windtunnel.train.metrics import MOVE
from windtunnel.train.stage import Stage, Start
from windtunnel.views import View, line, table

_UNDECAYED = 400
_SNAPSHOTS = 40
_LATE = 0.25
"""The share of the decay that counts as its end."""


def dynamics(
    home: Path, name: str, *, steps: int | None = None, every: int = 1, window: int | None = None, out: Path | None = None,
    devices: str | None = None, live: bool = False,
) -> View:  # fmt: skip
    """Makes a run's last updates once more and says what gradients, path and weights do.

    Args:
        live: trains nothing and shows what was recorded while it trained (``trunk.dynamics``); ``steps`` then counts back
            from its end, and ``every`` and ``window`` are not used.
        steps: how many of its last steps; without it, the decay and as many before it, or 400.
        every: looks at every so many steps.
        window: steps between snapshots of the weights; without it, a fortieth of the pass.
        out: the SVG file; without it, studies/dynamics-RUN.svg in the program's folder.

    Raises:
        UserError: there is no such run, it did not learn from a stream of text, or nothing was recorded while it trained.
    """
    place = Home(home)
    with LabBook(place.labbook) as book:
        row = find_run(book, name)
        stage = Stage.from_dict(row["config"])
        if live:
            seen = recorded(book, place, row, stage, steps)
        else:
            seen = watch(place, row["program"], stage, steps=steps, every=every, window=window, devices=devices)
        target = out or place.program(row["program"]) / "studies" / f"dynamics-{stage.folder_name}.svg"
        begins = decay_begins(stage)
        write_bytes(target, dynamics_figure(seen, begins, f"{row['program']}/{row['name']}").encode())
        phases = summary(seen, begins)
        study = "dynamics-live" if live else "dynamics"
        book.put_fact(row["program"], study, stage.folder_name, {**phases, "overhead": seen["overhead"]})
    data = {"run": row["id"], "figure": str(target), "first": seen["first"], "last": seen["last"], **phases}
    return View(
        {**data, "overhead": seen["overhead"], "steps": seen["steps"], "moves_by_matrix": seen["moves"]},
        tuple(_parts(row["id"], seen, phases, target)),
    )


def watch(
    home: Home, program: str, stage: Stage, *, steps: int | None = None, every: int = 1, window: int | None = None,
    devices: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The second pass over a stage's last steps; from its file if it has been made before."""
    if stage.objective != "lm" or stage.plan.packed:
        raise UserError(
            "law dynamics", f"expected a run on a stream of text, got '{stage.name}'", "choose a trunk or a decay"
        )
    begins = decay_begins(stage)
    usual = 2 * (stage.steps - begins) if begins is not None else _UNDECAYED
    first = max(0, stage.steps - (steps or usual))
    again, parent = pass_stage(home, stage, first)
    span = again.own_steps
    sampling = {"every": every, "sharpness_every": 5, "window": window or max(1, span // _SNAPSHOTS)}
    file = home.program(program) / "studies" / f"dynamics-{content_hash([again.identity(), sampling])[:12]}.json"
    try:
        return read_json(file)
    except ArtefactError:
        pass
    seen = finishing(
        "dynamics", stage=again.to_dict(), corpora=_corpora(home, program, stage), parent=str(parent) if parent else None,
        sampling=sampling, devices=devices,
    )  # fmt: skip
    write_json(file, seen)
    return seen


def recorded(
    book: LabBook, home: Home, row: Mapping[str, Any], stage: Stage, steps: int | None = None
) -> dict[str, Any]:
    """What a run's probe saw, in the form of a second pass; before a decay, what it saw of the run that it grew from.

    Raises:
        UserError: nothing was recorded.
    """
    begins = decay_begins(stage)
    usual = 2 * (stage.steps - begins) if begins is not None else stage.own_steps
    first = max(0, stage.steps - (steps or usual))
    pairs, rates, here, until = [], [], row, stage.steps
    while True:
        pairs += [pair for pair in _recorded_pairs(book, here["id"]) if first < pair["step"] < until]
        rates += [[s, r] for s, r in zip(*book.metrics(here["id"], "learning_rate"), strict=True) if first < s <= until]
        own = Stage.from_dict(here["config"])
        above = book.run(here["parent"]) if here["parent"] and own.start and not own.start.fresh else None
        if above is None or own.first_step <= first:
            break
        here, until = above, own.first_step
    if not pairs:
        fix = "write trunk.dynamics = '50 steps' before it trains, or leave --live out for a second pass"
        raise UserError("law dynamics", f"expected numbers recorded while {row['id']} trained, found none", fix)
    result = read_json(home.root / row["folder"] / RESULT)
    spent, training = result.get("probe_seconds", 0.0), result["seconds"]["step"]
    pairs.sort(key=lambda pair: pair["step"])
    moves = [{"step": pair["step"], "largest": largest} for pair in pairs if (largest := pair.pop("largest"))]
    return {
        "first": first, "last": stage.steps, "steps": pairs, "moves": moves, "rates": sorted(rates),
        "sampling": {"every": stage.dynamics_every, "window": 1}, "live": True,
        "overhead": spent / max(1e-9, training - spent),
    }  # fmt: skip


def _recorded_pairs(book: LabBook, run: str) -> list[dict[str, Any]]:
    """Numbers of pairs of updates of one run, each under the step of its first update; ``largest`` as in a pass's moves."""
    norms = dict(zip(*book.metrics(run, "gradient_norm"), strict=True))
    found: dict[int, dict[str, Any]] = {}
    for metric in book.metric_names(run):
        if not metric.startswith("pair_"):
            continue
        name, _, owner = metric.removeprefix("pair_").partition("/")
        for step, value in zip(*book.metrics(run, metric), strict=True):
            empty = {"step": step - 1, "norm": norms.get(step - 1), "roles": {}, "largest": {}}
            made = found.setdefault(step - 1, empty)
            if metric.startswith(MOVE):
                made["largest"][owner] = value
            elif owner:
                made["roles"].setdefault(owner, {})[name] = value
            else:
                made[name] = value
    return [found[step] for step in sorted(found)]


def decay_begins(stage: Stage) -> int | None:
    """The last step of the stable rate of a stage that decays; None for one that does not."""
    schedule = stage.schedule
    return schedule.stable_end if schedule.kind == "wsd" and schedule.decay_steps else None


def pass_stage(home: Home, stage: Stage, first: int) -> tuple[Stage, Path | None]:
    """The stage that makes these updates again from the newest checkpoint at or before step ``first``, its own or that of a
    run that it grew from, and that checkpoint; from where the first of them began if there is none."""
    bare = replace(stage, keep=(), score=(), save_every=None, save_final=False, open_ended=False, dynamics_every=0)
    origin, parent = whole_run(bare), None
    places: list[tuple[int, str, Path]] = []
    here, limit = stage, stage.steps
    while True:
        run = _run_of(home, here.key)
        if run is not None:
            places += [(step, here.key, run) for step in steps_saved(run) if step <= min(first, limit)]
        if here.start is None:
            break
        above = _run_of(home, here.start.stage)
        if above is None:
            raise ArtefactError(here.name, f"expected the run {here.start.stage[:10]} that it grows from, found none")
        if here.start.fresh:
            origin, parent = replace(bare, start=here.start), checkpoint_path(above, here.start.step)
            break
        raw = read_json(above / STAGE)
        limit = min(limit, here.start.step)
        here = Stage.from_dict({name: value for name, value in raw.items() if name != "key"})
    if places:
        step, key, run = max(places)
        return replace(bare, start=Start(key, step)), checkpoint_path(run, step)
    return origin, parent


def _run_of(home: Home, key: str) -> Path | None:
    """The folder of a stage's run in this home, of whichever program."""
    return next(iter(sorted(home.root.glob(f"programs/*/runs/*-{key[:10]}"))), None)


def _corpora(home: Home, program: str, stage: Stage) -> dict[str, str]:
    known = read_json(home.program(program) / "prepared.json")["corpora"]
    for name, wanted in stage.corpora:
        if name not in known or known[name]["hash"] != wanted:
            raise UserError(
                "law dynamics",
                f"expected the corpus '{name}' as the run read it, found another",
                "run its recipe again",
            )
    return {name: str(home.root / known[name]["folder"]) for name, _ in stage.corpora}


def summary(seen: Mapping[str, Any], begins: int | None) -> dict[str, Any]:
    """Each quantity before the decay, in it and in its last quarter: means, medians where single steps are far out."""
    last = seen["last"]
    late = last - _LATE * (last - begins) if begins is not None else last
    spans = {"before": (seen["first"], begins if begins is not None else last)}
    if begins is not None:
        spans |= {"decay": (begins, last), "late": (late, last)}

    def level(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
        values = [s[key] for s in steps if s.get(key) is not None]
        return None if not values else median(values) if key in ("curvature", "sharpness") else fmean(values)

    out: dict[str, Any] = {"phases": {}, "roles": {}, "moves": {}, "rate": {}}
    for word, (low, high) in spans.items():
        inside = [s for s in seen["steps"] if low < s["step"] <= high]
        out["phases"][word] = {key: level(inside, key) for key in MEASURES}
        roles = sorted({role for s in inside for role in s["roles"]})
        parts = {role: [s["roles"].get(role, {}) for s in inside] for role in roles}
        out["roles"][word] = {role: {key: level(own, key) for key in MEASURES} for role, own in parts.items()}
        kinds = moves_by_kind(seen["moves"])
        found = {kind: [v for step, v in pairs if low < step <= high] for kind, pairs in kinds.items()}
        out["moves"][word] = {kind: fmean(values) for kind, values in found.items() if values}
        rates = [r for step, r in seen["rates"] if low < step <= high]
        out["rate"][word] = fmean(rates) if rates else None
    return out


def _parts(run: str, seen: Mapping[str, Any], phases: Mapping[str, Any], figure: Path) -> Iterator[RenderableType]:
    words, columns = list(phases["phases"]), phase_columns(phases)
    right = tuple(range(1, len(columns)))
    yield table(columns, phase_rows(phases), title=f"{run}, steps {seen['first']:,} to {seen['last']:,}", right=right)
    kinds = phases["moves"][words[0]]
    window = seen["sampling"]["window"]
    if kinds:
        moved = [(kind, *level_cells(phases["moves"], kind)) for kind in kinds]
        span = "an update" if window == 1 else f"{window} steps"
        yield table((f"largest |ΔW| in {span}", *columns[1:]), moved, right=right)
    made: list[tuple[str, ...]] = []
    for role in phases["roles"][words[0]]:
        own = {word: phases["roles"][word].get(role, {}) for word in words}
        pairs = zip(level_cells(own, "norm"), level_cells(own, "cosine"), strict=True)
        made.append((role, *(cell for pair in pairs for cell in pair)))
    both = [f"{what}, {title}" for title in columns[1:] for what in ("norm", "cosine")]
    if made:
        yield table(("role", *both), made, right=tuple(range(1, len(both) + 1)))
    every, share = seen["sampling"]["every"], 100 * seen["overhead"]
    took = f"looking every {every} steps took {share:.0f} % of the time of the pass itself"
    if "live" in seen:
        took = f"a pair of updates every {every} steps took {share:.1f} % on top of training"
    yield line(f"K and sharpness are medians, the rest means; {took}; the figure is {figure}")
