"""Tokens a second of one training step against transformers' Trainer: N ≈ 1M, V 4096, T 256, 4,096 tokens a step.

Each contender is a process of its own that waits between turns, so that the turns alternate and a busy machine hurts all
alike. Ratios are medians over turns with the interval between the 5th and 95th percentile of bootstrapped medians.

    python bench/train_step.py [--json] [--turns 9] [--steps 4] [--all]

*As shipped*: what a trunk gets by default, lanes (a process for each core) and document masks included, against the Trainer
with its usual settings.
*Equal settings*: the same allocator, micro-batch, threads and causal mask for both, both compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from windtunnel.tunnel.fleet import worker_environment
from windtunnel.tunnel.lanes import Lanes

WIDTH, LAYERS, HEADS, HEAD_DIM, FF, VOCAB, ROW, ROWS = 128, 5, 4, 32, 320, 4096, 256, 16

CONTENDERS: dict[str, dict[str, Any]] = {
    "windtunnel": {"kind": "ours", "lanes": True},
    "trainer": {"kind": "trainer", "compile": False},
    "trainer compiled": {"kind": "trainer", "compile": True},
    "ours, equal settings": {"kind": "ours", "masked": False},
    "transformers loop, equal settings": {"kind": "loop", "compile": True, "malloc": True, "micro": 4},
    "ours, threads instead of lanes": {"kind": "ours"},
    "ours, eager": {"kind": "ours", "compile": False},
    "ours, no allocator settings": {"kind": "ours", "malloc": False},
    "ours, one micro-batch": {"kind": "ours", "micro": 16},
    "ours, not deterministic": {"kind": "ours", "deterministic": False},
    "ours, threads spin": {"kind": "ours", "spin": True},
}
RATIOS = {
    "as shipped / trainer compiled": ("windtunnel", "trainer compiled"),
    "as shipped / trainer": ("windtunnel", "trainer"),
    "equal settings": ("ours, equal settings", "transformers loop, equal settings"),
    "share of lanes": ("windtunnel", "ours, threads instead of lanes"),
    "share of compiling": ("ours, threads instead of lanes", "ours, eager"),
    "share of the allocator": ("ours, threads instead of lanes", "ours, no allocator settings"),
    "share of the micro-batch": ("ours, threads instead of lanes", "ours, one micro-batch"),
    "price of document masks": ("ours, threads instead of lanes", "ours, equal settings"),
    "price of determinism": ("ours, threads instead of lanes", "ours, not deterministic"),
    "price of threads that wait": ("ours, threads instead of lanes", "ours, threads spin"),
}
MAIN = list(CONTENDERS)[:5]


def rows_of(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random tokens with two documents in a row."""
    tokens = rng.integers(5, VOCAB, (ROWS, ROW + 1))
    documents = np.repeat(np.arange(2, dtype=np.int32), ROW // 2)[None].repeat(ROWS, 0)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy(), documents


def turns(step: Any, steps: int, pass_on: Any = None) -> None:
    """Warms up, then does ``steps`` steps whenever a line comes in, and says how long they took."""
    for _ in range(4):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        if pass_on:
            pass_on(line)
        for _ in range(steps):
            step()
        print(json.dumps({"tokens_per_second": steps * ROWS * ROW / (time.perf_counter() - begun)}), flush=True)


def ours(options: dict[str, Any], threads: int, steps: int, meeting: str | None) -> None:
    import torch

    from windtunnel.base import runtime as base
    from windtunnel.corpus.loader import Rows
    from windtunnel.model.parametrization import Parametrization
    from windtunnel.model.shape import Shape
    from windtunnel.model.transformer import Transformer
    from windtunnel.train.objectives import OBJECTIVES
    from windtunnel.train.optimizer import build_optimizer
    from windtunnel.train.parallel import share, start_ranks
    from windtunnel.train.stage import AdamW
    from windtunnel.train.step import Trainer, make_compute, train_step

    lanes = None
    if options.get("lanes"):
        os.environ["OMP_NUM_THREADS"] = "1"
        lanes = None if meeting else Lanes(threads, [sys.executable, *sys.argv])
        meeting, threads = meeting or lanes.meeting, 1
    runtime = base.choose("cpu", threads, compiled=options.get("compile", True), sharded=False)
    if not options.get("malloc", True):
        base._tune_malloc = lambda: None
    base.prepare(runtime)
    start_ranks(runtime, meeting)
    if not options.get("deterministic", True):
        torch.use_deterministic_algorithms(False)
    shape = Shape(WIDTH, LAYERS, HEADS, HEADS, HEAD_DIM, FF, VOCAB, base_width=32)
    model = Transformer(shape, Parametrization())
    model.init_weights(0)
    objective = OBJECTIVES["lm"]
    compute = make_compute(objective, compiled=runtime.compiled)
    micro, masked = options.get("micro", 1024 // ROW), options.get("masked", True)
    trainer = Trainer(model, build_optimizer(model, AdamW()), objective, compute, runtime, micro, 1.0, masked)
    rng = np.random.default_rng(0)

    def step() -> None:
        first, count = share(0, ROWS, runtime)
        train_step(trainer, Rows(*(part[first : first + count] for part in rows_of(rng))), 0.01)

    turns(step, steps, lanes.send if lanes else None)


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        head_dim=HEAD_DIM, intermediate_size=FF, vocab_size=VOCAB, max_position_embeddings=ROW, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loop(options: dict[str, Any], threads: int, steps: int, meeting: None) -> None:
    """transformers' Llama in a plain loop with the same allocator settings, micro-batch, clip and fused AdamW as ours."""
    import torch

    from windtunnel.base import runtime as base

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    base._tune_malloc()
    model = llama()
    forward = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rng, micro = np.random.default_rng(0), options["micro"]

    def step() -> None:
        inputs, targets, _ = rows_of(rng)
        for at in range(0, ROWS, micro):
            tokens, labels = torch.from_numpy(inputs[at : at + micro]), torch.from_numpy(targets[at : at + micro])
            logits = forward(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            (loss / (ROWS * ROW)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    turns(step, steps)


def trainer(options: dict[str, Any], threads: int, steps: int, meeting: None) -> None:
    """transformers' Trainer with fused AdamW, pausing at the end of every turn."""
    import tempfile

    import torch
    import transformers

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: int) -> dict[str, Any]:
            tokens = torch.from_numpy(rng.integers(5, VOCAB, ROW))
            return {"input_ids": tokens, "labels": tokens}

    class Turns(transformers.TrainerCallback):
        begun, seen = 0.0, 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen += 1
            if self.seen == 5:
                print(json.dumps({"ready": True}), flush=True)
            elif self.seen < 5 or (self.seen - 5) % steps:
                return
            else:
                speed = steps * ROWS * ROW / (time.perf_counter() - self.begun)
                print(json.dumps({"tokens_per_second": speed}), flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.begun = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=10**6, optim="adamw_torch_fused", report_to=[],
            torch_compile=options["compile"], logging_strategy="no", save_strategy="no", use_cpu=True, max_grad_norm=1.0,
            disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        transformers.Trainer(llama(), arguments, train_dataset=Data(), callbacks=[Turns()]).train()


def interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Median ratio over turns with a bootstrap interval; turn i of both ran next to each other."""
    ratio = a / b
    medians = np.median(ratio[rng.integers(0, len(ratio), (4000, len(ratio)))], axis=1)
    low, high = np.quantile(medians, [0.05, 0.95])
    return {"ratio": float(np.median(ratio)), "low": float(low), "high": float(high)}


def start(name: str, threads: int, steps: int) -> subprocess.Popen[str]:
    """Starts a contender and waits until it has compiled and warmed up."""
    chosen = CONTENDERS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    if chosen["kind"] == "ours" or chosen.get("malloc"):
        environment |= worker_environment(threads)  # as a trunk's worker gets it
    if chosen.get("spin"):
        del environment["GOMP_SPINCOUNT"]
    if not chosen.get("malloc", True):
        del environment["MALLOC_ARENA_MAX"], environment["GLIBC_TUNABLES"]
    command = [sys.executable, __file__, "--contender", name, "--steps", str(steps), "--threads", str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    while (line := process.stdout.readline()) and not line.startswith('{"ready"'):
        pass
    if not line:
        sys.exit(f"{name} did not start")
    print(f"{name}: ready", file=sys.stderr)
    return process


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contender", default=None)
    parser.add_argument("--meeting", default=None)
    parser.add_argument("--all", action="store_true", help="each ingredient's share too")
    options = parser.parse_args()
    if options.contender:
        chosen = CONTENDERS[options.contender]
        {"ours": ours, "loop": loop, "trainer": trainer}[chosen["kind"]](
            chosen, options.threads, options.steps, options.meeting
        )
        return
    names = list(CONTENDERS) if options.all else MAIN
    speeds: dict[str, list[float]] = {name: [] for name in names}
    processes = {name: start(name, options.threads, options.steps) for name in names}
    for turn in range(options.turns):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            speeds[name].append(json.loads(process.stdout.readline())["tokens_per_second"])
        print(f"turn {turn + 1} of {options.turns}", file=sys.stderr)
    for process in processes.values():
        process.kill()
    rng = np.random.default_rng(0)
    table = {name: {"tokens_per_second": float(np.median(values)), "turns": values} for name, values in speeds.items()}
    ratios = {
        label: interval(np.array(speeds[a]), np.array(speeds[b]), rng)
        for label, (a, b) in RATIOS.items() if a in speeds and b in speeds
    }  # fmt: skip
    if options.json:
        print(json.dumps({"contenders": table, "ratio": ratios}))
        return
    for name, row in table.items():
        print(f"{name:36s} {row['tokens_per_second']:9.0f} tokens/s")
    for label, row in ratios.items():
        print(f"{label:36s} {row['ratio']:5.2f}  [{row['low']:.2f}, {row['high']:.2f}]")


if __name__ == "__main__":
    main()
