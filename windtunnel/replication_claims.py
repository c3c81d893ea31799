"""The claims of arXiv 2404.06395, sections 3 to 5: each trains its runs through the lab and is decided by a fixed rule.

Differences of losses are in percent of the loss and paired by seed; regions are stated here, before anything is trained.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from windtunnel.base.errors import WindtunnelError
from windtunnel.laws.data_axis import AXIS_FORMS, AxisForm, AxisLaw, fit_axis
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.train.stage import Stage
from windtunnel.tunnel.audit import BARS, find_valley, loss_at
from windtunnel.tunnel.claims import AS_GOOD, Part, Region, percent
from windtunnel.tunnel.replica import AXIS, PERIODS, SHARE_LENGTHS, SHARES, Model
from windtunnel.tunnel.transfer import next_rates, rate_at

LN2 = math.log(2)
_HELD_OUT = 2
"""Longest runs of the data axis that no form is fitted to."""
_STATED_COST = 4.0
_WITHIN = 1.0
"""Octaves: a cost within a factor 2 of the stated one counts as that cost."""
_LATTICE = "sqrt2"


@dataclass(frozen=True)
class Series:
    """A named line of a figure; ``dots`` marks its points, ``line`` joins them."""

    name: str
    points: tuple[tuple[float, float], ...]
    dots: bool = True
    line: bool = True


@dataclass(frozen=True)
class Figure:
    """A figure as data: axes, series, what it shows."""

    caption: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Found:
    """What a claim came to: decided parts, figures, and numbers that decide nothing but belong to the picture."""

    parts: tuple[Part, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One experiment of the paper: its name here, where it stands there, what is said, and how it is tried."""

    name: str
    where: str
    says: str
    test: Callable[[Lab], Found] = field(compare=False)


def _bits(loss: float) -> float:
    return loss / LN2


def _signed(value: float, unit: str = " %") -> str:
    return f"{value:+.2f}{unit}".replace("-", "−")


def _means(lab: Lab, runs: Sequence[Sequence[Stage]]) -> list[float]:
    """Mean loss over seeds, in bits per byte, of runs[seed][point], a value a point."""
    return [_bits(fmean(lab.loss(stage) for stage in stages)) for stages in zip(*runs, strict=True)]


def _points(model: Model, stages: Sequence[Stage], values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    pairs = [(float(stage.tokens), value) for stage, value in zip(stages, values, strict=True)]
    return tuple(pair for pair in pairs if math.isfinite(pair[1]))


# -- section 3 -------------------------------------------------------------------------------------------------------------


def rate(lab: Lab) -> Found:
    """Grids of base rates at every size, each grown until its best lies inside, for every seed."""
    sizes, centre = lab.scale.ladder, lab.program.setting().optimizer.learning_rate
    grids: dict[str, dict[int, list[float | None]]] = {size: {} for size in sizes}
    for _ in range(8):
        todo = [(size, k) for size in sizes for k in next_rates(grids[size], 5)]
        if not todo:
            break
        stages = {
            (size, k): [lab.model(size, seed, rate_at(centre, _LATTICE, k)).whole("wsd", 20) for seed in lab.seeds]
            for size, k in todo
        }
        lab.train("rates at every size", [stage for row in stages.values() for stage in row])
        for (size, k), row in stages.items():
            grids[size][k] = [v if math.isfinite(v := lab.loss(stage)) else None for stage in row]
    drifts, costs, notes = [], [], []
    series = []
    for i in range(len(lab.seeds)):
        own = {s: {rate_at(centre, _LATTICE, k): row[i] for k, row in grids[s].items()} for s in sizes}
        try:
            small, large = find_valley(own[sizes[0]]), find_valley(own[sizes[-1]])
        except WindtunnelError as error:
            return Found((), notes=(str(error),))
        drifts.append(2 * math.log2(large.rate / small.rate))
        costs.append(100 * max(0.0, loss_at(own[sizes[-1]], large, small.rate) / large.loss - 1))
        if small.edge or large.edge:
            notes.append(f"seed {lab.seeds[i]}: a best rate lies on the edge of its grid")
    for size in sizes:
        means = {
            rate_at(centre, _LATTICE, k): fmean(v for v in row if v is not None)
            for k, row in grids[size].items()
            if None not in row
        }  # fmt: skip
        low = min(means.values(), default=1.0)
        series.append(
            Series(size, tuple((r, percent(v, low)) for r, v in sorted(means.items()) if percent(v, low) < 8))
        )
    steps = BARS.steps
    return Found(
        (
            Part(
                f"The best base rate moves by at most {steps:g} step of √2 from {sizes[0]} to {sizes[-1]}",
                "log√2 of the largest model's best rate over the smallest's", "steps", Region(-steps, steps), tuple(drifts),
            ),
            Part(
                f"The best rate of {sizes[0]} costs {sizes[-1]} at most {100 * BARS.regret:g} % of its loss",
                "loss at the smallest model's best rate above the own best", "%", Region(high=100 * BARS.regret), tuple(costs),
            ),
        ),
        (Figure("Held-out loss over the base learning rate, seeds averaged, each size above its own best.",
                "base learning rate", "above the size's best, %", tuple(series), log_x=True),),
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


# -- section 4.1: cosine ---------------------------------------------------------------------------------------------------


def cosine(lab: Lab) -> Found:
    """Runs under four periods and a looping cosine, each scored at four lengths (figure 4)."""
    models = lab.models("cosine")
    runs = {f"Cosine({t}N)": [m.cosine(t) for m in models] for t in PERIODS}
    runs[f"CosineLoop({PERIODS[0]}N)"] = [m.cosine(PERIODS[0], loop=True) for m in models]
    lab.train("cosines of several periods", [s for rows in runs.values() for row in rows for s in row])
    parts = []
    for at, end in enumerate(PERIODS):
        ahead = []
        for seed in range(len(models)):
            own = lab.loss(runs[f"Cosine({end}N)"][seed][at])
            rivals = {name: rows for name, rows in runs.items() if name != f"Cosine({end}N)"}
            if end == PERIODS[0]:  # up to its period the loop is the cosine itself
                del rivals[f"CosineLoop({end}N)"]
            others = [lab.loss(rows[seed][at]) for rows in rivals.values()]
            ahead.append(percent(min(others), own))
        parts.append(
            Part(f"At S = {end}N the cosine with T = {end}N has the lowest loss", "the best other run's loss above it", "%",
                 Region(low=0.0), tuple(ahead))
        )  # fmt: skip
    series = tuple(Series(name, _points(models[0], rows[0], _means(lab, rows))) for name, rows in runs.items())
    caption = f"Held-out loss at each length under cosines of several periods, {len(models)} seeds averaged."
    return Found(tuple(parts), (Figure(caption, "training tokens", "bits per byte", series),), (_tuned(lab, "cosine"),))


def _tuned(lab: Lab, *kinds: str) -> str:
    words = [f"{kind} {lab.tuned(kind):g} of {', '.join(f'{r:g}' for r in lab.grids[kind])}" for kind in kinds]
    return f"base rates tuned on another seed at {TUNED_AT}N: {'; '.join(words)}"


# -- section 4.2 and 4.3: WSD ----------------------------------------------------------------------------------------------


def wsd(lab: Lab) -> Found:
    """WSD against a cosine with T = S, each at its own tuned rate, on fresh seeds."""
    ours, theirs = lab.models("wsd"), lab.models("cosine")
    trunks = [m.trunk(TUNED_AT) for m in ours]
    decays = [m.decay(t, TUNED_AT) for m, t in zip(ours, trunks, strict=True)]
    cosines = [m.cosine(TUNED_AT, PERIODS[: PERIODS.index(TUNED_AT) + 1]) for m in theirs]
    lab.train("WSD against cosine", [*trunks, *decays, *(s for row in cosines for s in row)])
    gaps = tuple(percent(lab.loss(d), lab.loss(row[-1])) for d, row in zip(decays, cosines, strict=True))
    notes = [_tuned(lab, "wsd", "cosine")]
    both = sorted(set(lab.grids["wsd"]) & set(lab.grids["cosine"]))
    same = [f"{_signed(percent(lab.grids['wsd'][r], lab.grids['cosine'][r]))} at {r:g}" for r in both]
    notes.append(f"WSD's loss above the cosine's at equal rates, tuning seed: {', '.join(same)}")
    series = tuple(
        Series(name, tuple((r, _bits(v)) for r, v in lab.grids[kind].items()))
        for name, kind in (("WSD, 10 % decay", "wsd"), ("Cosine, T = S", "cosine"))
    )
    figure = Figure(f"Held-out loss at {TUNED_AT}N over the base learning rate of each schedule, one seed.",
                    "base learning rate", "bits per byte", series, log_x=True)  # fmt: skip
    part = Part(
        f"WSD({TUNED_AT}N) ends as low as Cosine(T = S = {TUNED_AT}N), the rate of each tuned", "WSD's loss above the cosine's",
        "%", Region(high=AS_GOOD), gaps,
    )  # fmt: skip
    return Found((part,), (figure,), tuple(notes))


def decay(lab: Lab) -> Found:
    """One trunk a seed, decays over several shares of two whole lengths, and the stable rate kept instead (figure 5)."""
    models = lab.models("wsd")
    trunks = [m.trunk(max(SHARE_LENGTHS)) for m in models]
    pairs = list(zip(models, trunks, strict=True))
    ends = {(n, s): [m.decay(t, n, s) for m, t in pairs] for n in SHARE_LENGTHS for s in SHARES}
    kept = {n: [m.onward(t, n) for m, t in pairs] for n in SHARE_LENGTHS}
    lab.train("decays of several lengths", [*trunks, *(s for row in [*ends.values(), *kept.values()] for s in row)])
    parts = []
    for n in SHARE_LENGTHS:
        loss = {s: [lab.loss(stage) for stage in ends[n, s]] for s in SHARES}
        stable = [lab.loss(stage) for stage in kept[n]]
        best = [min(values) for values in zip(*loss.values(), strict=True)]
        gaps = [tuple(percent(a, b) for a, b in zip(*pair, strict=True))
                for pair in ((stable, loss[0.1]), (loss[0.1], best), (loss[0.025], loss[0.1]))]  # fmt: skip
        parts += [
            Part(f"At {n}N the decay drops the loss below that of the stable rate kept",
                 "stable loss above decayed loss, equal tokens", "%", Region(low=AS_GOOD), gaps[0]),
            Part(f"At {n}N a decay of 10 % is enough", "its loss above the best share's", "%", Region(high=AS_GOOD), gaps[1]),
            Part(f"At {n}N a decay of 2.5 % is not enough", "its loss above that of 10 %", "%", Region(low=AS_GOOD), gaps[2]),
        ]  # fmt: skip
    shares = tuple(
        Series(f"{n}N", tuple((100 * s, _bits(fmean(lab.loss(stage) for stage in ends[n, s]))) for s in SHARES))
        for n in SHARE_LENGTHS
    )
    figure = Figure("Held-out loss over the share of all tokens that the decay takes, seeds averaged.", "share of the decay, %",
                    "bits per byte", shares)  # fmt: skip
    return Found(tuple(parts), (figure,), (_tuned(lab, "wsd"),))


def onward(lab: Lab) -> Found:
    """The trunk that gave one model goes on and gives a longer one, against a cosine of the longer length from scratch."""
    length = PERIODS[-1]
    ours, theirs = lab.models("wsd"), lab.models("cosine")
    trunks = [m.trunk(length) for m in ours]
    decays = {n: [m.decay(t, n) for m, t in zip(ours, trunks, strict=True)] for n in PERIODS}
    cosines = [m.cosine(length) for m in theirs]
    lab.train(
        "one trunk, decayed again and again", [*trunks, *(s for row in [*decays.values(), *cosines] for s in row)]
    )
    gaps = tuple(percent(lab.loss(d), lab.loss(c[-1])) for d, c in zip(decays[length], cosines, strict=True))
    stages = [list(row) for row in zip(*decays.values(), strict=True)]
    series = (
        Series("WSD, one trunk", _points(ours[0], stages[0], _means(lab, stages))),
        Series(f"Cosine({length}N)", _points(theirs[0], cosines[0], _means(lab, cosines))),
    )
    part = Part(
        f"A trunk that gave a {TUNED_AT}N model goes on to {length}N and ends as low as Cosine({length}N) from scratch",
        "WSD's loss above the cosine's", "%", Region(high=AS_GOOD), gaps,
    )  # fmt: skip
    saved = sum(d.own_steps for d in (decays[n][0] for n in PERIODS)) + trunks[0].steps
    apart = sum(ours[0].steps(n) for n in PERIODS)
    notes = (
        f"{len(PERIODS)} finished models cost {saved:,} steps, {apart:,} as runs of their own",
        _tuned(lab, "wsd", "cosine"),
    )
    return Found((part,), (Figure("Models finished from one trunk, and one cosine run on its way.", "training tokens",
                                  "bits per byte", series),), notes)  # fmt: skip


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
    points = tuple(zip((_compute(s) for s in rows[0]), _means(lab, rows), strict=True))
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
    notes = (
        (f"residual of a fit to all points, exponential less power law: {_signed(fmean(fitted))}",) if fitted else ()
    )
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
        octaves.append(math.log2(ratio / _STATED_COST) if math.isfinite(ratio) else math.inf)
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
    points = tuple(zip((_compute(s) for s in rows[0]), _means(lab, rows), strict=True))
    top = (_compute(tops[0]), _bits(fmean(lab.loss(s) for s in tops)))
    series = [
        Series(lab.scale.model, points, line=False), Series(f"{lab.scale.larger} at {TUNED_AT}N", (top,), line=False)
    ]  # fmt: skip
    if laws:
        last = 16 * _compute(tops[0])
        grid = [points[0][0] * (last / points[0][0]) ** (i / 60) for i in range(61)]
        series.append(
            Series("power law", tuple((c, _bits(fmean(law.predict(c) for law in laws))) for c in grid), dots=False)
        )
    figure = Figure("The smaller model's runs and their power law carried on, beside the larger model.", "FLOPs (6ND)",
                    "bits per byte", tuple(series), log_x=True)  # fmt: skip
    return Found((part,), (figure,), tuple(notes))


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
    each = [f"{name} {_signed(fmean(gaps({name: 1.0})))}" for name in sorted({*new, *lab.mixture})]
    notes = (
        f"A-2's loss above A-1's on the trunk's own mixture: {_signed(old)}; by corpus: {', '.join(each)}",
        "before supervised fine-tuning, which table 1 has after it",
    )  # fmt: skip
    return Found((part,), (), notes)


CLAIMS: Mapping[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim("rate", "section 3.3, figure 3", "The best base learning rate is the same for all sizes.", rate),
        Claim(
            "cosine", "section 4.1, figure 4", "A cosine is best where its period is the length of training.", cosine
        ),
        Claim("wsd", "section 4.2, figure 5", "WSD ends at or below the cosine with T = S.", wsd),
        Claim("decay", "section 4.2, figure 5", "The loss drops in the decay; 10 % is enough, 2.5 % is not.", decay),
        Claim(
            "continue", "section 4.2, figure 5", "The stable checkpoint goes on and matches a longer cosine.", onward
        ),
        Claim(
            "data-law",
            "section 4.3, figures 6, 16",
            "A power law fits the data axis better than an exponential.",
            data_law,
        ),
        Claim(
            "more-data",
            "section 4.3, figure 6",
            "A small model matches a larger one at 4 times the compute.",
            more_data,
        ),
        Claim("two-stage", "section 5, table 1", "High-quality data belongs into the decay.", two_stage),
    )
}
"""In the paper's order."""


def to_fact(claim: Claim, found: Found) -> dict[str, Any]:
    """A claim with what it came to, as JSON."""
    figures = [
        {"caption": f.caption, "x": f.x, "y": f.y, "log_x": f.log_x, "log_y": f.log_y,
         "series": [{"name": s.name, "points": [list(p) for p in s.points if math.isfinite(p[1])],
                     "dots": s.dots, "line": s.line} for s in f.series]}
        for f in found.figures
    ]  # fmt: skip
    return {
        "name": claim.name, "where": claim.where, "says": claim.says, "parts": [part.to_dict() for part in found.parts],
        "figures": figures, "notes": list(found.notes),
    }  # fmt: skip
