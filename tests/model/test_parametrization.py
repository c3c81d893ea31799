"""The table: hand-computed values, tags, and what a change of base width must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windtunnel.base.errors import RecipeError
from windtunnel.model.family import FAMILIES
from windtunnel.model.parametrization import Parametrization, Role, named_roles, rebase, role_of, tag
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

MUP = Parametrization()


@pytest.mark.parametrize(
    ("size", "std", "rate", "residual", "divisor"),
    [("1.2B", 0.04082, 1.667e-3, 0.19415, 6), ("2.4B", 0.03333, 1.111e-3, 0.22136, 9)],
)
def test_released_models_have_the_hand_computed_scales(
    size: str, std: float, rate: float, residual: float, divisor: int
) -> None:
    shape = FAMILIES["minicpm"].shape(size, 73_440)
    model = Transformer(shape, MUP, device="meta")
    assert sum(p.numel() for n, p in model.named_parameters() if n != "embedding.weight") == shape.body
    for name, role in model.roles.items():
        rule = MUP.rule(role, shape)
        if name == "embedding.weight":
            assert (role, rule.init_std, 0.01 * rule.lr_multiplier) == (Role.TIED_EMBEDDING, 0.1, 0.01)
        elif name.endswith("norm.weight"):
            assert (rule.init_mean, rule.init_std, 0.01 * rule.lr_multiplier) == (1.0, 0.0, 0.01)
        else:
            assert rule.init_std == pytest.approx(std, rel=2e-4)
            assert 0.01 * rule.lr_multiplier == pytest.approx(rate, rel=3e-4)
        assert rule.decay_multiplier == 1.0
    multipliers = MUP.multipliers(shape)
    assert multipliers.embedding == 12.0
    assert multipliers.residual == pytest.approx(residual, rel=3e-5)
    assert 1 / multipliers.logits == pytest.approx(divisor)


def test_released_body_sizes_are_exact() -> None:
    family = FAMILIES["minicpm"]
    assert family.shape("1.2B", 73_440).body == 1_247_442_432
    assert family.shape("2.4B", 122_753).body == 2_442_057_984


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_member_has_as_many_parameters_as_the_identity_says(family, tied: bool) -> None:
    for member in family.members:
        shape = family.shape(member.name, 1000, tied=tied)
        model = Transformer(shape, MUP, device="meta")
        count = sum(p.numel() for p in model.parameters())
        padding = (shape.padded_vocab - shape.vocab) * shape.width * (1 if tied else 2)
        assert count - padding == shape.total, member.name


def test_the_standard_parametrization_does_not_know_the_width() -> None:
    standard = Parametrization.named("standard")
    small, large = (FAMILIES["tiny"].shape(s, 1000) for s in ("0.02M", "2.5M"))
    for role in Role:
        assert standard.rule(role, small) == standard.rule(role, large)
    assert standard.multipliers(small) == standard.multipliers(large)
    assert standard.rule(Role.HIDDEN, large).init_std == 0.02


def test_an_untagged_parameter_raises_and_is_named() -> None:
    model = Transformer(FAMILIES["tiny"].shape("0.02M", 100), MUP, device="meta")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no role"):
        role_of(model.extra.weight)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        named_roles(model)
    assert role_of(tag(nn.Parameter(torch.zeros(1)), Role.NORM)) is Role.NORM


def test_a_parametrization_survives_its_dictionary_and_refuses_strangers() -> None:
    changed, _ = rebase(Parametrization(init_std=0.05, without=("logits",)), FAMILIES["tiny"].shape("0.1M", 100), 16)
    assert Parametrization.from_dict(changed.to_dict()) == changed
    with pytest.raises(RecipeError, match="lr_scale"):
        Parametrization.from_dict({**changed.to_dict(), "lr_scale": 1})
    for bad in ({"name": "sp"}, {"init_std": 0.0}, {"scale_emb": math.inf}, {"without": ("hidden",)}):
        with pytest.raises(RecipeError):
            Parametrization(**bad)


def _train(parametrization: Parametrization, shape: Shape, steps: int = 6) -> tuple[list[float], Transformer]:
    model = Transformer(shape, parametrization)
    model.init_weights(3)
    groups = []
    for name, p in model.named_parameters():
        rule = parametrization.rule(model.roles[name], shape)
        groups.append({"params": [p], "lr": 0.01 * rule.lr_multiplier, "weight_decay": 0.1 * rule.decay_multiplier})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, shape.vocab, (4, 33), generator=generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["mup", "standard"])
def test_a_change_of_base_width_leaves_training_identical(name, tied: bool) -> None:
    shape = FAMILIES["tiny"].shape("0.1M", 128, tied=tied)
    before, model = _train(Parametrization.named(name), shape)
    for base in (256, 24):
        after, other = _train(*rebase(Parametrization.named(name), shape, base))
        assert before == pytest.approx(after, abs=1e-6)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
    if name == "mup":  # without the compensation a change of base width is another training
        other, _ = _train(Parametrization(), Shape(**{**shape.to_dict(), "base_width": 256}))
        assert max(abs(a - b) for a, b in zip(before, other, strict=True)) > 1e-2


def test_the_module_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, windtunnel.model.parametrization; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
