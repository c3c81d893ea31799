"""A claim of our own beside arXiv 2404.06395, section 4.2: the schedule that ``law schedule`` designs, tried by training.

The law is fitted to runs of the seed that tunes rates and decides nothing: a stable run, decays of it, and one cosine. The decay
that it chooses is then trained on the judged seeds beside a linear decay over the last tenth and a cosine, at equal tokens, each
at its own tuned rate. Needs no torch.
"""

from __future__ import annotations

from statistics import fmean

from windtunnel.curve_runs import curve_of
from windtunnel.laws.curve_fit import fit_curves
from windtunnel.laws.curve_law import Curve
from windtunnel.laws.design import DecayRule, Design, design
from windtunnel.laws.fit import LawError
from windtunnel.replication_found import Figure, Found, Series, bits, signed, tuned_rates
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.train.stage import Stage
from windtunnel.tunnel.claims import AS_GOOD, Part, Region, percent
from windtunnel.tunnel.replica import PERIODS

USUAL = DecayRule(0.1, "linear", 0.1)
_SHARES = (0.1, 0.3)
_POINTS = 40
DESIGNED, LINEAR = "designed", "linear"


def designed(lab: Lab) -> Found:
    """The designed decay against a linear tenth and a cosine, at equal tokens."""
    try:
        found = _design(lab)
    except LawError as error:
        return Found((), notes=(str(error),))
    rules = {DESIGNED: found.chosen, LINEAR: USUAL}
    ours = {
        kind: [
            lab.model(lab.scale.model, seed, lab.tuned(kind, rule)).whole(kind, TUNED_AT, rule) for seed in lab.seeds
        ]
        for kind, rule in rules.items()
    }
    cosines = [m.cosine(TUNED_AT, PERIODS[: PERIODS.index(TUNED_AT) + 1]) for m in lab.models("cosine")]
    lab.train("the designed schedule", [*ours[DESIGNED], *ours[LINEAR], *(s for row in cosines for s in row)])
    losses = {kind: [lab.loss(stage) for stage in stages] for kind, stages in ours.items()}
    losses["cosine"] = [lab.loss(row[-1]) for row in cosines]
    gains = tuple(percent(b, a) for a, b in zip(losses[DESIGNED], losses[LINEAR], strict=True))
    above = tuple(percent(a, b) for a, b in zip(losses[DESIGNED], losses["cosine"], strict=True))
    parts = (
        Part(
            f"At {TUNED_AT}N the decay that the law designs ends below a linear last tenth, the rate of each tuned",
            "the linear tenth's loss above the designed one's", "%", Region(low=0.0), gains,
        ),
        Part(
            f"At {TUNED_AT}N the decay that the law designs ends as low as the cosine with T = S, the rate of each tuned",
            "the designed one's loss above the cosine's", "%", Region(high=AS_GOOD), above,
        ),
    )  # fmt: skip
    gain, level = found.gain, found.usual_expected
    promised = [signed(100 * value / level) for value in (gain.gain, gain.low90, gain.high90)]
    notes = (
        f"designed: {found.chosen}; the law promised {promised[0]} [{promised[1]}, {promised[2]}] of the training loss over "
        f"the linear tenth at one rate and {'could tell' if found.tells else 'could not tell'} them apart",
        *found.notes,
        tuned_rates(lab, DESIGNED, LINEAR, "cosine"),
    )
    series = tuple(
        Series(kind, tuple((rate, bits(value)) for rate, value in lab.grids[kind].items()))
        for kind in (DESIGNED, LINEAR, "cosine")
    )
    means = ", ".join(f"{kind} {bits(fmean(values)):.4f}" for kind, values in losses.items())
    caption = f"Held-out loss at {TUNED_AT}N over the base learning rate of each schedule, one seed; mean of the judged: {means}."
    figure = Figure(caption, "base learning rate", "bits per byte", series, log_x=True)
    return Found(parts, (figure,), notes)


def _design(lab: Lab) -> Design:
    """The decay that a law of runs of the tuning seed chooses for the length at which all are compared."""
    model = lab.model(lab.scale.model, lab.program.recipe.seed, lab.tuned("wsd"))
    trunk = model.trunk(TUNED_AT)
    runs = [trunk, *(model.decay(trunk, TUNED_AT, share) for share in _SHARES), *model.cosine(TUNED_AT, (TUNED_AT,))]
    lab.train("runs for the law of curves", runs)
    stretch = max(1, round(0.9 * model.steps(TUNED_AT) / _POINTS))
    curves = [found for stage in runs if (found := recorded(lab, stage, stretch)) is not None]
    law = fit_curves(curves)
    return design(law, curves, model.steps(TUNED_AT), warmup=model.warm.warmup, usual=USUAL)


def recorded(lab: Lab, stage: Stage, stretch: int) -> Curve | None:
    """The training losses of a run, from the lab book; None if it failed or is too short."""
    row = lab.desk.book.run(lab.desk.run_id(stage))
    return curve_of(lab.desk.book, row, stretch) if row and row["status"] == "done" else None
