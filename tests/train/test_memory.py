"""Memory of a step: what is counted beforehand is what a worker then takes, and when layers are computed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from windtunnel.model.shape import Shape
from windtunnel.planning import plan
from windtunnel.program import Program
from windtunnel.recipe import load_recipe
from windtunnel.train.loop import Workshop
from windtunnel.train.memory import kept_by_layer, micro_rows, recomputes, step_memory
from windtunnel.train.preference import Preference
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import _MEMORY

MEASURE = """
import json, sys
import numpy as np
from windtunnel.base.runtime import Runtime, peak_memory, prepare
from windtunnel.corpus.loader import as_rows
from windtunnel.train.loop import Workshop
from windtunnel.model.transformer import Transformer
from windtunnel.train.reference import LiveReference
from windtunnel.train.stage import Stage
from windtunnel.train.step import train_step

runtime = Runtime(threads=1, compiled=False)
prepare(runtime)
stage = Stage.from_dict(json.loads(sys.argv[1]))
trainer = Workshop(runtime).trainer(stage)
tokens = np.random.default_rng(0).integers(5, stage.shape.vocab, (stage.batch, stage.plan.row + 1))
tokens[:, ::300] = 1
rows = as_rows(tokens, np.ones_like(tokens, bool))
add = lambda rows: rows
if stage.preference:
    rows.documents[:] = np.arange(stage.plan.row) >= stage.plan.row // 2
    reference = Transformer(stage.shape, stage.parametrization).requires_grad_(False)
    reference.init_weights(1)
    add = LiveReference(reference, trainer)
for _ in range(3):
    train_step(trainer, add(rows), 1e-3, measure=True)
print(peak_memory())
"""
WIDE = Shape(width=448, layers=6, heads=28, kv_heads=28, head_dim=16, ff=1120, vocab=4096, base_width=32)
LONG = Shape(64, 8, 4, 4, 16, 160, 1500, 32, max_positions=12_288)


FAR = """
name = "far"

[corpus.plain]
source = "plain.jsonl"

[tokenizer]
vocab = 576

[model]
shape = {{ width = 64, layers = 8, ff = 160 }}
row = 512

[trunk]
tokens = "4M"
batch = 16384

[branch.far]
kind = "long"
tokens = "1M"
batch = {row}
context = {{ row = {row}, theta = 1000000 }}
"""
PAIRS = {"kind": "dpo", "objective": "dpo", "preference": Preference(reference="live")}


def staged(make_trunk, shape: Shape, row: int, batch: int, **changes) -> Stage:
    stage = make_trunk(20, **changes)
    return replace(stage, shape=shape, plan=replace(stage.plan, row=row), batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "row", "batch", "changes"),
    [
        (WIDE, 256, 4, {}),
        (WIDE, 256, 8, {}),
        (LONG, 12_288, 1, {"recompute": "never"}),
        (LONG, 12_288, 1, {"recompute": "always"}),
        (WIDE, 256, 4, PAIRS),
        (LONG, 12_288, 1, {"recompute": "never", **PAIRS}),
    ],
    ids=["short rows", "two micro-batches", "long rows", "long rows computed again", "pairs", "long pairs"],
)
def test_the_expected_memory_is_the_measured_one_within_15_percent(make_trunk, shape, row, batch, changes):
    stage = staged(make_trunk, shape, row, batch, **changes)
    is_measured(step_memory(stage).resident, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "again"), [(16_384, False), (40_960, True)], ids=["kept", "computed again"])
def test_what_plan_says_of_a_long_stage_in_fp32_on_a_cpu_is_the_measured_memory(tmp_path, row, again):
    """The number of the table's column, for a branch of the recipe that nothing has been prepared for yet."""
    (tmp_path / "far.toml").write_text(FAR.format(row=row), encoding="utf-8")
    recipe = load_recipe(tmp_path / "far.toml")
    view = plan(recipe, tmp_path / "home", measure=False)
    said = {line["name"]: line["memory"] for line in view.data["stages"]}["far"]
    stage = Program(recipe).branch("far")
    assert (stage.plan.row, stage.batch, recomputes(stage)) == (row, 1, again)
    is_measured(said, stage)


def is_measured(expected: int, stage: Stage) -> None:
    """Whether a process that makes three steps of the stage takes that many bytes."""
    command = [sys.executable, "-c", MEASURE, json.dumps(stage.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **_MEMORY})
    measured = int(done.stdout.splitlines()[-1])
    print(f"expected {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f}: {expected / measured - 1:+.1%}")
    assert expected == pytest.approx(measured, rel=0.15)


def test_layers_are_computed_again_from_a_gibibyte_on_or_as_the_recipe_says(make_trunk):
    short, long = staged(make_trunk, WIDE, 256, 64), staged(make_trunk, LONG, 131_072, 1)
    assert not recomputes(short)
    assert recomputes(long)
    assert not recomputes(replace(long, recompute="never"))
    assert recomputes(replace(short, recompute="always"))
    kept, again = (step_memory(replace(long, recompute=how)) for how in ("never", "always"))
    assert kept.activations == LONG.layers * 131_072 * kept_by_layer(LONG)
    assert again.activations == LONG.layers * 131_072 * 4 * LONG.width
    assert again.tensors < kept.tensors / 3
    assert short.key == replace(short, recompute="always").key
    assert Stage.from_dict(replace(short, recompute="always").to_dict()).recompute == "always"
    assert "recompute" not in short.to_dict()


def test_every_lane_has_a_copy_and_a_share_of_the_batch(make_trunk):
    stage = staged(make_trunk, WIDE, 256, 8)
    alone, together = step_memory(stage), step_memory(stage, lanes=2)
    assert (micro_rows(stage), micro_rows(stage, world=2), micro_rows(stage, world=4)) == (4, 4, 2)
    assert together.weights == alone.weights == 4 * WIDE.total
    assert alone.earlier
    assert not together.earlier  # each has one micro-batch
    assert together.resident > 1.5 * alone.resident


def test_the_workshop_computes_again_what_the_stage_says(make_trunk, eager):
    workshop, stage = Workshop(eager), make_trunk(4)
    assert not workshop.trainer(stage).model.recompute
    assert workshop.trainer(replace(stage, recompute="always")).model.recompute
    assert not workshop.trainer(stage).model.recompute
