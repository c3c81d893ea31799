"""When our own arithmetic changes, the golden losses say so and NUMERICS has to be raised.

``python tests/train/test_golden.py`` writes golden.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from windtunnel.base.runtime import Runtime, prepare
from windtunnel.corpus.loader import as_rows
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.train.loop import Workshop
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import NUMERICS, AdamW, Stage
from windtunnel.train.step import train_step

GOLDEN = Path(__file__).with_name("golden.json")
RAISE = (
    "the golden losses have changed: if that is meant, raise NUMERICS in windtunnel/train/stage.py, so that no stale trial "
    "enters a law, and run python tests/train/test_golden.py"
)
SHAPES = {
    "tied": Shape(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=300, base_width=32),
    "untied": Shape(width=48, layers=3, heads=3, kv_heads=3, head_dim=16, ff=120, vocab=300, base_width=32, tied=False),
}


def losses(shape: Shape, steps: int = 10) -> list[float]:
    """Losses of a fixed tiny stage: eager, one thread, arithmetic tokens with documents in them, warmup and decay."""
    from windtunnel.corpus.mixture import DataPlan, Segment

    schedule = Schedule(warmup=3, stable_end=7, decay_steps=3, form="exponential")
    plan = DataPlan(seed=1, row=48, segments=(Segment(0, (("golden", 1.0),)),))
    stage = Stage("golden", "trunk", shape, Parametrization(), AdamW(), schedule, plan, (), 6, steps, 3)
    trainer = Workshop(Runtime(compiled=False)).trainer(stage)
    trainer.micro = 4  # two micro-batches, the second one filled up
    out = []
    for step in range(1, steps + 1):
        index = np.arange(6 * 49).reshape(6, 49) + 1000 * step
        tokens = (index * index * 7 + index // 3) % 290 + 5
        tokens[index % 37 == 0] = 1  # begin of a document
        report = train_step(trainer, as_rows(tokens, np.ones_like(tokens, bool)), 0.01 * schedule.factor(step))
        out.append(report.terms["loss"])
    return out


def golden_class() -> dict[str, object]:
    """The numeric class, and the processor, by which libraries choose their kernels."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    wanted = ("vendor_id", "cpu family", "model\t", "stepping")
    maker = " ".join(next((line.partition(":")[2].strip() for line in lines if line.startswith(w)), "") for w in wanted)
    return {**Runtime(compiled=False).numeric_class(), "mkl": torch.backends.mkl.is_available(), "maker": maker}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_golden_file_belongs_to_this_numerics(golden):
    assert golden["numerics"] == NUMERICS, RAISE


@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_the_golden_ones_exactly_in_their_numeric_class_and_closely_in_any_other(golden, name):
    threads = torch.get_num_threads()
    prepare(Runtime(compiled=False))
    found = losses(SHAPES[name])
    torch.set_num_threads(threads)
    if golden_class() == golden["class"]:
        assert found == golden["losses"][name], RAISE
    np.testing.assert_allclose(found, golden["losses"][name], rtol=1e-4, err_msg=RAISE)


if __name__ == "__main__":
    prepare(Runtime(compiled=False))
    values = {name: losses(shape) for name, shape in SHAPES.items()}
    text = json.dumps({"numerics": NUMERICS, "class": golden_class(), "losses": values}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
