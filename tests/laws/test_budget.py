"""A budget buys the member with the lowest predicted loss, counted in exact FLOPs."""

from __future__ import annotations

import math

import pytest

from windtunnel.laws.budget import choose
from windtunnel.laws.fit import LawError
from windtunnel.laws.loss import LossLaw, named_law
from windtunnel.model.family import FAMILIES

TINY = FAMILIES["tiny"]
LAW = LossLaw("additive", {"C_N": 30.0, "alpha": 0.36, "C_D": 60.0, "beta": 0.32, "L0": 0.55}, (2e4, 3e5), (1e6, 1e7))


def test_the_choice_is_the_lowest_of_all_members_by_brute_force() -> None:
    for flops in (3e12, 1e13, 1e14, 1e15):
        table = {}
        for member in TINY.members:
            shape = TINY.shape(member.name, 2048)
            tokens = flops / shape.flops_per_token(128).total
            table[member.name] = (LAW.predict(shape.body, tokens), tokens)
        choice = choose(LAW, flops, TINY, 2048, 128)
        name = min(table, key=lambda key: table[key][0])
        assert choice.best.name == name
        assert choice.best.tokens == pytest.approx(table[name][1], rel=1e-5)
        assert choice.best.flops == pytest.approx(flops, rel=1e-4)
        for neighbour in (choice.smaller, choice.larger):
            assert neighbour is None or neighbour.loss >= choice.best.loss


def test_neighbours_are_the_next_members_and_more_budget_never_buys_a_smaller_one() -> None:
    names = [m.name for m in TINY.members]
    before = 0
    for flops in (1e12, 1e13, 1e14, 1e15, 1e16):
        choice = choose(LAW, flops, TINY, 2048, 128)
        index = names.index(choice.best.name)
        assert index >= before
        before = index
        assert choice.smaller is None or choice.smaller.name == names[index - 1]
        assert choice.larger is None or choice.larger.name == names[index + 1]
        assert choice.best.tokens_per_parameter == choice.best.tokens / choice.best.parameters


def test_the_papers_law_picks_about_its_own_optimum_in_the_papers_family() -> None:
    law = named_law("minicpm-average")
    choice = choose(law, 1e21, FAMILIES["minicpm"], 122_753, 4096)
    n, _ = law.optimum(1e21)
    assert abs(math.log(choice.best.parameters / n)) < 1.0
    assert choice.law == "minicpm-average"


def test_scarce_data_favour_a_larger_model_and_are_said() -> None:
    free, short = choose(LAW, 1e14, TINY, 2048, 128), choose(LAW, 1e14, TINY, 2048, 128, max_tokens=4e6)
    assert short.best.parameters > free.best.parameters
    assert short.best.tokens <= 4e6
    assert any("data end" in note for note in short.notes) == short.best.limited


def test_a_law_without_a_floor_is_not_asked_about_far_members() -> None:
    law = LossLaw("coupled", {"N_c": 5e5, "D_c": 1.2e7, "alpha_N": 0.2, "alpha_D": 0.22}, (2e4, 1e5), (1e6, 1e7))
    choice = choose(law, 1e16, TINY, 2048, 128)
    assert choice.best.parameters <= 1e6
    assert any("no floor" in note for note in choice.notes)
    assert choose(law, 1e16, TINY, 2048, 128, force=True).best.parameters > 1e6
    for flops in (0.0, math.nan, 1.0):
        with pytest.raises(LawError, match=r"budget\.flops"):
            choose(law, flops, TINY, 2048, 128)
