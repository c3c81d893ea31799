"""How fast this machine is: a short measurement, from which ``plan`` estimates times before anything has been trained."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from windtunnel.base.runtime import Runtime, choose, prepare
from windtunnel.corpus.loader import as_rows
from windtunnel.model.shape import Shape
from windtunnel.train.loop import Workshop
from windtunnel.train.stage import Stage
from windtunnel.train.step import train_step

_REST = 1.5
"""Time of a compiled training step over that of its matrix products alone. Compared with runs in docs/lab-log.md."""


def matmul_flops(rows: int, inner: int, columns: int, device: torch.device, seconds: float = 0.02) -> float:
    """Floating-point operations a second of one matrix product, the best of a few."""
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    best, until = 0.0, time.perf_counter() + seconds
    torch.mm(a, b)
    while True:
        begun = time.perf_counter()
        for _ in range(3):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = max(best, 3 * 2 * rows * inner * columns / max(now - begun, 1e-9))
        if now > until:
            return best


def peak_flops(runtime: Runtime) -> float:
    """The best matrix product that this runtime reaches, in FLOP/s: the yardstick of utilisation."""
    side = 4096 if runtime.device.startswith("cuda") else 1024
    return matmul_flops(side, side, side, runtime.torch_device, 0.15)


def estimate_speed(shape: Shape, row: int, runtime: Runtime, micro_tokens: int = 1024) -> float:
    """Expected training tokens a second for a shape, from its own matrix products at micro-batch size."""
    d = runtime.torch_device
    queries = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    products = [(shape.width, queries), (queries, shape.width), (shape.width, 2 * shape.ff), (shape.ff, shape.width)]
    per_token = sum(6 * i * o / matmul_flops(micro_tokens, i, o, d) for i, o in products) * shape.layers
    per_token += 6 * shape.width * shape.vocab / matmul_flops(micro_tokens, shape.width, shape.padded_vocab, d)
    per_token += 6 * row * shape.heads * shape.head_dim * shape.layers / matmul_flops(row, shape.head_dim, row, d)
    return 1 / (per_token * _REST)


def train_for(stage: Stage, seconds: float, wait: Callable[[], object]) -> float:
    """Tokens a second of a stage's own steps on made-up tokens, warmed up before ``wait`` is called."""
    runtime = choose(None, 1)
    prepare(runtime)
    step = _warm_step(stage, Workshop(runtime))
    wait()
    return _speed(step, stage.step_tokens, seconds)


def in_turns(stages: Sequence[Stage], seconds: float, rounds: int, device: str = "") -> list[list[float]]:
    """Tokens a second of several stages' own last steps, [round][stage].

    One process measures them in turns, so that a machine that is busy for a while slows all of them.
    """
    runtime = choose(device or None, 1)
    prepare(runtime)
    workshop = Workshop(runtime)
    steps = [(_warm_step(stage, workshop), stage.step_tokens) for stage in stages]
    return [[_speed(step, tokens, seconds) for step, tokens in steps] for _ in range(rounds)]


def _warm_step(stage: Stage, workshop: Workshop) -> Callable[[], object]:
    """One step of a stage on made-up tokens, with the batch of its last; compiled and warmed up."""
    trainer, draw = workshop.trainer(stage), np.random.default_rng(0)
    tokens = draw.integers(5, stage.shape.vocab, (stage.step_tokens // stage.plan.row, stage.plan.row + 1))
    rows = as_rows(tokens, np.ones_like(tokens, bool))
    for _ in range(3):
        train_step(trainer, rows, 1e-4)
    return lambda: train_step(trainer, rows, 1e-4)


def _speed(step: Callable[[], object], tokens: int, seconds: float) -> float:
    """Tokens a second of a step, made over and over for so long."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        count += 1
    return count * tokens / (time.perf_counter() - begun)


def _wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def main(arguments: list[str]) -> None:
    """Prints one JSON line: expected tokens a second on one thread for a shape (JSON) and row, the peak, the cores.

    With ``--train STAGE SECONDS`` it says ready, waits for a line, trains and prints tokens a second; with
    ``--turns STAGES SECONDS ROUNDS DEVICE`` it prints what ``in_turns`` finds.
    """
    if arguments[0] == "--train":
        print(train_for(Stage.from_dict(json.loads(arguments[1])), float(arguments[2]), _wait))
        return
    if arguments[0] == "--turns":
        stages = [Stage.from_dict(raw) for raw in json.loads(arguments[1])]
        print(json.dumps(in_turns(stages, float(arguments[2]), int(arguments[3]), arguments[4])))
        return
    shape, row = Shape(**json.loads(arguments[0])), int(arguments[1])
    runtime = choose(None, 1)
    torch.set_num_threads(1)
    facts = {
        "tokens_per_second": estimate_speed(shape, row, runtime), "peak_flops": peak_flops(runtime),
        "cores": os.cpu_count() or 1, "compiler": runtime.compiled, "device": runtime.device,
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
