"""Trials per hour of a search: ours against the way it is done today, Optuna's ``optimize`` over transformers' Trainer.

Both search learning rate and init std with TPE at N ≈ 0.1M, with 0.25M tokens a trial, the same text, tokenizer, batch and
warmup-stable-decay schedule, and score the held-out part at the end of each trial. Ours: two single-threaded workers in rounds
of four. Theirs: one process with two threads, trial after trial, the Trainer's usual settings. The two take turns. The vocabulary
is the quickstart's; a smaller one leaves less to gain, because logits and their loss are a smaller share of a step.

    python bench/tunnel.py [--json] [--turns 3] [--tokens 250000] [--vocab 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from trainer import RATE, STD, trainer_trial
from trials import BATCH, ROW, Silent, stages, text

from windtunnel.corpus.build import build_corpus, build_tokenizer
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.store import open_corpus
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import Fleet, Job
from windtunnel.tunnel.search import Trial, Values, propose
from windtunnel.tunnel.space import Axis

SPACE = (Axis("learning_rate", 0.002, 0.08), Axis("init_std", 0.03, 0.3))
ROUND, THEIRS = 4, 2


def theirs(corpus: Path, tokens: int, vocab: int) -> None:
    """Waits for a line, runs two trials of one Optuna study over the Trainer, says how long they took; and again."""
    import optuna

    trial_of = trainer_trial(corpus, tokens, ROW, BATCH, vocab)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: Any) -> float:
        rate, std = (trial.suggest_float(name, *ends, log=True) for name, ends in (("rate", RATE), ("std", STD)))
        return trial_of(rate, std, trial.number)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        study.optimize(objective, n_trials=THEIRS)
        print(json.dumps({"seconds": (time.perf_counter() - begun) / THEIRS}), flush=True)


class Ours:
    """Our search, one round a turn: proposals, training, scoring."""

    def __init__(self, folder: Path, corpus: Path, tokens: int, vocab: int) -> None:
        self._folder, self._corpus = folder, corpus
        self._stage = stages(open_corpus(corpus).hash, 1, tokens, vocab)[0]
        self._fleet, self._done = Fleet(2, folder / "workers.log"), []

    def _stage_of(self, number: int, values: Values) -> Stage:
        return replace(
            self._stage, name=f"trial-{number}", seed=number,
            optimizer=replace(self._stage.optimizer, learning_rate=values["learning_rate"]),
            parametrization=replace(self._stage.parametrization, init_std=values["init_std"]),
        )  # fmt: skip

    def _train(self, points: Sequence[tuple[int, Values]]) -> list[float]:
        jobs = [
            Job(stage, self._folder / "runs" / stage.folder_name, {"text": self._corpus})
            for stage in (self._stage_of(number, values) for number, values in points)
        ]
        results = self._fleet.run(jobs, Silent())
        return [results[str(job.run)]["scores"]["text"]["nats"] for job in jobs]

    def turn(self) -> float:
        """Seconds for each trial of one more round."""
        begun, first = time.perf_counter(), len(self._done)
        points = list(enumerate(propose(SPACE, self._done, ROUND, 0), first))
        losses = self._train(points)
        self._done += [Trial(number, values, loss) for (number, values), loss in zip(points, losses, strict=True)]
        return (time.perf_counter() - begun) / ROUND

    def close(self) -> None:
        self._fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--theirs", type=Path, default=None)
    options = parser.parse_args()
    if options.theirs:
        theirs(options.theirs, options.tokens, options.vocab)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SourceConfig(source=(str(text(folder)),), heldout_tokens=20_000)
        tokenizer = build_tokenizer({"text": config}, options.vocab, downloads=folder, base=folder)
        build_corpus(config, tokenizer, folder / "corpus", name="text", downloads=folder, base=folder)
        command = [sys.executable, __file__, "--theirs", str(folder / "corpus")]
        command += ["--tokens", str(options.tokens), "--vocab", str(options.vocab)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "TRANSFORMERS_VERBOSITY": "error"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        other = subprocess.Popen(command, text=True, env=environment, **pipes)
        other.stdout.readline()
        mine = Ours(folder, folder / "corpus", options.tokens, options.vocab)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(options.turns + 1):  # ours compiles in its first turn, which is shown apart
            seconds["ours"].append(mine.turn())
            other.stdin.write("go\n")
            other.stdin.flush()
            while not (answer := other.stdout.readline()).startswith('{"seconds"'):  # the Trainer prints too
                if not answer:
                    sys.exit("the reference process failed")
            seconds["theirs"].append(json.loads(answer)["seconds"])
            print(f"turn {turn} of {options.turns}", file=sys.stderr)
        mine.close()
        other.kill()
    warm = {who: np.array(values[1:]) for who, values in seconds.items()}
    ratio = warm["theirs"] / warm["ours"]
    out = {
        "seconds_per_trial": seconds, "trials_per_hour": {who: float(3600 / np.median(v)) for who, v in warm.items()},
        "ratio": float(np.median(ratio)), "low": float(ratio.min()), "high": float(ratio.max()),
        "ratio_with_compiling": float(sum(seconds["theirs"]) / sum(seconds["ours"])),
    }  # fmt: skip
    print(json.dumps(out) if options.json else "\n".join(f"{name}: {value}" for name, value in out.items()))


if __name__ == "__main__":
    main()
