"""Many tiny trials: our warm fleet against one eager process with two threads for each trial.

24 trials of 0.25M tokens at N ≈ 0.1M, both with start-up and without. The two alternate trial by trial (two of the fleet's
against two of the other's), on the same data, shape and batch.

    python bench/trials.py [--json] [--trials 24] [--tokens 250000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.corpus.build import build_corpus, build_tokenizer
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.store import open_corpus
from windtunnel.model.family import FAMILIES
from windtunnel.model.parametrization import Parametrization
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trial_stage
from windtunnel.train.stage import AdamW, Stage
from windtunnel.tunnel.fleet import Fleet, Job

ROW, BATCH, VOCAB = 128, 16, 512


def text(folder: Path) -> Path:
    """A few megabytes of pseudo-text: the bench measures speed, not learning."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(3000)]
    lines = [json.dumps({"text": " ".join(words[i] for i in rng.zipf(1.3, 120) % 3000)}) for _ in range(4000)]
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def stages(corpus_hash: str, count: int, tokens: int, vocab: int = VOCAB) -> list[Stage]:
    setting = Setting(
        corpora=(("text", corpus_hash),), mixture=(("text", 1.0),), row=ROW, batch=BATCH, warmup=10, seed=0,
        parametrization=Parametrization(), optimizer=AdamW(), score=("text",), score_tokens=20_000,
    )  # fmt: skip
    steps = max(4, tokens // (ROW * BATCH))
    shape = FAMILIES["tiny"].shape("0.1M", vocab)
    trial = trial_stage("trial", shape, setting, steps, steps // 5)
    return [
        replace(trial, name=f"trial-{i}", optimizer=AdamW(learning_rate=0.005 * 1.1**i), seed=i) for i in range(count)
    ]


class Silent:
    def started(self, job: Job) -> None: ...
    def progress(self, job: Job, word: dict[str, Any]) -> None: ...
    def done(self, job: Job, result: dict[str, Any] | None, reason: str) -> None: ...
    def say(self, text: str) -> None: ...


def one_process(job: Job) -> tuple[float, float]:
    """A trial as people run it: a fresh Python with two threads, eager. Returns seconds with and without start-up."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "windtunnel.tunnel.worker", "--threads", "2", "--devices", "cpu", "--eager"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        process.stdin.write(json.dumps(job.message()) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "result" in message:
                process.stdin.close()
                return time.perf_counter() - begun, message["wall"]
    raise SystemExit("the reference process failed")


def fleet_round(fleet: Fleet, jobs: list[Job]) -> float:
    begun = time.perf_counter()
    results = fleet.run(jobs, Silent())
    if any("failed" in result for result in results.values()):
        raise SystemExit("a trial of the fleet failed")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--cold", action="store_true", help="also time a fleet whose compile cache is empty")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SourceConfig(source=(str(text(folder)),), heldout_tokens=20_000)
        tokenizer = build_tokenizer({"text": config}, VOCAB, downloads=folder, base=folder)
        build_corpus(config, tokenizer, folder / "corpus", name="text", downloads=folder, base=folder)
        corpus = open_corpus(folder / "corpus")
        made = stages(corpus.hash, options.trials, options.tokens)

        def jobs(kind: str, part: list[Stage]) -> list[Job]:
            return [Job(stage, folder / kind / stage.name, {"text": folder / "corpus"}) for stage in part]

        warm = replace(made[0], name="warm", steps=4, schedule=replace(made[0].schedule, stable_end=3, decay_steps=1))
        cold = None
        if options.cold:
            with tempfile.TemporaryDirectory() as cache:
                before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                with Fleet(2, folder / "cold.log") as fleet:
                    cold = fleet_round(fleet, jobs("cold", made))
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
                if before:
                    os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        with Fleet(2, folder / "warmup.log") as fleet:  # fills the compile cache on disk
            fleet_round(fleet, jobs("warmup", [replace(warm, name="w1"), replace(warm, name="w2", seed=9)]))
        ours, theirs, theirs_training = [], [], []
        with Fleet(2, folder / "ours.log") as fleet:
            for at in range(0, options.trials, 4):
                part = made[at : at + 4]
                ours.append(fleet_round(fleet, jobs("ours", part)))
                spent = [one_process(job) for job in jobs("theirs", part)]
                theirs.append(sum(s for s, _ in spent))
                theirs_training.append(sum(s for _, s in spent))
        # The first round of the fleet holds the start of its processes and their compiling from the warm cache.
        steady = np.array(ours[1:] or ours)
        out = {
            "trials": options.trials, "tokens": options.tokens,
            "ours_seconds": float(sum(ours)), "their_seconds": float(sum(theirs)),
            "ratio": {
                "with start-up": float(sum(theirs) / sum(ours)),
                "without start-up": float(np.median(np.array(theirs_training[-len(steady):]) / steady)),
            },
            "rounds": {"ours": ours, "theirs": theirs, "theirs training": theirs_training}, "cold_seconds": cold,
        }  # fmt: skip
    if options.json:
        print(json.dumps(out))
    else:
        print(f"{out['trials']} trials: fleet {out['ours_seconds']:.1f} s, a process each {out['their_seconds']:.1f} s")
        print(
            f"ratio with start-up {out['ratio']['with start-up']:.2f}, without {out['ratio']['without start-up']:.2f}"
        )


if __name__ == "__main__":
    main()
