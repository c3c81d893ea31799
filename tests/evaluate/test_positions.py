"""Loss by position: every scored token falls into one part, and parts add up to the loss of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from windtunnel.corpus.store import HeldOut
from windtunnel.evaluate.positions import loss_by_position, with_positions
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer

SHAPE = Shape(32, 2, 2, 2, 16, 48, 100, 32, max_positions=64)


def model(**changes) -> Transformer:
    made = Transformer(replace(SHAPE, **changes), Parametrization())
    made.init_weights(3)
    return made.eval()


def heldout(lengths: list[int]) -> HeldOut:
    draw = np.random.default_rng(0)
    tokens = np.concatenate([np.append(1, draw.integers(3, 100, length - 1)) for length in lengths]).astype(np.uint16)
    offsets = np.append(0, np.cumsum(lengths))
    return HeldOut(tokens=tokens, offsets=offsets, bytes=np.array(lengths), mask=None)


def test_parts_hold_each_token_once_with_the_loss_that_the_model_has_there():
    lengths, row = [40, 9, 100, 64, 3], 32
    parts = loss_by_position(model(), heldout(lengths), row, first=8)
    assert [(part["from"], part["to"]) for part in parts] == [(0, 8), (8, 16), (16, 32)]
    wanted: dict[int, list[float]] = {0: [], 8: [], 16: []}
    held = heldout(lengths)
    for begin, end in zip(held.offsets[:-1], held.offsets[1:], strict=True):
        for first in range(begin, end - 1, row):  # windows, each of which sees itself alone
            ids = torch.tensor(held.tokens[first : min(first + row, end - 1) + 1].astype(np.int64))
            with torch.no_grad():
                log_probability = model()(ids[None, :-1]).log_softmax(-1)[0]
            for place, target in enumerate(ids[1:].tolist()):
                key = max(start for start in wanted if start <= place)
                wanted[key].append(-float(log_probability[place, target]))
    for part in parts:
        assert part["tokens"] == len(wanted[part["from"]])
        assert part["loss"] == pytest.approx(np.mean(wanted[part["from"]]), abs=1e-5)


@pytest.mark.parametrize("scaling", ["none", "ntk", "dynamic", "yarn"])
def test_more_positions_change_nothing_that_the_model_says_within_its_own(scaling):
    short = model(rope_scaling=scaling, rope_factor=1.0 if scaling == "none" else 2.0)
    longer = with_positions(short, 128)
    tokens_BT = torch.randint(0, 100, (1, 128), generator=torch.Generator().manual_seed(0))
    assert longer.shape.max_positions == 128
    assert torch.equal(longer(tokens_BT[:, :64]), short(tokens_BT[:, :64]))
    assert longer(tokens_BT).shape == (1, 128, 128)
    assert with_positions(short, 64) is short
