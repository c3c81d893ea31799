"""A trial as people train it today: transformers' Trainer with its usual settings, for other benches; prints nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.corpus.store import open_corpus
from windtunnel.model.family import FAMILIES

RATE, STD = (1e-4, 1e-2), (0.01, 0.1)
"""Ranges of learning rate and init deviation in which its searches look, both on a logarithm."""


def trainer_trial(corpus: Path, tokens: int, row: int, batch: int, vocab: int) -> Callable[[float, float, int], float]:
    """(learning rate, init std, seed) → held-out loss in nats per token after training N ≈ 0.1M on that many tokens."""
    import torch
    import transformers

    shape, opened = FAMILIES["tiny"].shape("0.1M", vocab), open_corpus(corpus)
    train, heldout = (
        torch.from_numpy(np.array(part.tokens[: len(part.tokens) // row * row], dtype=np.int64).reshape(-1, row))
        for part in (opened.train, opened.heldout)
    )
    steps = max(4, tokens // (row * batch))

    class Data(torch.utils.data.Dataset):
        def __init__(self, rows: torch.Tensor) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": self.rows[index], "labels": self.rows[index]}

    def trial(rate: float, std: float, seed: int) -> float:
        config = transformers.LlamaConfig(
            hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.ff, vocab_size=vocab,
            max_position_embeddings=row, tie_word_embeddings=True, use_cache=False, initializer_range=std,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=steps,
                learning_rate=rate, optim="adamw_torch_fused", lr_scheduler_type="warmup_stable_decay",
                lr_scheduler_kwargs={"num_decay_steps": steps // 5}, warmup_steps=10, report_to=[], save_strategy="no",
                logging_strategy="no", use_cpu=True, disable_tqdm=True, seed=seed,
            )  # fmt: skip
            transformers.set_seed(seed)  # the weights are drawn before the Trainer seeds anything
            model = transformers.LlamaForCausalLM(config)
            run = transformers.Trainer(model, arguments, train_dataset=Data(train), eval_dataset=Data(heldout))
            run.train()
            return run.evaluate()["eval_loss"]

    return trial
