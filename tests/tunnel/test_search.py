"""The search proposes what its seed and its results say, and nothing else; a scaling study shares its trunks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from windtunnel.base.errors import RecipeError, WindtunnelError
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.train.stage import AdamW
from windtunnel.tunnel.scaling import Decay, scaling_runs
from windtunnel.tunnel.search import Trial, propose, search
from windtunnel.tunnel.space import DEFAULT_SPACE, Axis, apply

SPACE = DEFAULT_SPACE[:2]


def bowl(values: dict[str, float]) -> float:
    """A smooth loss with its minimum at rate 0.02 and init 0.1."""
    return 2 + math.log(values["learning_rate"] / 0.02) ** 2 + 0.3 * math.log(values["init_std"] / 0.1) ** 2


def evaluate(points):
    return [bowl(values) for _, values in points]


def test_a_proposal_is_a_pure_function_of_seed_and_earlier_results():
    first = propose(SPACE, (), 8, 3)
    trials = [Trial(i, values, bowl(values)) for i, values in enumerate(first)]
    assert propose(SPACE, (), 8, 3) == first
    assert propose(SPACE, trials, 4, 3) == propose(SPACE, list(trials), 4, 3)
    assert propose(SPACE, (), 8, 4) != first
    other = [replace(trial, loss=-bowl(trial.values)) for trial in trials]
    assert propose(SPACE, other, 4, 3) != propose(SPACE, trials, 4, 3)
    for values in first:
        assert all(axis.low * 0.999 <= values[axis.name] <= axis.high * 1.001 for axis in SPACE)
        assert all(value == float(f"{value:.4g}") for value in values.values())


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
    with pytest.raises(WindtunnelError, match="all 16 trials of the search failed or diverged"):
        search(SPACE, 16, 2, lambda points: [None] * len(points))
    with pytest.raises(WindtunnelError):
        search(SPACE, 4, 2, lambda points: [math.nan] * len(points))


def test_a_best_value_on_an_edge_of_the_space_is_named():
    found = search(SPACE, 24, 1, lambda points: [2 - values["learning_rate"] for _, values in points])
    assert found.edges[0] == "learning_rate (high)"
    axis = Axis("learning_rate", 0.001, 0.1)
    assert [axis.near_edge(v) for v in (0.001, 0.00105, 0.01, 0.0999)] == ["low", "low", "", "high"]


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
