"""What a trunk would give if it decayed now: said before, and compared with the branch that is then trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windtunnel import cli
from windtunnel import manage as manage_module
from windtunnel.base.artefact import write_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.runtime import Runtime
from windtunnel.corpus.evaluation_rows import scoring_rows
from windtunnel.corpus.loader import IGNORED
from windtunnel.corpus.store import Corpus
from windtunnel.curve_runs import curve_sets, rule_of, set_for, usual_rule
from windtunnel.decay_now import average_job, read_now, trunk_losses, what_now
from windtunnel.finishing import VERBS as FINISHING
from windtunnel.laws.curve_fit import CurveModel, fit_curves
from windtunnel.laws.curve_law import Curve, CurveLaw
from windtunnel.laws.design import DecayRule, rates_of
from windtunnel.laws.fit import LawError
from windtunnel.laws.now import decay_now
from windtunnel.manage import status
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trunk_stage
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import AdamW, Stage

STEPS, DECAY = 240, 60


@dataclass
class TinyHome:
    """A home with two proxies, their branches and a trunk, trained right here; the trunk's own branch is not in it."""

    root: Path
    corpus: Corpus
    workshop: Workshop
    setting: Setting

    def train(self, stage: Stage, study: str, parent: Stage | None = None) -> list[float]:
        folder = self.root / "programs" / "p" / "runs" / stage.folder_name
        folder.mkdir(parents=True)
        before = None if parent is None or stage.start is None else checkpoint_path(self.path(parent), stage.start.step)
        result = run_stage(stage, folder, {"tiny": self.corpus}, self.workshop, parent=before)
        losses = [(step, "loss", values["loss"]) for step, values in read_metrics(folder)]
        with LabBook(self.root / "labbook.sqlite") as book:
            book.put_run(
                f"p/{stage.folder_name}", program="p", kind=stage.kind, name=stage.name, study=study, status="done",
                folder=str(folder.relative_to(self.root)), config=stage.to_dict(), steps=result["step"], started=1.0,
                parent=f"p/{parent.folder_name}" if parent else "", tokens=result["tokens"],
            )  # fmt: skip
            book.put_metrics(f"p/{stage.folder_name}", losses)
        return [value for _, _, value in losses if value is not None]

    def path(self, stage: Stage) -> Path:
        return self.root / "programs" / "p" / "runs" / stage.folder_name

    def shape(self, width: int) -> Shape:
        return Shape(
            width=width, layers=2, heads=width // 16, kv_heads=width // 16, head_dim=16, ff=80, vocab=320, base_width=32
        )


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> tuple[TinyHome, Stage]:
    setting = Setting(
        corpora=(("tiny", tiny_corpus.hash),), mixture=(("tiny", 1.0),), row=32, batch=16, warmup=10, seed=5,
        parametrization=Parametrization(), optimizer=AdamW(learning_rate=0.03), score=(), score_tokens=600,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("now")
    made = TinyHome(root, tiny_corpus, Workshop(Runtime(compiled=False)), setting)
    for width in (16, 32):
        trunk = trunk_stage(f"proxy-{width}", made.shape(width), setting, STEPS, [STEPS // 2, STEPS])
        made.train(trunk, "scaling")
        for at in (STEPS // 2, STEPS):
            made.train(decay_stage(trunk, f"proxy-{width}-{at}", setting, at=at, steps=at // 4), "scaling", trunk)
    target = replace(trunk_stage("trunk", made.shape(48), setting, STEPS, save_every=20), keep_last=5)
    made.train(target, "")
    write_json(
        root / "programs" / "p" / "prepared.json",
        {"tokenizer": "t", "corpora": {"tiny": {"folder": str(tiny_corpus.path)}}},
    )
    return made, target


def trunk_row(home: TinyHome) -> tuple[LabBook, dict[str, Any]]:
    book = LabBook(home.root / "labbook.sqlite", readonly=True)
    (row,) = book.runs(study="", kind="trunk")
    return book, row


def test_what_is_said_holds_the_branch_that_is_then_trained(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, target = tiny_home
    book, row = trunk_row(home)
    now = what_now(home.root, book, row)
    assert now is not None
    assert (now.step, now.decay, now.rule.form) == (STEPS, DECAY, "exponential")
    branch = decay_stage(target, "later", home.setting, at=STEPS, steps=DECAY)
    losses = home.train(branch, "aside", target)
    reached = float(np.mean(losses[-8:]))
    assert now.low90 < reached < now.high90
    assert now.expected < now.loss
    assert (now.high90 - now.low90) / now.expected < 0.25
    text = "\n".join(read_now(home.root, book, row).lines())
    assert "decayed now (step 240, exponential over 60 steps)" in text
    assert "× the largest size behind the law" in text


def test_averaging_the_last_checkpoints_gains_too_and_status_shows_both(
    tiny_home: tuple[TinyHome, Stage], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, _ = tiny_home
    monkeypatch.setattr(manage_module, "finishing", lambda verb, **job: FINISHING[verb](job))
    data = status(home.root, average=True).data["p"]["decay_now"]["trunk"]
    averaged = data["averaged"]
    assert averaged["steps"] == [160, 180, 200, 220, 240]
    assert set(averaged["averages"]) == {"2", "3", "4", "5"}
    assert averaged["drop"] < 0
    assert averaged["averages"][str(averaged["best"])] == min(averaged["averages"].values())
    assert data["law"]["expected"] < data["law"]["loss"]
    assert cli._run(["status", "--home", str(home.root)]) == 0
    out = capsys.readouterr().out
    assert "decayed now (step 240" in out
    assert "mean of its last" in out


def test_the_mean_of_checkpoints_is_the_mean_of_their_weights(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    _, row = trunk_row(home)
    job = average_job(home.root, row, last=2)
    twice = FINISHING["average"]({**job, "checkpoints": [job["checkpoints"][-1]] * 3})
    assert twice["averages"]["3"] == pytest.approx(twice["newest"], rel=1e-6)
    other = FINISHING["average"]({**job, "checkpoints": job["checkpoints"][::-1]})
    assert FINISHING["average"](job)["averages"]["2"] == pytest.approx(other["averages"]["2"], rel=1e-5)
    with pytest.raises(UserError, match="at least two checkpoints to average, found 1"):
        average_job(home.root, row, last=1)


def test_the_law_speaks_in_bits_per_byte_of_the_trunks_text_too(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    without = read_now(home.root, book, row)
    assert without.bits() is None
    assert "bits per byte" not in "\n".join(without.lines()[:1])
    rows = scoring_rows(home.corpus.heldout, 32, None, batch=4)  # what the scorer predicts
    tokens, size = sum(int((part.targets != IGNORED).sum()) for part in rows), int(home.corpus.heldout.bytes.sum())
    held = home.corpus.heldout
    assert tokens == len(held.tokens) - (len(held.offsets) - 1), "as a prepared corpus counts them"
    with LabBook(home.root / "labbook.sqlite") as written:
        written.put_fact("p", "corpus", "tiny", {"heldout_predictions": tokens, "heldout_bytes": size})
    found = read_now(home.root, book, row)
    with LabBook(home.root / "labbook.sqlite") as written:
        written.put_fact("p", "corpus", "tiny", {})
    law, said = found.law, found.bits()
    assert law is not None
    assert said is not None
    for nats, bits in zip(
        (law.expected, law.low90, law.high90, law.loss),
        (said["expected"], *said["interval90"], said["loss"]),
        strict=True,
    ):
        assert bits * math.log(2) * size == pytest.approx(nats * tokens)
    assert f"{said['expected']:.4f} [{said['interval90'][0]:.4f}, " in found.lines()[0]
    assert found.to_dict()["law"]["bits_per_byte"] == said


def test_without_a_fitting_study_one_line_says_why(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    other = {**row, "config": {**row["config"], "batch": 999}}
    empty = {**row, "program": "other"}
    for asked, words in ((other, "differ from this trunk in batch, text"), (empty, "windtunnel tunnel scale RECIPE")):
        now = read_now(home.root, book, asked)
        assert now.law is None
        first, *rest = now.lines()
        assert first.startswith("  decayed now: nothing can be said, ")
        assert words in first
        assert not any("decayed now" in line for line in rest)
        assert now.to_dict()["why"] in first
    assert read_now(home.root, book, row).why == ""


def test_laws_are_fitted_once_and_read_back(tiny_home: tuple[TinyHome, Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    first = what_now(home.root, book, row)

    def never(*_: Any, **__: Any) -> CurveModel:
        raise AssertionError("fitted again")

    monkeypatch.setattr("windtunnel.decay_now.fit_curves", never)
    assert what_now(home.root, book, row) == first


def test_curves_of_a_home_are_grouped_by_size_and_name_what_they_leave_out(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    rows = book.runs(study="scaling")
    sets = curve_sets(book, rows)
    assert [len(made.curves) for made in sets] == [3, 3]
    assert [made.decays for made in sets] == [2, 2]
    branch = next(c for c in sets[0].curves if c.name.endswith("-240"))
    assert branch.steps[0] > STEPS, "a branch's curve has its own updates only"
    assert branch.rates[: STEPS // 2] == pytest.approx(0.03 * np.minimum(1, np.arange(1, STEPS // 2 + 1) / 10))
    failed = [{**r, "status": "failed", "reason": "not finite"} if r["name"].endswith("-120") else r for r in rows]
    assert [len(made.left_out) for made in curve_sets(book, failed)] == [1, 1]
    assert "failed (not finite)" in curve_sets(book, failed)[0].left_out[0]
    with pytest.raises(UserError, match="expected at least two runs alike"):
        set_for(book, "trunk", {**row, "config": {**row["config"], "batch": 999}})


def test_the_decay_to_beat_is_the_runs_own_then_its_newest_branchs_and_a_named_one_comes_first(
    tiny_home: tuple[TinyHome, Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    rows = {r["name"]: r for r in book.runs(study="scaling")}
    own = DecayRule(0.2, "exponential", rows["proxy-32-240"]["config"]["schedule"]["floor"])
    for name in ("proxy-32", "proxy-32-240"):
        assert usual_rule(book, rows[name]) == (own, rows["proxy-32-240"]["id"])
    assert usual_rule(book, rows["proxy-32-120"]) == (own, rows["proxy-32-120"]["id"])
    assert rule_of(rows["proxy-32"]["config"]) is None
    halved = {
        **rows["proxy-32-240"]["config"],
        "schedule": {**rows["proxy-32-240"]["config"]["schedule"], "half_life": 30},
    }
    assert rule_of(halved) == DecayRule(0.2, "exponential", 0.25), "two half-lives in 60 steps"
    assert usual_rule(book, {**row, "program": "other"}) is None

    ask = ["law", "schedule", "p/proxy-32", "--length", "150k", "--home", str(home.root), "--json"]
    said = {}
    for more in ((), ("--against", "cosine:30%:0.2")):
        assert cli._run([*ask, *more]) == 0
        said[more] = json.loads(capsys.readouterr().out)
    default, named = said.values()
    assert default["usual"] == {"share": 0.2, "form": "exponential", "floor": own.floor}
    assert any(rows["proxy-32-240"]["id"] in note for note in default["notes"])
    assert named["usual"] == {"share": 0.3, "form": "cosine", "floor": 0.2}
    assert not any("usual decay is that of" in note for note in named["notes"])


def test_a_fit_takes_every_schedule_before_a_second_seed_of_one(
    tiny_home: tuple[TinyHome, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = tiny_home
    book, _ = trunk_row(home)
    rows = [r for r in book.runs(study="scaling") if "32" in r["name"]]
    twins = [{**r, "name": f"{r['name']}-twin"} for r in rows]
    (made,) = curve_sets(book, [rows[0], twins[0], *rows[1:], *twins[1:]])
    assert [c.name for c in made.curves] == [*(r["name"] for r in rows), *(r["name"] for r in twins)]
    monkeypatch.setattr("windtunnel.curve_runs._MOST", 2)
    made = set_for(book, "p/proxy-32", rows[0])
    assert len(made.curves) == 2
    assert made.left_out == ("1 more runs alike: repeats of these schedules",)


def test_a_diverged_run_is_no_curve(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    book, _ = trunk_row(home)

    class Rising:
        def metrics(self, run: str, name: str) -> tuple[list[int], list[float]]:
            steps, values = book.metrics(run, name)
            return steps, [v + (0.02 * i if "-240" in run else 0) for i, v in enumerate(values)]

    made = curve_sets(Rising(), book.runs(study="scaling"))  # pyright: ignore[reportArgumentType]
    assert sorted(one.left_out for one in made) == [("proxy-16-240 diverged",), ("proxy-32-240 diverged",)]


# -- planted worlds ------------------------------------------------------------------------------------------------------


def law_at(size: float) -> CurveLaw:
    return CurveLaw(
        "power", {"L0": 2.0 * size**-0.05, "A": 0.5, "alpha": 0.5, "B": 15.0 * size**0.3, "tau": 20.0, "beta": 0.4}
    )


def model_at(size: float, seed: int) -> CurveModel:
    curves = []
    for name, share in (("flat", None), ("early", 0.2), ("late", 0.3)):
        steps = 600 if name != "early" else 300
        schedule = Schedule(20) if share is None else DecayRule(share).schedule(steps, 20)
        rates = rates_of(schedule, 5e-3, steps)
        at = np.arange(60, steps + 1, 8)
        noise = np.exp(1e-3 * np.random.default_rng(seed).normal(size=len(at)))
        curves.append(Curve(name, rates, at, law_at(size).losses(rates, at) * noise))
    return fit_curves(curves, kernels=("exponential", "power"), fade=0.0, draws=4)


def test_the_drop_of_a_larger_size_is_read_off_the_smaller_ones() -> None:
    models = {size: model_at(size, i) for i, size in enumerate((1.0, 2.0, 4.0))}
    flat = rates_of(Schedule(20), 5e-3, 600)
    noisy = law_at(12.0).losses(flat, np.arange(1, 601)) * np.exp(0.003 * np.random.default_rng(9).normal(size=600))
    rule = DecayRule(0.25)
    now = decay_now(models, noisy, peak=5e-3, warmup=20, rule=rule, size=12.0, longest=600)
    truth = law_at(12.0).final(rates_of(rule.schedule(800, 20), 5e-3, 800))
    assert now.low90 < truth < now.high90
    nearest = decay_now({4.0: models[4.0]}, noisy, peak=5e-3, warmup=20, rule=rule, size=12.0, longest=600)
    assert abs(math.log(now.expected / truth)) < abs(math.log(nearest.expected / truth))
    assert nearest.high90 - nearest.low90 > now.high90 - now.low90
    assert now.notes == (
        "the trunk is 3× the largest size behind the law",
        "the trunk would be 1.33× the longest run behind the law",
    )


@pytest.mark.parametrize("break_it", [lambda m, x: ({}, x), lambda m, x: (m, x[:5])])
def test_without_laws_or_losses_nothing_is_said(break_it: Callable[..., Any]) -> None:
    models, losses = break_it({1.0: model_at(1.0, 0)}, np.full(100, 3.0))
    with pytest.raises(LawError, match="expected laws and at least 10 losses"):
        decay_now(models, losses, peak=5e-3, warmup=2, rule=DecayRule(), size=1.0, longest=600)


def test_a_trunk_without_a_tunnel_has_no_law(tiny_home: tuple[TinyHome, Stage]) -> None:
    home, _ = tiny_home
    book, row = trunk_row(home)
    assert what_now(home.root, book, {**row, "program": "other"}) is None
    assert len(trunk_losses(home.root, row)) == STEPS
