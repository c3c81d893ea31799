"""Claims about rates and schedules: arXiv 2404.06395, sections 3.3, 4.1 and 4.2.

Differences of losses are in percent of the loss and paired by seed; regions are stated here, before anything is trained.
Needs no torch.
"""

from __future__ import annotations

import math
from statistics import fmean

from windtunnel.base.errors import WindtunnelError
from windtunnel.replication_found import Figure, Found, Series, bits, means, points_of, signed, tuned_rates
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.tunnel.audit import BARS, find_valley, loss_at
from windtunnel.tunnel.claims import AS_GOOD, Part, Region, percent
from windtunnel.tunnel.replica import PERIODS, SHARE_LENGTHS, SHARES
from windtunnel.tunnel.transfer import next_rates, rate_at

_LATTICE = "sqrt2"


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
    series = tuple(Series(name, points_of(rows[0], means(lab, rows))) for name, rows in runs.items())
    caption = f"Held-out loss at each length under cosines of several periods, {len(models)} seeds averaged."
    return Found(
        tuple(parts), (Figure(caption, "training tokens", "bits per byte", series),), (tuned_rates(lab, "cosine"),)
    )


# -- section 4.2 and 4.3: WSD ----------------------------------------------------------------------------------------------


def wsd(lab: Lab) -> Found:
    """WSD against a cosine with T = S on fresh seeds: each at its own tuned rate, and both at WSD's."""
    ours, theirs = lab.models("wsd"), lab.models("cosine")
    trunks = [m.trunk(TUNED_AT) for m in ours]
    decays = [m.decay(t, TUNED_AT) for m, t in zip(ours, trunks, strict=True)]
    ends = PERIODS[: PERIODS.index(TUNED_AT) + 1]
    cosines, alike = ([m.cosine(TUNED_AT, ends) for m in models] for models in (theirs, ours))
    lab.train("WSD against cosine", [*trunks, *decays, *(s for row in (*cosines, *alike) for s in row)])
    gaps, level = (
        tuple(percent(lab.loss(d), lab.loss(row[-1])) for d, row in zip(decays, rows, strict=True))
        for rows in (cosines, alike)
    )
    notes = [tuned_rates(lab, "wsd", "cosine")]
    both = sorted(set(lab.grids["wsd"]) & set(lab.grids["cosine"]))
    same = [f"{signed(percent(lab.grids['wsd'][r], lab.grids['cosine'][r]))} at {r:g}" for r in both]
    notes.append(f"WSD's loss above the cosine's at equal rates, tuning seed: {', '.join(same)}")
    series = tuple(
        Series(name, tuple((r, bits(v)) for r, v in lab.grids[kind].items()))
        for name, kind in (("WSD, 10 % decay", "wsd"), ("Cosine, T = S", "cosine"))
    )
    figure = Figure(f"Held-out loss at {TUNED_AT}N over the base learning rate of each schedule, one seed.",
                    "base learning rate", "bits per byte", series, log_x=True)  # fmt: skip
    words = "WSD's loss above the cosine's"
    parts = (
        Part(f"WSD({TUNED_AT}N) ends as low as Cosine(T = S = {TUNED_AT}N), the rate of each tuned", words, "%",
             Region(high=AS_GOOD), gaps),
        Part(f"WSD({TUNED_AT}N) ends below the cosine at the same rate, {lab.tuned('wsd'):g}, WSD's own", words, "%",
             Region(high=0.0), level),
    )  # fmt: skip
    return Found(parts, (figure,), tuple(notes))


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
        Series(f"{n}N", tuple((100 * s, bits(fmean(lab.loss(stage) for stage in ends[n, s]))) for s in SHARES))
        for n in SHARE_LENGTHS
    )
    figure = Figure("Held-out loss over the share of all tokens that the decay takes, seeds averaged.", "share of the decay, %",
                    "bits per byte", shares)  # fmt: skip
    return Found(tuple(parts), (figure,), (tuned_rates(lab, "wsd"),))


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
        Series("WSD, one trunk", points_of(stages[0], means(lab, stages))),
        Series(f"Cosine({length}N)", points_of(cosines[0], means(lab, cosines))),
    )
    part = Part(
        f"A trunk that gave a {TUNED_AT}N model goes on to {length}N and ends as low as Cosine({length}N) from scratch",
        "WSD's loss above the cosine's", "%", Region(high=AS_GOOD), gaps,
    )  # fmt: skip
    saved = sum(d.own_steps for d in (decays[n][0] for n in PERIODS)) + trunks[0].steps
    apart = sum(ours[0].steps(n) for n in PERIODS)
    notes = (
        f"{len(PERIODS)} finished models cost {saved:,} steps, {apart:,} as runs of their own",
        tuned_rates(lab, "wsd", "cosine"),
    )
    return Found((part,), (Figure("Models finished from one trunk, and one cosine run on its way.", "training tokens",
                                  "bits per byte", series),), notes)  # fmt: skip
