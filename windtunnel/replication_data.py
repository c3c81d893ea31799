"""Claims about more data, better data and what the decay does: arXiv 2404.06395, sections 4.3, 4.4 and 5.

Differences of losses are in percent of the loss and paired by seed; regions are stated here, before anything is trained.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from windtunnel.dynamics_study import decay_begins, summary, watch
from windtunnel.laws.data_axis import AXIS_FORMS, AxisForm, AxisLaw, fit_axis
from windtunnel.replication_found import Figure, Found, Series, bits, means, signed, tuned_rates
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.report.dynamics import moves_by_kind
from windtunnel.train.stage import Stage
from windtunnel.tunnel.claims import AS_GOOD, Part, Region, percent
from windtunnel.tunnel.replica import AXIS, Model

_HELD_OUT = 2
"""Longest runs of the data axis that no form is fitted to."""
_STATED_COST = 4.0
_LEAST = 2.0**-20
"""Ratios of compute below this one count as this one: a line without a slope meets a loss at no compute at all."""
_WITHIN = 1.0
"""Octaves: a cost within a factor 2 of the stated one counts as that cost."""


# -- section 4.3 and appendix B.2: more data -------------------------------------------------------------------------------


def _axis(lab: Lab) -> tuple[list[Model], list[list[Stage]], list[Stage]]:
    """Models, decays[seed][length] and trunks of the data axis."""
    models = lab.models("wsd")
    trunks = [m.trunk(AXIS[-1]) for m in models]
    return models, [[m.decay(t, n) for n in AXIS] for m, t in zip(models, trunks, strict=True)], trunks


def _compute(stage: Stage) -> float:
    """6ND, as the paper counts."""
    return 6.0 * stage.shape.body * stage.tokens


def _fits(lab: Lab, row: Sequence[Stage], held_out: int = 0) -> dict[AxisForm, AxisLaw]:
    known = row[: len(row) - held_out]
    compute, losses = [_compute(s) for s in known], [lab.loss(s) for s in known]
    return {form: fit_axis(form, compute, losses) for form in AXIS_FORMS}


def data_law(lab: Lab) -> Found:
    """Both forms fitted to the shorter runs of one size; which foretells the two longest better (figures 6 and 16)."""
    _, rows, trunks = _axis(lab)
    lab.train("one size, eight lengths", [*trunks, *(s for row in rows for s in row)])
    ahead, fitted = [], []
    for row in rows:
        if any(math.isnan(lab.loss(s)) for s in row):
            ahead.append(math.nan)
            continue
        laws, whole = _fits(lab, row, _HELD_OUT), _fits(lab, row)
        off = {
            f: fmean(abs(percent(law.predict(_compute(s)), lab.loss(s))) for s in row[-_HELD_OUT:])
            for f, law in laws.items()
        }
        ahead.append(off["exponential"] - off["power"])
        fitted.append(100 * (whole["exponential"].residual - whole["power"].residual))
    points = tuple(zip((_compute(s) for s in rows[0]), means(lab, rows), strict=True))
    series = [Series("runs", points, line=False)]
    if not any(math.isnan(v) for _, v in points):
        for form in AXIS_FORMS:
            law = fit_axis(form, [c for c, _ in points[:-_HELD_OUT]], [v for _, v in points[:-_HELD_OUT]])
            grid = [points[0][0] * (points[-1][0] / points[0][0]) ** (i / 40) for i in range(41)]
            series.append(Series(form, tuple((c, law.predict(c)) for c in grid), dots=False))
    part = Part(
        f"A power law fitted to the shorter runs foretells the {_HELD_OUT} longest better than an exponential",
        "mean absolute error of the exponential less that of the power law", "%", Region(low=0.0), tuple(ahead),
    )  # fmt: skip
    notes = (f"residual of a fit to all points, exponential less power law: {signed(fmean(fitted))}",) if fitted else ()
    caption = (
        f"Loss after the decay over compute, seeds averaged; both forms fitted without the {_HELD_OUT} longest runs."
    )
    return Found((part,), (Figure(caption, "FLOPs (6ND)", "bits per byte", tuple(series), log_x=True),), notes)


def more_data(lab: Lab) -> Found:
    """The compute at which the smaller model's power law meets the larger model at 40N, over the larger model's own."""
    models, rows, trunks = _axis(lab)
    larger = lab.models("wsd", lab.scale.larger)
    tall = [m.trunk(TUNED_AT) for m in larger]
    tops = [m.decay(t, TUNED_AT) for m, t in zip(larger, tall, strict=True)]
    lab.train("a small model with more data, a larger one", [*trunks, *(s for row in rows for s in row), *tall, *tops])
    octaves, laws, ratios = [], [], []
    for row, top in zip(rows, tops, strict=True):
        if any(math.isnan(lab.loss(s)) for s in (*row, top)):
            octaves.append(math.nan)
            continue
        laws.append(_fits(lab, row)["power"])
        ratio = laws[-1].compute_for(lab.loss(top)) / _compute(top)
        ratios.append(ratio)
        octaves.append(math.log2(max(ratio, _LEAST) / _STATED_COST) if math.isfinite(ratio) else math.inf)
    part = Part(
        f"{lab.scale.model} reaches {lab.scale.larger} at {TUNED_AT}N for {_STATED_COST:g} times the compute, within a factor 2",
        f"log2 of the extrapolated ratio of compute over {_STATED_COST:g}", "octaves", Region(-_WITHIN, _WITHIN), tuple(octaves),
    )  # fmt: skip
    size = larger[0].shape.body / models[0].shape.body
    shown = ", ".join("never" if math.isinf(r) else f"{r:.3g}" for r in ratios)
    notes = [
        f"times the compute, by seed: {shown}; the larger model has {size:.2g} times the parameters (the paper's 4.6)"
    ]
    if any(math.isinf(r) for r in ratios):
        notes.append("never: the fitted floor L0 lies above the larger model's loss")
    points = tuple(zip((_compute(s) for s in rows[0]), means(lab, rows), strict=True))
    top = (_compute(tops[0]), bits(fmean(lab.loss(s) for s in tops)))
    series = [
        Series(lab.scale.model, points, line=False), Series(f"{lab.scale.larger} at {TUNED_AT}N", (top,), line=False)
    ]  # fmt: skip
    if laws:
        last = 16 * _compute(tops[0])
        grid = [points[0][0] * (last / points[0][0]) ** (i / 60) for i in range(61)]
        series.append(
            Series("power law", tuple((c, bits(fmean(law.predict(c) for law in laws))) for c in grid), dots=False)
        )
    figure = Figure("The smaller model's runs and their power law carried on, beside the larger model.", "FLOPs (6ND)",
                    "bits per byte", tuple(series), log_x=True)  # fmt: skip
    return Found((part,), (figure,), tuple(notes))


# -- section 4.4: what happens in the decay ---------------------------------------------------------------------------------

_CHANGES = (
    ("norm", "The gradient norm falls", Region(high=0.0)),
    ("curvature", "The curvature of the path grows to more than twice", Region(low=1.0)),
)
_FOLLOWS = 1.0
_BARELY = 0.5
"""The loss barely moves before the decay if it falls there by less than this share of its fall in as many steps of decay."""
_PANELS = (
    ("norm", "‖g‖", False), ("cosine", "cos(g(t), g(t+1))", False), ("d1", "D1", False), ("d2", "D2", False),
    ("curvature", "K", True),
)  # fmt: skip


def dynamics(lab: Lab) -> Found:
    """A watched second pass over each seed's decay at 40N and as many steps before it (figures 7 and 8)."""
    models = lab.models("wsd")
    trunks = [m.trunk(TUNED_AT) for m in models]
    decays = [m.decay(t, TUNED_AT) for m, t in zip(models, trunks, strict=True)]
    lab.train("decays to look into", [*trunks, *decays])
    if any("failed" in lab.results[s.key] for s in decays):
        return Found((), notes=("a run failed",))
    seen = []
    for stage in decays:
        with lab.desk.screen.console.status(f"replicate: looking into {stage.name}"):
            seen.append(watch(lab.desk.home, lab.program.name, stage))
    begins = [decay_begins(stage) for stage in decays]
    levels = [summary(one, begin) for one, begin in zip(seen, begins, strict=True)]
    follows = [
        math.log2(fmean(one["moves"]["late"].values()) / fmean(one["moves"]["before"].values()))
        - math.log2(one["rate"]["late"] / one["rate"]["before"])
        for one in levels
    ]
    falls = [_falls(one, begin) for one, begin in zip(seen, begins, strict=True)]
    phases = [one["phases"] for one in levels]
    parts = (
        Part("The largest update of a matrix follows the learning rate, within a factor 2",
             "log2 of its change into the decay's last quarter less that of the rate", "octaves", Region(-_FOLLOWS, _FOLLOWS),
             tuple(follows)),
        Part("The loss barely moves before the decay",
             "its fall before less half of its fall in as many steps of decay", "%", Region(high=0.0),
             tuple(before - _BARELY * after for before, after in falls)),
        *_path_parts(phases),
    )  # fmt: skip
    sharp = fmean(math.log2(p["late"]["sharpness"] / p["before"]["sharpness"]) for p in phases)
    shown = "; ".join(f"{signed(before)} before, {signed(after)} in it" for before, after in falls)
    notes = (
        f"sharpness along the gradient changes by {signed(sharp, ' octaves')}",
        f"fall of the training loss from the first to the last quarter before the decay, and from there to that of the decay, "
        f"by seed: {shown}",
        tuned_rates(lab, "wsd"),
    )  # fmt: skip
    return Found(parts, _dynamics_figures(seen[0], begins[0]), notes)


def _path_parts(phases: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """What gradients and path do (figure 8), one dictionary of phases a seed."""
    return (
        Part("Consecutive gradients point the same way in the decay", "mean cosine in the decay", "", Region(low=0.0),
             tuple(p["decay"]["cosine"] for p in phases)),
        Part("They do so more than before the decay", "mean cosine in the decay less that before it", "", Region(low=0.0),
             tuple(p["decay"]["cosine"] - p["before"]["cosine"] for p in phases)),
        Part("The slope along the path falls to less than half", "mean −D1 in the decay's last quarter over that before", "times",
             Region(high=0.5), tuple(p["late"]["d1"] / p["before"]["d1"] if p["before"]["d1"] < 0 else math.nan for p in phases)),
        Part("The second derivative along the path grows", "mean D2 in the decay's last quarter less that before", "thousandths",
             Region(low=0.0), tuple(1000 * (p["late"]["d2"] - p["before"]["d2"]) for p in phases)),
        *(Part(says, "log2 of its change into the decay's last quarter", "octaves", region,
               tuple(math.log2(p["late"][key] / p["before"][key]) for p in phases)) for key, says, region in _CHANGES),
    )  # fmt: skip


def _falls(seen: Mapping[str, Any], begins: int | None) -> tuple[float, float]:
    """How far the training loss falls in as many steps before the decay and in it, in percent of the loss at the start; not a
    number where there are too few steps.

    In it: from the last quarter before to the last quarter of the decay, middle to middle. Before: from the first quarter to the
    last, a shorter way, made as long.
    """
    first, last = seen["first"], seen["last"]
    begins = last if begins is None else begins
    early, late = (begins - first) / 4, (last - begins) / 4
    spans = ((first, first + early), (begins - early, begins), (last - late, last))
    groups = [[v for step, v in seen["losses"] if low < step <= high and v is not None] for low, high in spans]
    if not all(groups):
        return math.nan, math.nan
    start, middle, end = (fmean(group) for group in groups)
    as_long = (last - begins - late / 2 + early / 2) / (3 * early)
    return 100 * as_long * (start - middle) / start, 100 * (middle - end) / start


def _dynamics_figures(one: Mapping[str, Any], begins: int | None) -> tuple[Figure, ...]:
    """The paper's figures 7 and 8 of one seed, with the learning rate beneath."""
    words = "" if begins is None else f"; the decay begins at step {begins:,}"

    def drawn(title: str, y: str, series: tuple[Series, ...], log: bool = False) -> Figure:
        return Figure(f"{title} over the steps, first seed{words}.", "step", y, series, log_y=log)

    def single(pairs: Sequence[Sequence[float]]) -> tuple[Series, ...]:
        steps = [{"step": step, "value": value} for step, value in pairs]
        return (Series("", _thinned(steps, "value"), dots=False),)

    moves = tuple(Series(kind, tuple(pairs), dots=False) for kind, pairs in moves_by_kind(one["moves"]).items())
    window = one["sampling"]["window"]
    span = "one step" if window == 1 else f"{window:,} steps"
    return (
        drawn(f"The largest change of an entry of each kind of matrix within {span},", "max |ΔW|", moves),
        drawn("Training loss", "nats per token", single(one["losses"])),
        *(drawn(y, y, (Series("", _thinned(one["steps"], key), dots=False),), log) for key, y, log in _PANELS),
        drawn("Base learning rate", "base learning rate", single(one["rates"])),
    )


def _thinned(steps: Sequence[Mapping[str, Any]], key: str, most: int = 120) -> tuple[tuple[float, float], ...]:
    """Means of neighbouring steps."""
    found = [(s["step"], s[key]) for s in steps if s[key] is not None]
    size = max(1, -(-len(found) // most))
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return tuple((fmean(a for a, _ in g), fmean(b for _, b in g)) for g in groups)


# -- section 5: two stages -------------------------------------------------------------------------------------------------


def two_stage(lab: Lab) -> Found:
    """One trunk a seed, its decay on the trunk's data (A-1) and with better data and chats mixed in (A-2), before any SFT."""
    mixture = lab.better()
    if mixture is None:
        return Found((), notes=("the recipe has no decay with a mixture of its own",))
    models = lab.models("wsd")
    trunks = [m.trunk(TUNED_AT) for m in models]
    plain = [m.decay(t, TUNED_AT) for m, t in zip(models, trunks, strict=True)]
    mixed = [m.decay(t, TUNED_AT, mixture=mixture) for m, t in zip(models, trunks, strict=True)]
    lab.train("decays on two kinds of data", [*trunks, *plain, *mixed])
    new = {name: weight for name, weight in mixture if name not in lab.mixture}

    def gaps(on: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(percent(lab.loss(b, on), lab.loss(a, on)) for a, b in zip(plain, mixed, strict=True))

    part = Part(
        "Better data in the decay lowers the loss on that kind of text", f"A-2's loss above A-1's on {', '.join(new)}", "%",
        Region(high=-AS_GOOD), gaps(new),
    )  # fmt: skip
    old = fmean(gaps(lab.mixture))
    each = [f"{name} {signed(fmean(gaps({name: 1.0})))}" for name in sorted({*new, *lab.mixture})]
    notes = (
        f"A-2's loss above A-1's on the trunk's own mixture: {signed(old)}; by corpus: {', '.join(each)}",
        "before supervised fine-tuning: the claim two-stage-sft has table 1 with it",
    )  # fmt: skip
    return Found((part,), (), notes)
