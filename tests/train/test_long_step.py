"""One document of 131,072 tokens, not divided: one causal call, a loss in chunks, and memory that this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from windtunnel.model import attention
from windtunnel.model.attention import attend, attention_backend, document_mask
from windtunnel.model.shape import Shape
from windtunnel.train.memory import step_memory
from windtunnel.tunnel.fleet import _MEMORY

ROW = 131_072
SHAPE = Shape(32, 2, 1, 1, 32, 80, 2048, 32, max_positions=ROW, rope_theta=1e6)
STEP = """
import json, sys, time
import numpy as np
from windtunnel.base.runtime import Runtime, peak_memory, prepare
from windtunnel.corpus.loader import as_rows
from windtunnel.train.loop import Workshop
from windtunnel.train.stage import Stage
from windtunnel.train.step import train_step

runtime = Runtime(threads=int(sys.argv[2]), compiled=False)
prepare(runtime)
stage = Stage.from_dict(json.loads(sys.argv[1]))
trainer = Workshop(runtime).trainer(stage)
tokens = np.random.default_rng(0).integers(5, stage.shape.vocab, (1, stage.plan.row + 1))
tokens[0, 0] = 1
rows = as_rows(tokens, np.ones_like(tokens, bool))
assert rows.documents.max() == 0
begun = time.perf_counter()
report = train_step(trainer, rows, 1e-3)
assert report.applied
print(json.dumps([report.terms["loss"], (time.perf_counter() - begun) / 60, peak_memory()]))
"""


def test_a_long_row_on_a_cpu_takes_one_causal_call_for_each_document(monkeypatch):
    assert attention_backend("cpu", ROW) == attention_backend("cpu", 256) == "documents"
    assert attention_backend("cpu", 128) == "dense"
    calls, flash = [], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Spy:
        def __getattr__(self, name):
            return getattr(torch.ops.aten, name)

        def _scaled_dot_product_flash_attention_for_cpu(self, q, *rest):
            calls.append((q.shape[2], rest[-1]))
            return flash(q, *rest)

    class Ops:
        aten = Spy()

    class Torch:
        ops = Ops()

        def __getattr__(self, name):
            return getattr(torch, name)

    q, k, v = (torch.randn(1, 2, 700, 16) for _ in range(3))
    documents = torch.zeros(1, 700, dtype=torch.int32)
    documents[0, 100:] = 1
    documents[0, 650:] = 2
    monkeypatch.setattr(attention, "torch", Torch())
    attend(q, k, v, document_mask(documents, "documents"), "documents")
    assert calls == [(100, True), (550, True), (50, True)]


@pytest.mark.slow
def test_an_undivided_document_of_128k_tokens_is_trained_on_within_this_machines_memory(make_trunk):
    trunk = make_trunk(20, recompute="always")
    stage = replace(trunk, shape=SHAPE, plan=replace(trunk.plan, row=ROW), batch=1)
    threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    command = [sys.executable, "-c", STEP, json.dumps(stage.to_dict()), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **_MEMORY})
    loss, minutes, peak = json.loads(done.stdout.splitlines()[-1])
    expected = step_memory(stage).resident
    print(
        f"one step on one document of {ROW:,} tokens, {SHAPE.layers} layers of width {SHAPE.width}: {minutes:.1f} minutes on"
        f" {threads} thread(s), peak {peak / 2**20:,.0f} MiB, expected {expected / 2**20:,.0f}; loss {loss:.2f}"
    )
    assert 7 < loss < 9
    assert peak < 2 << 30
    assert expected == pytest.approx(peak, rel=0.15)
