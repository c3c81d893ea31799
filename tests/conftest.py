"""A tiny corpus and tiny stages that the tests of several rooms train."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from windtunnel import desk as desk_module
from windtunnel import manage as manage_module
from windtunnel import pipeline as pipeline_module
from windtunnel.base.runtime import Runtime
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.loader import IGNORED, Rows
from windtunnel.corpus.store import Corpus, open_corpus
from windtunnel.corpus.tokenizer import train as train_tokenizer
from windtunnel.finishing import VERBS as FINISHING
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trial_stage, trunk_stage
from windtunnel.train.checkpoint import load_model
from windtunnel.train.control import Control
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.noise import split
from windtunnel.train.stage import AdamW, Stage

NOUNS = ("river", "stone", "garden", "bread", "window", "letter", "forest", "harbour", "candle", "mountain", "teacher",
         "engine", "village", "paper", "field", "bridge", "cloud", "market", "lamp", "road")  # fmt: skip
VERBS = ("sees", "finds", "carries", "leaves", "builds", "paints", "follows", "hears")
SHAPE = Shape(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ff=80, vocab=320, base_width=32)


def made_up(seed: int, sentences: int) -> str:
    """Sentences with a little grammar, different for each seed."""
    draw = random.Random(seed)
    return " ".join(
        f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} {draw.randint(1, 99)} times."
        for _ in range(sentences)
    )


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """A JSONL file of made-up documents."""
    lines = [json.dumps({"text": made_up(1000 * seed + i, 3 + i % 13)}) for i in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes with two threads each take six times as long on two cores as with one each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def denormals() -> Iterator[None]:
    """Preparing a runtime flushes them for the whole process; what draws floats in the next file needs them."""
    yield
    torch.set_flush_denormal(False)


TINY = """
name = "{name}"
seed = 3
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.2M"
row = 32
[trunk]
tokens = "{tokens}"
batch = "{batch}"
{trunk}
[branch.same]
tokens = "20%"
[tunnel]
proxies = ["0.02M", "0.05M", "0.1M"]
tokens = ["2560", "3840", "5120"]
{tunnel}
"""


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., str]:
    """The text of a recipe with a tunnel over one made-up corpus; ``tunnel`` ends it, so that it may open tables of its own."""

    def made(
        tunnel: str = "trials = 0", *, name: str = "tiny", tokens: str = "7680", batch: str = "128", trunk: str = ""
    ) -> str:
        return TINY.format(name=name, tokens=tokens, batch=batch, trunk=trunk, tunnel=tunnel)

    return made


@pytest.fixture(scope="session")
def write_made_up() -> Callable[..., Path]:
    return write_text


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of made-up sentences with a vocabulary of 320 tokens."""
    folder = tmp_path_factory.mktemp("tiny-corpus")
    text = write_text(folder / "text.jsonl", 400)
    tokenizer = train_tokenizer([made_up(i, 10) for i in range(200)], SHAPE.vocab)
    config = SourceConfig(source=(str(text),), heldout=0.1)
    return build_corpus(config, tokenizer, folder / "corpus", name="tiny", downloads=folder, base=folder)


@pytest.fixture
def tiny_setting(tiny_corpus: Corpus) -> Setting:
    """What tiny stages share: 4 rows of 32 tokens in a step, two steps of warmup."""
    return Setting(
        corpora=(("tiny", tiny_corpus.hash),), mixture=(("tiny", 1.0),), row=32, batch=4, warmup=2, seed=5,
        parametrization=Parametrization(), optimizer=AdamW(), score=("tiny",), score_tokens=600,
    )  # fmt: skip


@pytest.fixture
def make_trunk(tiny_setting: Setting) -> Callable[..., Stage]:
    def make(steps: int, points: tuple[int, ...] = (), *, save_every: int | None = None, **changes: Any) -> Stage:
        return replace(trunk_stage("trunk", SHAPE, tiny_setting, steps, points, save_every), **changes)

    return make


@pytest.fixture
def make_trial(tiny_setting: Setting) -> Callable[..., Stage]:
    def make(steps: int, **changes: Any) -> Stage:
        return replace(trial_stage("trial", SHAPE, tiny_setting, steps, max(1, steps // 4)), **changes)

    return make


@pytest.fixture(scope="session")
def eager() -> Runtime:
    """One thread, nothing compiled."""
    return Runtime(compiled=False)


class InProcess:
    """A fleet without processes: trains one job after the other, right here. Starting workers takes longer than these steps."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._workshop = names, Workshop(Runtime(compiled=False))

    def __call__(self, *_: Any, **__: Any) -> InProcess:
        return self

    def close(self) -> None:
        pass

    def run(self, jobs, watcher, *, stopping):
        results = {}
        for job in sorted(jobs, key=lambda job: job.parent is not None):
            self._names.append(job.stage.name)
            watcher.started(job)
            control = Control(say=watcher.say, finish=job.finish.exists if job.finish else lambda: False)
            corpora = {name: open_corpus(path) for name, path in job.corpora.items()}
            result = run_stage(job.stage, job.run, corpora, self._workshop, parent=job.parent, control=control)
            results[str(job.run)] = {**result, "wall": 0.0}
            watcher.done(job, results[str(job.run)], "")
        return results


@pytest.fixture
def trained(monkeypatch) -> Iterator[list[str]]:
    """Names of the stages that are trained from here on."""
    names: list[str] = []
    monkeypatch.setattr(desk_module, "Fleet", InProcess(names))
    for module in (pipeline_module, manage_module):
        monkeypatch.setattr(module, "finishing", lambda verb, **job: FINISHING[verb](job))
    yield names
    torch.set_flush_denormal(False)  # a finishing verb sets it for its process, which is this one here


@pytest.fixture
def check_noise() -> Callable[[Path, int, Rows, list[list[int]]], None]:
    """What a run measured at a step, against autograd on each part of its rows with the weights of the step before."""

    def check(run: Path, step: int, rows: Rows, parts: list[list[int]]) -> None:
        model, _ = load_model(checkpoint_path(run, step - 1))

        def tokens_and_square(which: list[int]) -> tuple[float, float]:
            targets = torch.from_numpy(rows.targets[which]).flatten()
            logits = model(torch.from_numpy(rows.inputs[which]), torch.from_numpy(rows.documents[which])).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            return float((targets != IGNORED).sum()), sum(float(torch.linalg.vector_norm(g)) ** 2 for g in gradients)

        wanted = split([tokens_and_square(part) for part in parts], tokens_and_square(list(range(len(rows))))[1])
        found = dict(read_metrics(run))[step]
        assert wanted is not None
        assert found["noise_trace"] == pytest.approx(wanted.trace, rel=1e-3)
        assert found["gradient_square"] == pytest.approx(wanted.square, rel=1e-2, abs=1e-4 * wanted.trace)

    return check
