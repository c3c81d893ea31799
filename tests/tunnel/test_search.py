"""The search proposes what its seed and its results say, and nothing else; a scaling study shares its trunks."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from windtunnel.base.errors import RecipeError, UserError, WindtunnelError
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.train.stage import AdamW, Muon
from windtunnel.tunnel.propose import BLIND
from windtunnel.tunnel.scaling import Decay, scaling_runs
from windtunnel.tunnel.search import Trial, numbered_points, propose, search
from windtunnel.tunnel.space import (
    DEFAULT_SPACE,
    LIMITS,
    Axis,
    apply,
    apply_to_shape,
    from_dicts,
    inside,
    space_of,
    to_dicts,
)

SPACE = DEFAULT_SPACE[:2]
WIDE = space_of(
    {"learning_rate": [0.001, 0.1], "beta2": [0.95, 0.999], "warmup": [0.005, 0.05], "weight_decay": [0.01, 1.0],
     "qk_norm": [False, True], "optimizer": ["adamw", "muon"]}
)  # fmt: skip
NUMERIC = [axis for axis in WIDE if isinstance(axis, Axis)]
SAMPLERS = ("tpe", "gp", "sobol", "random")


def bowl(values: dict[str, float]) -> float:
    """A smooth loss with its minimum at rate 0.02 and init 0.1."""
    return 2 + math.log(values["learning_rate"] / 0.02) ** 2 + 0.3 * math.log(values["init_std"] / 0.1) ** 2


def evaluate(points):
    return [bowl(values) for _, values in points]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_proposal_is_a_pure_function_of_seed_and_earlier_results(sampler):
    first = propose(SPACE, (), 8, 3, sampler)
    trials = [Trial(i, values, bowl(values)) for i, values in enumerate(first)]
    assert propose(SPACE, (), 8, 3, sampler) == first
    later = propose(SPACE, trials, 4, 3, sampler)
    assert later == propose(SPACE, list(trials), 4, 3, sampler)
    assert propose(SPACE, trials, 2, 3, sampler) == later[:2]  # a shorter round begins as a longer one
    assert propose(SPACE, (), 8, 4, sampler) != first
    other = [replace(trial, loss=-bowl(trial.values)) for trial in trials]
    assert (propose(SPACE, other, 4, 3, sampler) == later) == (sampler in BLIND)
    for values in first + later:
        assert all(axis.low * 0.999 <= values[axis.name] <= axis.high * 1.001 for axis in SPACE)
        assert all(value == float(f"{value:.4g}") for value in values.values())


def test_proposals_are_those_of_earlier_versions():
    """Values that version 0 proposed: a search that was begun with it goes on."""
    first = propose(DEFAULT_SPACE, (), 8, 1)
    assert first[2] == {"learning_rate": 0.0523, "init_std": 0.04254, "scale_emb": 2.119, "scale_depth": 1.594}
    later = propose(DEFAULT_SPACE, [Trial(i, v, sum(v.values())) for i, v in enumerate(first)], 2, 1)
    assert later[1] == {"learning_rate": 0.07564, "init_std": 0.09588, "scale_emb": 2.675, "scale_depth": 0.488}


def test_the_gaussian_process_proposes_in_a_process_of_its_own_and_the_driver_stays_without_torch():
    trials = [Trial(i, values, bowl(values)) for i, values in enumerate(propose(SPACE, (), 8, 3))]
    trials[3] = replace(trials[3], loss=None)
    code = (
        "import json, sys; from windtunnel import study; from windtunnel.tunnel.propose import Trial, propose_apart\n"
        "from windtunnel.tunnel.space import DEFAULT_SPACE\n"
        "trials = [Trial(*one) for one in json.loads(sys.argv[1])]\n"
        "points = propose_apart(DEFAULT_SPACE[:2], trials, 3, 3, 'gp')\n"
        "print(json.dumps(['torch' in sys.modules, points]))"
    )
    told = json.dumps([[t.number, t.values, t.loss] for t in trials])
    done = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, propose(SPACE, trials, 3, 3, "gp")]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_covers_a_space_of_all_kinds_of_axes(sampler):
    trials = [Trial(i, values, values["learning_rate"]) for i, values in enumerate(propose(WIDE, (), 16, 0, sampler))]
    points = [t.values for t in trials] + propose(WIDE, trials, 4, 0, sampler)
    for axis in NUMERIC:
        values = [point[axis.name] for point in points]
        assert all(axis.low <= value <= axis.high for value in values)
        assert len({int(4 * min(axis.place(value), 0.999)) for value in values[:16]}) >= 3
    for name, options in (("qk_norm", [False, True]), ("optimizer", ["adamw", "muon"])):
        assert sorted({point[name] for point in points}) == options
        assert {type(point[name]) for point in points} == {type(options[0])}
    assert sum(point["beta2"] > 0.993 for point in points[:16]) >= 5  # half of the axis: the log of 1 − β₂
    assert from_dicts(json.loads(json.dumps(to_dicts(WIDE)))) == WIDE


def test_sobol_and_random_points_are_known_before_any_result():
    """What lets the parts of a study be trained in different places."""
    for sampler in sorted(set(BLIND) - {"grid"}):
        points = numbered_points(SPACE, 14, 5, sampler)
        found = search(SPACE, 14, 5, evaluate, sampler=sampler)
        assert [(t.number, t.values) for t in found.trials] == points
        assert numbered_points(SPACE, 20, 5, sampler)[:14] == points
        assert len({str(values) for _, values in points}) == 14


def test_a_grid_is_every_combination_of_places_ends_included_and_of_options():
    space = (*SPACE, *(axis for axis in WIDE if axis.name == "qk_norm"))
    points = propose(space, (), 50, 0, "grid")
    assert len({str(point) for point in points}) == 50
    rates = sorted({point["learning_rate"] for point in points})
    assert len(rates) == 5
    assert (rates[0], rates[-1]) == (SPACE[0].low, SPACE[0].high)
    steps = [math.log(b / a) for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * 4, rel=1e-3)
    found = search(
        space, 50, 0, evaluate, sampler="grid", first={"learning_rate": 0.01, "init_std": 0.1, "qk_norm": True}
    )
    assert [t.values for t in found.trials] == points
    assert found.best.loss == min(bowl(point) for point in points)
    with pytest.raises(
        RecipeError, match=r"tunnel\.trials: expected the size of a grid over 3 axes, got 40; write 32 or 50"
    ):
        propose(space, (), 40, 0, "grid")


@pytest.mark.parametrize("per_round", [1, 3, 4])
def test_a_longer_search_begins_with_the_trials_of_a_shorter_one(per_round):
    for sampler in ("tpe", "sobol"):
        long = search(SPACE, 17, 5, evaluate, per_round=per_round, sampler=sampler)
        for fewer in (1, 6, 11):
            short = search(SPACE, fewer, 5, evaluate, per_round=per_round, sampler=sampler)
            assert short.trials == long.trials[:fewer]


def test_a_search_that_is_killed_after_any_round_and_started_again_ends_with_the_same_table():
    whole = search(SPACE, 20, 5, evaluate)
    rounds = 4
    for cut in range(1, rounds):
        kept: dict[int, float] = {}
        trained: list[int] = []

        def killed(points, kept=kept, trained=trained, cut=cut, calls=[0]):  # noqa: B006
            calls[0] += 1
            if calls[0] > cut:
                raise KeyboardInterrupt
            for number, values in points:
                kept[number] = bowl(values)
            return [kept[number] for number, _ in points]

        with pytest.raises(KeyboardInterrupt):
            search(SPACE, 20, 5, killed)

        def resumed(points, kept=kept, trained=trained):
            for number, values in points:
                if number not in kept:
                    trained.append(number)
                    kept[number] = bowl(values)
            return [kept[number] for number, _ in points]

        assert search(SPACE, 20, 5, resumed) == whole
        assert set(trained) == set(range(20)) - set(range(min(trained)))


def test_a_search_finds_the_valley_and_beats_its_first_round():
    found = search(SPACE, 24, 1, evaluate, first={"learning_rate": 0.005, "init_std": 0.05})
    assert found.trials[0].values == {"learning_rate": 0.005, "init_std": 0.05}
    assert [t.number for t in found.trials] == list(range(24))
    assert found.best.loss <= min(t.loss for t in found.trials[:8])
    assert found.best.loss < 2.1
    assert found.edges == ()


def test_a_trial_that_diverged_is_kept_and_where_all_diverge_it_is_said():
    def half(points):
        return [None if values["learning_rate"] > 0.02 else bowl(values) for _, values in points]

    found = search(SPACE, 16, 2, half)
    assert any(t.loss is None for t in found.trials)
    assert found.best.values["learning_rate"] <= 0.02
    late = found.trials[8:]
    assert sum(t.values["learning_rate"] > 0.02 for t in late) < len(late) / 2  # they tell where not to look
    with pytest.raises(WindtunnelError, match=r"^tunnel\.space: expected a trial with a loss, got 16, all failed or"):
        search(SPACE, 16, 2, lambda points: [None] * len(points))
    with pytest.raises(WindtunnelError):
        search(SPACE, 4, 2, lambda points: [math.nan] * len(points))


def test_a_best_value_on_an_edge_of_the_space_is_named():
    found = search(SPACE, 24, 1, lambda points: [2 - values["learning_rate"] for _, values in points])
    assert found.edges[0] == "learning_rate (high)"
    with pytest.raises(
        UserError, match=r"tunnel.space.learning_rate: expected the best value inside.* at the high end of"
    ):
        search(SPACE, 24, 1, lambda points: [2 - values["learning_rate"] for _, values in points], on_edge="refuse")
    axis = Axis("learning_rate", 0.001, 0.1)
    assert [axis.near_edge(v) for v in (0.001, 0.00105, 0.01, 0.0999)] == ["low", "low", "", "high"]


def test_a_search_that_may_widen_its_space_finds_a_valley_beyond_it_and_stops_widening_there():
    beyond = (Axis("learning_rate", 0.0005, 0.004), SPACE[1])
    seen: list[int] = []

    def counted(points):
        seen.extend(number for number, _ in points)
        return evaluate(points)

    found = search(beyond, 16, 1, counted, on_edge="widen")
    assert seen == [t.number for t in found.trials] == list(range(len(seen)))
    assert len(seen) in (20, 24, 28)
    assert found.space[0].high > 0.01
    assert found.space[0].low == beyond[0].low
    assert found.edges == ()
    assert search(beyond, 16, 1, evaluate, on_edge="widen") == found
    inner = search(SPACE, 24, 1, evaluate, on_edge="widen")
    assert inner == search(SPACE, 24, 1, evaluate)  # nothing lies on an edge: nothing changes
    assert inner == search(SPACE, 24, 1, evaluate, on_edge="refuse")


@pytest.mark.parametrize("axis", NUMERIC, ids=lambda axis: axis.name)
def test_an_axis_grows_by_half_of_its_length_and_never_beyond_what_makes_sense(axis):
    for side in ("low", "high"):
        wider = axis.wider(side)
        assert wider.place(getattr(axis, side)) == pytest.approx(1 / 3 if side == "low" else 2 / 3, abs=0.01)
        assert getattr(wider, "high" if side == "low" else "low") == getattr(axis, "high" if side == "low" else "low")
        for _ in range(40):
            wider = wider.wider(side)
        assert getattr(wider, side) == getattr(LIMITS[axis.name], side)


def test_a_starting_point_outside_the_space_is_moved_into_it():
    space = (Axis("learning_rate", 0.02, 0.08), SPACE[1])
    assert inside(space, {"learning_rate": 0.01, "init_std": 0.1}) == {"learning_rate": 0.02, "init_std": 0.1}
    found = search(space, 12, 0, evaluate, first=inside(space, {"learning_rate": 0.01, "init_std": 0.1}))
    assert found.trials[0].values["learning_rate"] == 0.02


def test_as_many_trials_as_asked_for_whatever_the_rounds():
    for number in (1, 3, 7, 9):
        assert len(search(SPACE, number, 0, evaluate, first={"learning_rate": 0.01, "init_std": 0.1}).trials) == number


@pytest.mark.parametrize("bad", [("momentum", 1, 2), ("init_std", 0, 1), ("init_std", 2, 1), ("init_std", 1, math.inf)])
def test_a_space_that_makes_no_sense_is_one_line(bad):
    with pytest.raises(RecipeError, match="tunnel.space"):
        Axis(*bad)


def make_setting() -> Setting:
    return Setting((("a", "hash"),), (("a", 1.0),), 32, 4, 3, 7, Parametrization(), AdamW(), ("a",))


def test_found_values_go_where_they_belong_and_leave_the_rest():
    setting = apply(make_setting(), {"learning_rate": 0.02, "init_std": 0.2, "scale_emb": 3.0, "scale_depth": 0.5})
    assert setting.optimizer == AdamW(learning_rate=0.02)
    assert setting.parametrization == Parametrization(init_std=0.2, scale_emb=3.0, scale_depth=0.5)
    assert apply(make_setting(), {}) == make_setting()
    setting = apply(make_setting(), {"weight_decay": 0.3, "beta2": 0.99, "warmup": 0.05}, steps=200)
    assert setting == replace(make_setting(), optimizer=AdamW(weight_decay=0.3, beta2=0.99), warmup=10)
    muon = apply(
        make_setting(), {"optimizer": "muon", "weight_decay": 0.2, "decay": "independent", "learning_rate": 0.01}
    )
    assert muon.optimizer == Muon(weight_decay=0.002, decay="independent")  # at 0.01 as strong as a plain 0.2
    shape = Shape(32, 2, 2, 2, 16, 80, 320, 32)
    assert apply_to_shape(shape, {"qk_norm": True}) == replace(shape, qk_norm=True)
    assert apply_to_shape(shape, {"learning_rate": 1.0}) == shape
    assert apply(make_setting(), {"warmup": 0.05}) == make_setting()  # a share of an unknown length says nothing


def test_a_scaling_study_has_one_trunk_for_each_size_and_seed_and_a_branch_for_each_length():
    shapes = [(str(w), Shape(w, 2, w // 16, w // 16, 16, 2 * w, 320, 32)) for w in (32, 48, 64)]
    tokens, seeds = [12_800, 51_200, 25_600], [7, 1007]
    runs = scaling_runs(shapes, tokens, seeds, make_setting(), Decay(share=0.2))
    assert len(runs) == 6
    assert len({run.trunk.key for run in runs}) == 6
    for run in runs:
        assert [count for count, _ in run.branches] == sorted(tokens)
        for count, branch in run.branches:
            assert branch.start is not None
            assert branch.start.stage == run.trunk.key
            assert branch.start.step in run.trunk.keep
            assert branch.tokens == count
            assert branch.own_steps == round(0.2 * branch.steps)
            assert branch.plan == run.trunk.plan
        assert run.trunk.steps == max(branch.start.step for _, branch in run.branches if branch.start)
    trained = sum(run.trunk.flops + sum(b.flops for _, b in run.branches) for run in runs)
    alone = sum(b.flops / b.own_steps * b.steps for run in runs for _, b in run.branches)
    assert trained < 0.75 * alone  # m trunks instead of m·k whole runs


def test_more_lengths_extend_the_trunks_and_leave_the_branches_that_exist():
    shapes = [("32", Shape(32, 2, 2, 2, 16, 80, 320, 32))]
    few = scaling_runs(shapes, [12_800, 25_600], [7], make_setting(), Decay())
    more = scaling_runs(shapes, [12_800, 25_600, 51_200], [7], make_setting(), Decay())
    assert few[0].trunk.key == more[0].trunk.key
    assert {b.key for _, b in few[0].branches} < {b.key for _, b in more[0].branches}
