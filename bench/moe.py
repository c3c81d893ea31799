"""A mixture of experts against a dense model of the same active size, and against transformers' Mixtral block.

8 experts, top-2, d = 256, d_ff = 640 an expert, 8,192 tokens a step, fp32. Turns of all contenders alternate in one process;
ratios are medians over turns with the interval between the 5th and 95th percentile of bootstrapped medians.

    python bench/moe.py [--json] [--turns 7] [--threads 2] [--eager]

*block*: forward and backward of one MLP or mixture, gradients of input and weights included. *model*: forward and backward of
a decoder of 2 layers, vocabulary 1,024, rows of 256, document masks. *step*: the whole training step, balancing loss, clip and
AdamW over all (also the idle) experts included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

TOKENS, ROW = 8192, 256
RATIOS = {
    "block: ours / dense": ("block ours", "block dense"),
    "block: Mixtral / ours": ("block mixtral", "block ours"),
    "model: ours / dense": ("model ours", "model dense"),
    "step: ours / dense": ("step ours", "step dense"),
}


def contenders(compiled: bool, threads: int) -> dict[str, Callable[[], Any]]:
    """One call of each is one turn."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from windtunnel.base import runtime as base
    from windtunnel.corpus.loader import Rows
    from windtunnel.model.moe import Experts
    from windtunnel.model.parametrization import Parametrization
    from windtunnel.model.shape import Shape
    from windtunnel.model.transformer import SwiGLU, Transformer
    from windtunnel.train.balance import balanced
    from windtunnel.train.growth import Balance
    from windtunnel.train.objectives import OBJECTIVES
    from windtunnel.train.optimizer import build_optimizer
    from windtunnel.train.stage import AdamW
    from windtunnel.train.step import Trainer, make_compute, to_device, train_step

    runtime = base.choose("cpu", threads, compiled=compiled)
    base.prepare(runtime)
    torch.manual_seed(0)
    mixture = Shape(256, 2, 8, 8, 32, 640, 1024, 32, max_positions=ROW, experts=8, top_k=2)
    dense = replace(mixture, experts=1, top_k=1, ff=2 * mixture.ff)
    config = MixtralConfig(hidden_size=256, intermediate_size=640, num_local_experts=8, num_experts_per_tok=2)
    blocks: dict[str, torch.nn.Module] = {
        "block ours": Experts(mixture, None), "block dense": SwiGLU(dense, None), "block mixtral": MixtralSparseMoeBlock(config),
    }  # fmt: skip
    out: dict[str, Callable[[], Any]] = {}
    for name, block in blocks.items():
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(0, 0.05)
        # Mixtral's own code is not compiled here: its loop over experts depends on data.
        run = torch.compile(block, dynamic=False, fullgraph=True) if compiled and "mixtral" not in name else block
        out[name] = _block_turn(run, block)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 1024, (TOKENS // ROW, ROW + 1))
    documents = np.repeat(np.arange(2, dtype=np.int32), ROW // 2)[None].repeat(len(tokens), 0)
    rows = Rows(tokens[:, :-1].copy(), tokens[:, 1:].copy(), documents)
    for name, shape, objective in (
        ("ours", mixture, balanced(OBJECTIVES["lm"], Balance())), ("dense", dense, OBJECTIVES["lm"]),
    ):  # fmt: skip
        model = Transformer(shape, Parametrization())
        model.init_weights(0)
        compute = make_compute(objective, compiled=compiled)
        trainer = Trainer(model, build_optimizer(model, AdamW()), objective, compute, runtime, len(tokens), 1.0)
        scale = torch.ones(len(objective.names)) / TOKENS

        def both(trainer=trainer, scale=scale) -> None:
            trainer.compute(trainer.model, *to_device(rows, 0, trainer), scale)[0].backward()
            trainer.model.zero_grad(set_to_none=True)

        out[f"model {name}"] = both
        out[f"step {name}"] = lambda trainer=trainer: train_step(trainer, rows, 1e-4)
    return out


def _block_turn(run: Any, block: Any) -> Callable[[], None]:
    import torch

    x = torch.randn(TOKENS // ROW, ROW, 256, requires_grad=True)
    pull = torch.randn(TOKENS // ROW, ROW, 256)

    def turn() -> None:
        y = run(x)
        (y[0] if isinstance(y, tuple) else y).backward(pull)
        block.zero_grad(set_to_none=True)
        x.grad = None

    return turn


def measure(turns: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of every turn, the contenders taking turns."""
    for turn in turns.values():
        turn()
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(count):
        for name, turn in turns.items():
            begun = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median of the turns' ratios, and the interval of bootstrapped medians."""
    each = np.array(above) / np.array(below)
    drawn = np.random.default_rng(0).choice(each, (2000, len(each)))
    return float(np.median(each)), *(float(v) for v in np.percentile(np.median(drawn, 1), (5, 95)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    seconds = measure(contenders(not options.eager, options.threads), options.turns)
    facts = {
        "threads": options.threads, "compiled": not options.eager, "turns": options.turns,
        "tokens_per_second": {name: TOKENS / float(np.median(values)) for name, values in seconds.items()},
        "ratios": {name: ratio(seconds[a], seconds[b]) for name, (a, b) in RATIOS.items()},
    }  # fmt: skip
    if options.json:
        print(json.dumps(facts))
        return
    for name, speed in facts["tokens_per_second"].items():
        print(f"{name:16s} {speed:10,.0f} tokens/s")
    for name, (middle, low, high) in facts["ratios"].items():
        print(f"{name:24s} {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
