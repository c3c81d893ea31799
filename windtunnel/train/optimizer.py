"""From a stage's constants to torch's optimizers, with one group for each set of multipliers in the parametrization table.

AdamW trains every parameter, or all but the hidden matrices, which Muon trains then (torch's own of both). The loop and the
checkpoints see one object with groups, ``step`` and ``zero_grad``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from windtunnel.model.parametrization import Role, Rule
from windtunnel.model.transformer import Transformer
from windtunnel.train.stage import AdamW, Muon

_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


class Together:
    """Torch optimizers that share out the parameters of one model, driven as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


Optimizer = torch.optim.AdamW | Together


def build_optimizer(model: Transformer, config: AdamW, *, fused: bool = True, by_role: bool = True) -> Optimizer:
    """The optimizer of all parameters of a model that are not frozen, grouped by the multipliers of their roles.

    Without ``by_role`` every learning-rate multiplier is 1.
    """
    muon = isinstance(config, Muon)
    groups: dict[bool, dict[tuple[float, ...], list[nn.Parameter]]] = {False: {}, True: {}}
    for name, parameter in _trained(model):
        role = model.roles[name]
        own = muon and role is Role.HIDDEN and parameter.ndim == 2  # torch's Muon takes no stack of experts
        rule = model.parametrization.rule(role, model.shape, config.kind if own else "adamw")
        rule = rule if by_role else replace(rule, lr_multiplier=1.0)
        rule = _spectral(rule, parameter) if own else rule
        key = (rule.lr_multiplier, weight_decay(config, rule), config.epsilon * rule.epsilon_multiplier)
        groups[own].setdefault(key, []).append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": parameters, "lr_multiplier": rate, "weight_decay": decay, "eps": epsilon}
            for (rate, decay, epsilon), parameters in groups[False].items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=fused,
    )
    if not isinstance(config, Muon) or not groups[True]:  # beside adapters no hidden matrix trains
        return adamw
    matrices = [
        {"params": parameters, "lr_multiplier": rate, "weight_decay": decay}
        for (rate, decay, _), parameters in groups[True].items()
    ]
    muon = torch.optim.Muon(matrices, lr=config.learning_rate, momentum=config.momentum, adjust_lr_fn="original")
    return Together(muon, adamw)


def _trained(model: Transformer) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _spectral(rule: Rule, matrix: Tensor) -> Rule:
    """Completes torch's factor √max(1, out/in) ("original") to √(out/in), the spectral condition (arXiv 2310.17813).

    Where a matrix has fewer rows than columns the rate gets the rest, √(out/in); weight decay, which torch multiplies by the
    rate, loses it again.
    """
    rows, columns = matrix.shape
    rest = math.sqrt(min(1.0, rows / columns))
    return replace(rule, lr_multiplier=rule.lr_multiplier * rest, decay_multiplier=rule.decay_multiplier / rest)


def weight_decay(config: AdamW, rule: Rule) -> float:
    """The number that torch multiplies by a tensor's rate of the step.

    Plain: weight decay times the table's factor. Independent: weight decay over the tensor's full rate, so that a step takes
    the share weight_decay · f of the tensor, with the schedule's factor f.
    """
    if config.decay == "independent":
        return config.weight_decay / (config.learning_rate * rule.lr_multiplier)
    return config.weight_decay * rule.decay_multiplier


def set_learning_rate(optimizer: Optimizer, base: float) -> None:
    """Gives each group its own rate: base times the group's multiplier, at all times."""
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_multiplier"]


def _owners(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
    for part in optimizer.parts if isinstance(optimizer, Together) else (optimizer,):
        for group in part.param_groups:
            yield from ((parameter, part) for parameter in group["params"])


def clear_moments(optimizer: Optimizer, updates: int) -> None:
    """Zero moments for every parameter, with that many updates counted."""
    for parameter, part in _owners(optimizer):
        state = {name: torch.zeros_like(parameter) for name in _MOMENTS[type(part)]}
        if isinstance(part, torch.optim.AdamW):  # Muon counts nothing
            state["step"] = torch.tensor(float(updates), device=parameter.device)
        part.state[parameter] = state


def moments(model: Transformer, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every moment by name, such as ``exp_avg/norm.weight``; zeros where there was no update yet."""
    owners = dict(_owners(optimizer))
    for name, parameter in _trained(model):
        state = owners[parameter].state.get(parameter, {})
        for moment in _MOMENTS[type(owners[parameter])]:
            yield f"{moment}/{name}", state[moment] if moment in state else torch.zeros_like(parameter)
