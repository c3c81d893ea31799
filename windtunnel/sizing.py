"""From a budget to size and tokens, by a named law. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from windtunnel.laws.budget import Choice, choose
from windtunnel.laws.loss import named_law
from windtunnel.program import Program
from windtunnel.recipe import Recipe

_LAPTOP_FLOPS = 6e10
"""FLOP/s of one core on tiny shapes: an assumption, for a budget in hours before anything has been measured."""
_GPU_FLOPS = 4e14
"""FLOP/s of one GPU where [machine] gives none: an H100 at 40 % utilisation in bf16."""


def budget_flops(recipe: Recipe) -> float:
    """The training FLOPs that a recipe's budget buys."""
    budget, machine = recipe.budget, recipe.machine
    assert budget is not None
    if budget.flops is not None:
        return float(budget.flops)
    rate = machine.tflops * 1e12 if machine and machine.tflops else None
    if budget.hours is not None:
        count = machine.count if machine else 1
        return budget.hours * 3600 * count * (rate or _LAPTOP_FLOPS)
    if budget.gpu_hours is not None:
        return budget.gpu_hours * 3600 * (rate or _GPU_FLOPS)
    assert budget.money is not None
    assert machine is not None
    assert machine.price
    return budget.money / machine.price * 3600 * (rate or _GPU_FLOPS)


def with_budget(program: Program) -> Program:
    """The program with size and tokens from its recipe's budget; as it is if the recipe has none."""
    recipe = program.recipe
    if recipe.budget is None:
        return program
    best = size_for_budget(recipe, program.vocab).best
    return replace(program, target=recipe.shape_of(best.name, program.vocab), budget_tokens=best.tokens)


def size_for_budget(recipe: Recipe, vocab: int) -> Choice:
    """The size and tokens that the named law prefers for the budget, with the next smaller and larger size beside it."""
    assert recipe.budget is not None
    law = named_law(recipe.budget.law)
    return choose(law, budget_flops(recipe), recipe.family, vocab, recipe.model.row, tied=recipe.model.tied)
