"""The table: hand-computed values, tags, and what a change of base width must leave alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windtunnel.base.errors import RecipeError
from windtunnel.model.family import FAMILIES
from windtunnel.model.parametrization import (
    NORMS,
    TABLES,
    Factors,
    Parametrization,
    Role,
    named_roles,
    rebase,
    role_of,
    tag,
)
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
        assert rule.decay_multiplier == rule.epsilon_multiplier == 1.0
    multipliers = MUP.multipliers(shape)
    assert multipliers.embedding == 12.0
    assert multipliers.residual == pytest.approx(residual, rel=3e-5)
    assert 1 / multipliers.logits == pytest.approx(divisor)


@pytest.mark.parametrize(
    ("size", "rate", "decay", "residual", "outside", "inside"),
    [
        ("1.2B", 1.667e-3, 0.6, 0.076150, 1.667e-9, 2.564e-10),  # m_N = 6, m_L = 52/8
        ("2.4B", 1.111e-3, 0.9, 0.098995, 1.111e-9, 2.222e-10),  # m_N = 9, m_L = 40/8
    ],
)
def test_released_models_under_completep_have_the_hand_computed_scales(
    size: str, rate: float, decay: float, residual: float, outside: float, inside: float
) -> None:
    """arXiv 2505.01618, table 1, α = 1, over the family's base width 256 and depth 8."""
    family = FAMILIES["minicpm"]
    shape, complete = family.shape(size, 73_440), Parametrization.named("completep", family.base_layers)
    for name, role in Transformer(shape, complete, device="meta").roles.items():
        rule, mup = complete.rule(role, shape), MUP.rule(role, shape)
        assert (rule.init_mean, rule.init_std, rule.lr_multiplier) == (mup.init_mean, mup.init_std, mup.lr_multiplier)
        block = name.startswith("layers.")
        assert 1e-8 * rule.epsilon_multiplier == pytest.approx(inside if block else outside, rel=3e-4), name
        hidden = block and not name.endswith("norm.weight")
        assert 0.1 * rule.decay_multiplier == pytest.approx(decay if hidden else 0.1), name
        if hidden:
            assert 0.01 * rule.lr_multiplier == pytest.approx(rate, rel=3e-4)
    multipliers = complete.multipliers(shape)
    assert multipliers.residual == pytest.approx(residual, rel=1e-5)
    assert (multipliers.embedding, multipliers.logits) == (12.0, MUP.multipliers(shape).logits)
    qk_gain = complete.rule(Role.HEAD_NORM, shape)
    assert 1e-8 * qk_gain.epsilon_multiplier == pytest.approx(1e-8 * 8 / shape.layers)  # shared by all heads: no width


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_completep_is_mup_at_the_base_of_every_family(family) -> None:
    base = family.shape(family.members[0].name, 1000)
    assert base.layers == family.base_layers
    base = Shape(**{**base.to_dict(), "width": base.base_width})
    complete = Parametrization.named("completep", family.base_layers)
    assert complete.multipliers(base) == MUP.multipliers(base)
    assert all(complete.rule(role, base) == MUP.rule(role, base) for role in Role)


def test_residual_branches_fall_as_one_over_depth_under_completep_and_as_its_root_under_mup() -> None:
    complete = Parametrization.named("completep", 4)
    shapes = [Shape(32, layers, 2, 2, 16, 80, 100, 32) for layers in (4, 8, 16)]
    assert [complete.multipliers(s).residual for s in shapes] == pytest.approx([0.7, 0.35, 0.175])
    assert [MUP.multipliers(s).residual for s in shapes] == pytest.approx([0.7, 0.7 / 2**0.5, 0.35])


@pytest.mark.parametrize("name", TABLES)
def test_every_table_says_what_it_does_with_every_role_and_axis(name) -> None:
    table = TABLES[name]
    assert set(table.rows) == set(Role)
    assert [role for role, row in table.rows.items() if row.muon is not None] == [Role.HIDDEN]
    assert set(table.axes) == {"batch", "tokens", "vocabulary"}
    assert all(rule.source for rule in table.axes.values())


def test_batch_and_tokens_change_nothing_in_the_papers_table_and_keep_the_time_of_averaging_in_completep() -> None:
    assert {MUP.over(axis).carried(4) for axis in TABLES["mup"].axes} == {Factors()}
    complete = Parametrization.named("completep")
    for axis, tau in (("batch", 4.0), ("tokens", 0.25)):
        factors = complete.over(axis).carried(4.0)
        assert tau / (factors.lr * factors.decay) == pytest.approx(1.0)  # B/(η·λ·D), arXiv 2405.13698
    assert complete.over("batch").carried(4.0) == Factors(2.0, 2.0, 0.5, 0.25)
    assert complete.over("tokens").carried(10.0).lr == pytest.approx(10**-0.3)


@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.TIED_EMBEDDING], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["mup", "completep"])
def test_in_a_large_vocabulary_the_embedding_learns_root_width_times_as_fast_as_hidden_matrices(
    name, role: Role
) -> None:
    """arXiv 2506.15025: √width instead of µP's width."""
    fixed = Parametrization.named(name, 4)
    large = replace(fixed, vocabulary_regime="large")
    shapes = [Shape(width, 4, width // 16, width // 16, 16, 80, 100, 32) for width in (32, 128, 512)]
    for rule, power in ((fixed, 1.0), (large, 0.5)):
        ratios = [rule.rule(role, s).lr_multiplier / rule.rule(Role.HIDDEN, s).lr_multiplier for s in shapes]
        assert ratios == pytest.approx([1.0, 4**power, 16**power])
    others = set(Role) - {Role.EMBEDDING, Role.TIED_EMBEDDING}
    assert all(large.rule(other, s) == fixed.rule(other, s) for other in others for s in shapes)
    assert large.to_dict() != fixed.to_dict()
    assert "vocabulary_regime" not in fixed.to_dict()  # hashes from before the rule stay


def test_no_table_claims_an_exponent_of_the_vocabulary_and_one_without_widths_knows_no_regime() -> None:
    for name in TABLES:
        assert not Parametrization.named(name).over("vocabulary").known
    with pytest.raises(RecipeError, match=r"vocabulary_regime: expected 'fixed': the table 'standard' knows no width"):
        replace(Parametrization.named("standard"), vocabulary_regime="large")


def test_released_body_sizes_are_exact() -> None:
    family = FAMILIES["minicpm"]
    assert family.shape("1.2B", 73_440).body == 1_247_442_432
    assert family.shape("2.4B", 122_753).body == 2_442_057_984


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_every_member_has_as_many_parameters_as_the_identity_says(family, tied: bool, qk_norm: bool) -> None:
    for member in family.members:
        shape = replace(family.shape(member.name, 1000, tied=tied), qk_norm=qk_norm)
        model = Transformer(shape, MUP, device="meta")
        count = sum(p.numel() for p in model.parameters())
        padding = (shape.padded_vocab - shape.vocab) * shape.width * (1 if tied else 2)
        assert count - padding == shape.total, member.name
        roles = [(p.numel(), model.roles[name]) for name, p in model.named_parameters()]
        assert sum(n for n, role in roles if role is Role.HIDDEN) == shape.matrices
        assert sum(n for n, role in roles if role in NORMS) == shape.gains
        assert sum(n for n, role in roles if role is Role.HEAD_NORM) == (2 * shape.layers * shape.head_dim * qk_norm)


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
    given = Parametrization("completep", init_std=0.05, without=("logits",), base_layers=3)
    changed, _ = rebase(given, FAMILIES["tiny"].shape("0.1M", 100), 16)
    assert Parametrization.from_dict(changed.to_dict()) == changed
    with pytest.raises(RecipeError, match="lr_scale"):
        Parametrization.from_dict({**changed.to_dict(), "lr_scale": 1})
    for bad in (
        {"name": "sp"},
        {"init_std": 0.0},
        {"base_layers": 0},
        {"scale_emb": math.inf},
        {"without": ("hidden",)},
    ):
        with pytest.raises(RecipeError):
            Parametrization(**bad)


def _train(parametrization: Parametrization, shape: Shape, steps: int = 6) -> tuple[list[float], Transformer]:
    model = Transformer(shape, parametrization)
    model.init_weights(3)
    groups = []
    for name, p in model.named_parameters():
        rule = parametrization.rule(model.roles[name], shape)
        decay, epsilon = 0.1 * rule.decay_multiplier, 1e-3 * rule.epsilon_multiplier  # so large that it matters
        groups.append({"params": [p], "lr": 0.01 * rule.lr_multiplier, "weight_decay": decay, "eps": epsilon})
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
@pytest.mark.parametrize(
    ("name", "regime"), [*((name, "fixed") for name in TABLES), ("mup", "large"), ("completep", "large")]
)
def test_a_change_of_base_width_leaves_training_identical(name, regime, tied: bool) -> None:
    shape = replace(FAMILIES["tiny"].shape("0.1M", 128, tied=tied), qk_norm=name == "completep")
    parametrization = replace(Parametrization.named(name), vocabulary_regime=regime)
    before, model = _train(parametrization, shape)
    for base in (256, 24):
        after, other = _train(*rebase(parametrization, shape, base))
        assert before == pytest.approx(after, abs=1e-6)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
    if name != "standard":  # without the compensation a change of base width is another training
        other, _ = _train(Parametrization.named(name), Shape(**{**shape.to_dict(), "base_width": 256}))
        assert max(abs(a - b) for a, b in zip(before, other, strict=True)) > 1e-2


def test_the_module_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, windtunnel.model.parametrization; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
