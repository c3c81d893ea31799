"""Table 1 of arXiv 2404.06395 as it stands there, with the supervised fine-tuning (SFT) that follows each decay. Needs no torch.

A is the larger model of the scale, from an intermediate checkpoint of its trunk; B is the usual one, from its last stable
checkpoint. The paper's 4B, 6B and 12B tokens of SFT stand here as 4N, 6N and 12N: a far larger share of all tokens than there,
since the paper's share would be a handful of steps. SFT starts at the base rate where the decay ended, as in section 6.2.
Differences of losses are in percent of the loss, of exact answers in percentage points, both paired by seed; regions are
stated here, before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from windtunnel.pipeline import finishing
from windtunnel.replication_found import Figure, Found, Series, bits, signed, tuned_rates
from windtunnel.replication_lab import TUNED_AT, Lab
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.stage import Stage
from windtunnel.tunnel.claims import AS_GOOD, Part, Region, percent

QUESTIONS = 75
"""Computed questions of each task that a model answers."""
_SAME_POINTS = 2.0
"""Percentage points: the largest gain of B-2 over B-1 in table 1 is 0.5."""
_INTERMEDIATE = 20


@dataclass(frozen=True)
class Arm:
    """One row of table 1: its model, whether better data are in its decay, and its tokens of SFT in the paper's N."""

    name: str
    better: bool
    tuned: int

    @property
    def larger(self) -> bool:
        return self.name.startswith("A")


ARMS = (Arm("A-1", False, 4), Arm("A-2", True, 4), Arm("B-1", False, 6), Arm("B-2", False, 12), Arm("B-3", True, 6))
Rows = Mapping[str, Sequence[Stage]]
"""Stages of each arm, one a seed."""
Accuracies = Mapping[str, Sequence[float]]
"""Percent of exact answers of each arm, one a seed; not a number where a run failed."""


def two_stage_sft(lab: Lab) -> Found:
    """Five models a seed: where better data stand, in the decay or only in SFT, and twice the SFT (table 1)."""
    mixture, chats = lab.better(), lab.chats()
    if mixture is None or chats is None:
        missing = "decay with a mixture of its own" if mixture is None else "sft branch"
        return Found((), notes=(f"the recipe has no {missing}",))
    trunks, decays, tuned = _stages(lab)
    lab.train(
        "decays on two kinds of data, each with SFT after it",
        [*trunks, *(s for rows in (decays, tuned) for row in rows.values() for s in row)],
    )
    on = dict(lab.program.recipe.branch[chats].mixture or {})
    exact = _exact_answers(lab, tuned) if _computed(lab, on) else {}
    parts = _loss_parts(lab, tuned, on) + (_exact_parts(exact) if exact else [])
    return Found(tuple(parts), (_figure(lab, decays, tuned, on),), _notes(lab, tuned, exact, on))


def _stages(lab: Lab) -> tuple[list[Stage], Rows, Rows]:
    """Trunks, then each arm's decays and its models after SFT."""
    trunks: list[Stage] = []
    decays: dict[str, list[Stage]] = {arm.name: [] for arm in ARMS}
    tuned: dict[str, list[Stage]] = {arm.name: [] for arm in ARMS}
    for larger, length in ((True, _INTERMEDIATE), (False, TUNED_AT)):
        for model in lab.models("wsd", lab.scale.larger if larger else None):
            trunk = model.trunk(length)
            trunks.append(trunk)
            for arm in (arm for arm in ARMS if arm.larger == larger):
                decay = model.decay(trunk, length, mixture=lab.better() if arm.better else None)
                decays[arm.name].append(decay)
                name = f"{model.name}-sft-{arm.name.lower()}"
                tuned[arm.name].append(lab.tune(model, decay, arm.tuned, name))
    return trunks, decays, tuned


def _gaps(lab: Lab, tuned: Rows, a: str, b: str, on: Mapping[str, float]) -> tuple[float, ...]:
    """How much higher the loss of arm ``a`` is than that of ``b``, in percent, one a seed."""
    return tuple(percent(lab.loss(x, on), lab.loss(y, on)) for x, y in zip(tuned[a], tuned[b], strict=True))


def _loss_parts(lab: Lab, tuned: Rows, on: Mapping[str, float]) -> list[Part]:
    said = (
        ("A-2", "A-1", "After equal SFT better data in the decay lower the loss on assistant tokens (A)", Region(high=-AS_GOOD)),
        ("B-3", "B-1", "After equal SFT better data in the decay lower the loss on assistant tokens (B)", Region(high=-AS_GOOD)),
        ("B-2", "B-1", "Twice the SFT hardly lowers the loss on assistant tokens", Region(low=-AS_GOOD)),
        ("B-3", "B-2", "Better data in the decay do more for it than twice the SFT", Region(high=0.0)),
    )  # fmt: skip
    return [
        Part(says, f"{a}'s loss above {b}'s on {', '.join(on)}", "%", region, _gaps(lab, tuned, a, b, on))
        for a, b, says, region in said
    ]


def _exact_parts(exact: Accuracies) -> list[Part]:
    said = (
        ("A-2", "A-1", "After equal SFT better data in the decay give more exact answers (A)", Region(low=0.0)),
        ("B-3", "B-1", "After equal SFT better data in the decay give more exact answers (B)", Region(low=0.0)),
        ("B-2", "B-1", "Twice the SFT hardly gives more exact answers", Region(high=_SAME_POINTS)),
    )  # fmt: skip
    return [
        Part(says, f"{a}'s held-out questions answered right less {b}'s", "points", region,
             tuple(x - y for x, y in zip(exact[a], exact[b], strict=True)))
        for a, b, says, region in said
    ]  # fmt: skip


def _computed(lab: Lab, chats: Mapping[str, float]) -> bool:
    """Whether the chats hold computed questions: a model that has learnt none answers none."""
    recipe = lab.program.recipe
    return any(source.startswith("made:exact/") for name in chats for source in recipe.corpus[name].source)


def _exact_answers(lab: Lab, tuned: Rows) -> Accuracies:
    """Percent of held-out computed questions that each model answers right; what is known is not asked again."""
    desk, program = lab.desk, lab.program
    assert program.prepared is not None
    whole = {s.key: s for row in tuned.values() for s in row if "failed" not in lab.results[s.key]}
    known = {key: desk.book.fact(program.name, "exact", stage.folder_name) for key, stage in whole.items()}
    todo = {key: whole[key] for key, fact in known.items() if fact is None or fact["questions"] != QUESTIONS}
    if todo:
        with desk.screen.console.status(f"replicate: {len(todo)} models answer questions"):
            found = finishing(
                "exact", tokenizer=str(desk.home.root / program.prepared.tokenizer), template=lab.template, count=QUESTIONS,
                checkpoints={key: str(checkpoint_path(desk.run_folder(s), s.steps)) for key, s in todo.items()},
            )  # fmt: skip
        with desk.book as book:
            for key, score in found.items():
                known[key] = {**score, "questions": QUESTIONS}
                book.put_fact(program.name, "exact", whole[key].folder_name, known[key])
    shares = {key: 100.0 * fact["all"]["accuracy"] for key, fact in known.items() if fact is not None}
    return {name: [shares.get(stage.key, math.nan) for stage in row] for name, row in tuned.items()}


def _figure(lab: Lab, decays: Rows, tuned: Rows, on: Mapping[str, float]) -> Figure:
    """Loss on assistant tokens over the tokens of SFT, seeds averaged."""
    series = []
    models = (("A", lab.scale.larger), ("B", lab.scale.model))
    for word, model, better in ((*model, better) for model in models for better in (False, True)):
        arms = [arm for arm in ARMS if arm.name[0] == word and arm.better == better]
        points = [(0.0, decays[arms[0].name]), *((float(tuned[a.name][0].tokens), tuned[a.name]) for a in arms)]
        data = "better data" if better else "trunk's data"
        mean = tuple((x, bits(fmean(lab.loss(stage, on) for stage in row))) for x, row in points)
        series.append(Series(f"{word}, {model}: {data}", mean))
    caption = (
        f"Held-out loss on assistant tokens over the length of SFT, after decays on two kinds of data; "
        f"{lab.count} seeds averaged."
    )
    return Figure(caption, "tokens of SFT", "bits per byte", tuple(series))


def _notes(lab: Lab, tuned: Rows, exact: Accuracies, on: Mapping[str, float]) -> tuple[str, ...]:
    """Every arm in one line, what the trunk's text pays, and each held-out corpus."""
    out = []
    for arm in ARMS:
        row = tuned[arm.name]
        right = f", {fmean(exact[arm.name]):.1f} % of exact answers" if exact else ""
        loss, own = (bits(fmean(lab.loss(s, mixture) for s in row)) for mixture in (on, lab.mixture))
        out.append(f"{arm.name}: {loss:.4f} bits per byte on assistant tokens, {own:.4f} on the trunk's text{right}")
    for a, b in (("A-2", "A-1"), ("B-3", "B-1")):
        each = [
            f"{name} {signed(fmean(_gaps(lab, tuned, a, b, {name: 1.0})))}"
            for name in sorted({*on, *lab.mixture, *dict(lab.better() or ())})
        ]
        out.append(f"{a}'s loss above {b}'s by held-out corpus: {', '.join(each)}")
    out.append("SFT is 4N, 6N (B-2: 12N) tokens here, a far larger share of all tokens than the paper's 4B, 6B and 12B")
    return (*(note for note in out if "nan" not in note), tuned_rates(lab, "wsd"))
