"""Claims are decided by an interval over seeds against a region that was stated before; forms of the data axis are told apart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import curve_fit

from windtunnel.base.errors import UserError
from windtunnel.laws.data_axis import fit_axis
from windtunnel.pretrain.branch import whole_run
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.tunnel.claims import Part, Region, decide, together
from windtunnel.tunnel.replica import SCALES, Model, scale_of

BELOW = Region(high=0.5)


@pytest.mark.parametrize(
    ("values", "region", "verdict"),
    [
        ((0.1, 0.2, 0.15), BELOW, "holds"),
        ((0.9, 1.1, 1.0), BELOW, "does not hold"),
        ((0.1, 0.9, 0.5), BELOW, "cannot tell"),
        ((0.1,), BELOW, "cannot tell"),
        ((0.5, 0.5), BELOW, "cannot tell"),
        ((-0.1, 0.1, 0.0), Region(-1, 1), "holds"),
        ((-3.0, -3.1, -2.9), Region(-1, 1), "does not hold"),
        ((math.inf, math.inf), Region(-1, 1), "does not hold"),
        ((math.inf, 0.0), Region(-1, 1), "cannot tell"),
        ((math.nan, 0.1, 0.1), BELOW, "cannot tell"),
        ((math.nan, math.nan), BELOW, "cannot tell"),
    ],
)
def test_an_interval_inside_the_region_holds_outside_does_not_and_across_cannot_tell(values, region, verdict):
    assert decide(values, region) == verdict
    part = Part("s", "c", "%", region, values)
    assert part.to_dict()["verdict"] == verdict
    assert all(v is None or math.isfinite(v) for v in part.to_dict()["values"])


def test_a_truth_on_the_limit_is_called_wrongly_in_at_most_one_of_twenty_on_each_side():
    draw = np.random.default_rng(0)
    found = [decide(tuple(draw.normal(0.5, 0.2, 3)), BELOW) for _ in range(2000)]
    for verdict in ("holds", "does not hold"):  # three standard errors of a share of .05
        assert found.count(verdict) / len(found) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))


def test_a_claim_is_as_good_as_its_parts():
    good, bad, open_ = (Part("s", "c", "%", BELOW, values) for values in ((0.1, 0.1), (1.0, 1.1), (0.0, 0.9)))
    assert together([good, good]) == "holds"
    assert together([good, open_]) == "cannot tell"
    assert together([open_, bad, good]) == "does not hold"
    assert together([]) == "cannot tell"


@pytest.mark.parametrize("form", ["power", "exponential"])
def test_a_planted_form_is_found_to_its_constants_and_the_other_one_fits_worse(form):
    compute = np.array([1, 2, 3, 4, 5, 6, 7, 8]) * 1e13
    x = compute / 1e13
    planted = 0.4 * x**-0.35 + 1.1 if form == "power" else 0.4 * np.exp(-0.35 * x) + 1.1
    laws = {one: fit_axis(one, compute.tolist(), planted.tolist()) for one in ("power", "exponential")}
    own, other = laws.pop(form), next(iter(laws.values()))
    assert own.floor == pytest.approx(1.1, rel=1e-3)
    assert own.predict(2e14 if form == "power" else 9e13) == pytest.approx(
        0.4 * 20**-0.35 + 1.1 if form == "power" else 0.4 * math.exp(-0.35 * 9) + 1.1, rel=1e-4
    )
    assert own.residual < 1e-5 < other.residual
    assert own.compute_for(own.predict(3.3e13)) == pytest.approx(3.3e13, rel=1e-9)
    assert own.compute_for(own.floor) == math.inf


def test_the_fit_is_scipys_on_noisy_points():
    draw = np.random.default_rng(1)
    x = np.geomspace(1, 30, 9)
    y = (0.5 * x**-0.4 + 1.3) * (1 + draw.normal(0, 1e-3, 9))
    (b, a, floor), _ = curve_fit(lambda x, b, a, c: b * x**-a + c, x, y, (1, 0.3, 1), sigma=y)
    law = fit_axis("power", x.tolist(), y.tolist())
    assert (law.a, law.floor) == (pytest.approx(a, rel=2e-3), pytest.approx(floor, rel=1e-3))
    assert law.b * law.scale**law.a == pytest.approx(b, rel=2e-3)


def test_three_points_and_an_unknown_size_are_refused_in_one_line():
    with pytest.raises(UserError, match="expected four points or more"):
        fit_axis("power", [1, 2, 3], [3, 2, 1])
    with pytest.raises(UserError, match="--size: expected one of tiny, small, medium, paper, got 'huge'"):
        scale_of("huge")


@pytest.fixture
def model(tiny_setting, make_trunk) -> Model:
    """4 steps stand for the paper's 20N."""
    shape = make_trunk(1).shape
    return Model(shape, tiny_setting, 4 * tiny_setting.step_tokens / shape.body, "m")


def test_lengths_of_a_model_are_the_papers_in_its_own_unit(model):
    assert [model.steps(n) for n in (20, 40, 80)] == [4, 8, 16]
    assert model.split(80, 0.025) == (16 - 1, 1)
    trunk = model.trunk(40)
    assert trunk.steps == max(trunk.keep)
    assert {model.split(40, share)[0] for share in (0.025, 0.1, 0.3)} <= set(trunk.keep)
    assert model.trunk(80).key == trunk.key
    assert set(trunk.keep) < set(model.trunk(80).keep)
    for scale in SCALES.values():
        assert {scale.model, scale.ladder[0]} <= set(scale.ladder)


@pytest.mark.parametrize("loop", [False, True])
def test_a_cosine_cut_into_scored_parts_is_bit_for_bit_the_uninterrupted_run(model, tmp_path, eager, tiny_corpus, loop):
    corpora, workshop = {"tiny": tiny_corpus}, Workshop(eager)
    parts, parent, scores = model.cosine(20, (20, 40, 60), loop=loop), None, []
    for i, part in enumerate(parts):
        scores.append(run_stage(part, tmp_path / str(i), corpora, workshop, parent=parent)["scores"])
        parent = checkpoint_path(tmp_path / str(i), part.steps)
    whole = run_stage(whole_run(parts[-1]), tmp_path / "whole", corpora, workshop)
    assert scores[-1] == whole["scores"]
    assert [part.own_steps for part in parts] == [4, 4, 4]


def test_the_stable_rate_kept_is_the_trunk_gone_on_and_scored(model, tmp_path, eager, tiny_corpus):
    corpora, workshop = {"tiny": tiny_corpus}, Workshop(eager)
    trunk = model.trunk(40)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    kept = model.onward(trunk, 40)
    found = run_stage(
        kept, tmp_path / "kept", corpora, workshop, parent=checkpoint_path(tmp_path / "trunk", kept.first_step)
    )
    whole = replace(whole_run(kept), name="whole")
    assert found["scores"] == run_stage(whole, tmp_path / "whole", corpora, workshop)["scores"]
    assert kept.steps == model.steps(40)
    assert {kept.schedule.factor(step) for step in range(3, 9)} == {1.0}
