"""AdamW with one group for each pair of multipliers in the parametrization table."""

from __future__ import annotations

import torch
from torch import nn

from windtunnel.model.transformer import Transformer
from windtunnel.train.stage import AdamW


def build_optimizer(
    model: Transformer, config: AdamW, *, fused: bool = True, by_role: bool = True
) -> torch.optim.AdamW:
    """AdamW over all parameters of a model, grouped by the learning-rate and decay multipliers of their roles.

    Without ``by_role`` every learning-rate multiplier is 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = model.parametrization.rule(model.roles[name], model.shape)
        rate = rule.lr_multiplier if by_role else 1.0
        groups.setdefault((rate, rule.decay_multiplier), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_multiplier": rate, "weight_decay": config.weight_decay * decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, base: float) -> None:
    """Gives each group its own rate: base times the group's multiplier, at all times."""
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_multiplier"]
