"""AdamW with one group for each pair of multipliers in the parametrization table."""

from __future__ import annotations

import torch
from torch import nn

from windtunnel.model.parametrization import Rule
from windtunnel.model.transformer import Transformer
from windtunnel.train.stage import AdamW


def build_optimizer(model: Transformer, config: AdamW, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over all parameters of a model, grouped by the learning-rate and decay multipliers of their roles."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = model.parametrization.rule(model.roles[name], model.shape)
        groups.setdefault((rule.lr_multiplier, weight_decay(config, rule)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_multiplier": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def weight_decay(config: AdamW, rule: Rule) -> float:
    """The number that torch multiplies by a tensor's rate of the step.

    Plain: weight decay times the table's factor. Independent: weight decay over the tensor's full rate, so that a step takes
    the share weight_decay · f of the tensor, with the schedule's factor f.
    """
    if config.decay == "independent":
        return config.weight_decay / (config.learning_rate * rule.lr_multiplier)
    return config.weight_decay * rule.decay_multiplier


def set_learning_rate(optimizer: torch.optim.Optimizer, base: float) -> None:
    """Gives each group its own rate: base times the group's multiplier, at all times."""
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_multiplier"]
