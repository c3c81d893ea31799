"""Sampling: the cache changes nothing, draws follow the distribution, every ending is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from windtunnel.base.errors import RecipeError
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.sample import choose, generate
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

SHAPE = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ff=80, vocab=90, base_width=32, max_positions=48)


def _model(qk_norm: bool = False) -> Transformer:
    model = Transformer(replace(SHAPE, qk_norm=qk_norm), Parametrization(init_std=0.3))
    model.init_weights(0)
    return model


def _without_cache(
    model: Transformer, ids: list[int], count: int, temperature: float, top_p: float, seed: int
) -> list[int]:
    generator, ids = torch.Generator().manual_seed(seed), list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1, : SHAPE.vocab]
        ids.append(choose(logits, temperature, top_p, generator))
    return ids[-count:]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.8, 0.7)])
def test_the_cache_gives_the_tokens_of_the_whole_forward_pass(temperature: float, top_p: float, qk_norm: bool) -> None:
    model = _model(qk_norm)
    for seed in range(3):
        wanted = _without_cache(model, [1, 5, 9], 30, temperature, top_p, seed)
        got = list(generate(model, [1, 5, 9], max_new=30, temperature=temperature, top_p=top_p, seed=seed))
        assert got == wanted
    assert (
        temperature == 0
        or len({tuple(generate(model, [1], max_new=9, temperature=1.0, seed=s)) for s in range(5)}) == 5
    )


def test_draws_follow_the_truncated_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits, 0.5, 0.8, generator) for _ in range(4000)]).bincount(minlength=5) / 4000
    p = (logits / 0.5).softmax(-1)
    kept = torch.tensor([True, False, False, False, True])  # .65 + .24 reaches .8
    wanted = torch.where(kept, p, 0.0) / p[kept].sum()
    torch.testing.assert_close(draws, wanted, atol=0.03, rtol=0)
    assert choose(logits, 1e-30, 1.0, generator) == choose(logits, 0.0, 1.0, generator) == 0
    assert {choose(logits, 5.0, 1e-9, generator) for _ in range(20)} == {0}


def test_it_ends_at_a_stop_id_at_the_count_and_at_the_last_position() -> None:
    model = _model()
    all_ids = list(generate(model, [1, 2], max_new=20))
    assert len(all_ids) == 20
    place = all_ids.index(all_ids[7])
    assert list(generate(model, [1, 2], max_new=20, stop={all_ids[7]})) == all_ids[: place + 1]
    assert len(list(generate(model, [3] * 40, max_new=20))) == 8
    assert list(generate(model, [3] * 48, max_new=20)) == []
    assert list(generate(model, [3], max_new=0)) == []


def test_tokens_arrive_one_by_one() -> None:
    model, calls = _model(), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, [1, 2, 3], max_new=10)
    assert not calls
    next(stream)
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2


def test_padding_is_never_sampled() -> None:
    model = _model()
    ids = list(generate(model, [1], max_new=47, temperature=50.0))
    assert max(ids) < SHAPE.vocab


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ids": []}, "prompt"),
        ({"ids": [90]}, "0 to 89"),
        ({"ids": [-1]}, "prompt"),
        ({"ids": [1] * 49}, "48"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_arguments_are_refused_at_once(change: dict, word: str) -> None:
    options = {"ids": [1], "max_new": 5, **change}
    with pytest.raises(RecipeError, match=word):
        generate(_model(), options.pop("ids"), **options)
