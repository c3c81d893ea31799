"""A lab book of a whole small program, made by arithmetic: what the pipeline writes, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windtunnel.base.artefact import content_hash
from windtunnel.base.labbook import LabBook
from windtunnel.laws.curve_law import CurveLaw
from windtunnel.laws.design import rates_of
from windtunnel.laws.forecast import Forecast, forecast, score
from windtunnel.laws.points import Point
from windtunnel.model.family import FAMILIES
from windtunnel.model.parametrization import Parametrization
from windtunnel.pretrain.branch import decay_stage
from windtunnel.pretrain.setting import Setting
from windtunnel.pretrain.trunk import trial_stage, trunk_stage
from windtunnel.train.stage import AdamW, Stage

NAME = "harbour"
HOSTILE = '<script>alert("x")</script> & <img src=http://evil.example/x.png onerror=alert(1)></pre></section> ferry'
SECRET = "quartz lighthouse marmalade"
ANSWER = "A ferry is a boat that carries zephyr-coloured cars."
MIXTURE = {"wiki": 0.65, "cookbook": 0.35}
BETTER = {"wiki": 0.35, "cookbook": 0.2, "definitions": 0.1, "answers": 0.2, "kitchen": 0.15}
TOKENS = {"wiki": 1_677_648, "cookbook": 855_371, "definitions": 329_789, "answers": 1_832_193, "kitchen": 907_549}
LEVEL = {"wiki": 1.07, "cookbook": 0.87, "definitions": 1.25, "answers": 1.02, "kitchen": 0.84}
GAIN = {"wiki": 1.006, "cookbook": 0.994, "definitions": 0.81, "answers": 0.93, "kitchen": 0.885}
PARTS = (
    "recipe",
    "corpus",
    "search",
    "scaling",
    "forecast",
    "trunk",
    "branches",
    "outcome",
    "model",
    "export",
    "session",
)


def truth(parameters: float, tokens: float) -> float:
    """Nats per byte of the planted world."""
    return 0.42 + 5.2 * parameters**-0.21 + 9.5 * tokens**-0.24


def wobble(number: int) -> float:
    return math.sin(12.9898 * number)


def shape_of(size: str) -> Any:
    return FAMILIES["tiny"].shape(size, 2048)


@cache
def forecasts() -> dict[str, Forecast]:
    """The forecast of the average and of both corpora, each from nine planted points."""
    out = {}
    for corpus, factor in (("average", 1.0), ("wiki", 1.07), ("cookbook", 0.87)):
        points = [
            Point(
                shape_of(s).body,
                d,
                factor * truth(shape_of(s).body, d) * (1 + 0.002 * wobble(7 * i + j)),
                f"proxy-{s}",
                1,
            )
            for i, s in enumerate(("0.02M", "0.05M", "0.1M"))
            for j, d in enumerate((0.8e6, 1.6e6, 3.2e6))
        ]
        out[corpus] = forecast(points, shape_of("0.3M").body, 6.4e6)
    return out


def sealed() -> dict[str, Any]:
    made = forecasts()
    body = made["average"].to_dict()
    facts = {
        "program": NAME, "branch": "same", "target": stages()[1].key, "kind": "blind", "seed": 1, "batch_tokens": 2048,
        "made": "2026-03-01T10:20:30Z", "runs": ["a" * 64], "per_corpus": {k: made[k].to_dict() for k in ("wiki", "cookbook")},
    }  # fmt: skip
    return {"hash": content_hash([body, facts]), "forecast": body, "facts": facts}


def setting() -> Setting:
    hashes = tuple((name, content_hash(name)) for name in TOKENS)
    return Setting(
        corpora=hashes, mixture=tuple(MIXTURE.items()), row=128, batch=16, warmup=62, seed=1,
        parametrization=Parametrization("mup"), optimizer=AdamW(learning_rate=0.01524), score=tuple(TOKENS),
    )  # fmt: skip


@cache
def stages() -> tuple[Stage, Stage, Stage]:
    """The target's trunk and its branches ``same`` and ``better``."""
    trunk = trunk_stage("trunk", shape_of("0.3M"), setting(), 2500, [2500])
    same = decay_stage(trunk, "same", setting(), at=2500, steps=625)
    better = decay_stage(trunk, "better", setting(), at=2500, steps=625, mixture=tuple(sorted(BETTER.items())))
    return trunk, same, better


def put_stage(book: LabBook, stage: Stage, study: str, seconds: float, parent: str = "", status: str = "done") -> None:
    run = f"{NAME}/{stage.folder_name}"
    book.put_run(
        run, program=NAME, kind=stage.kind, name=stage.name, study=study, parent=parent, status=status,
        folder=f"programs/{NAME}/runs/{stage.folder_name}", config=stage.to_dict(), started=1.0, steps=stage.steps,
        tokens=stage.tokens, flops=stage.flops, seconds=seconds,
    )  # fmt: skip


def put_curves(book: LabBook, stage: Stage) -> None:
    """Loss in nats per token and learning rate of every step of a stage's own."""
    first = stage.start.step if stage.start else 0
    rows = []
    for step in range(first + 1, stage.steps + 1, 3):
        rate = stage.schedule.factor(step)
        loss = 3.05 + 4.5 * math.exp(-step / 60) + 9 * step**-0.42 + 0.25 * (rate - 1) + 0.09 * wobble(step)
        if stage.name == "better" and first:
            loss -= 0.12 * (1 - math.exp(-(step - first) / 40))
        rows += [(step, "loss", loss), (step, "learning_rate", rate * 0.01524)]
    book.put_metrics(f"{NAME}/{stage.folder_name}", rows)


def put_search(book: LabBook) -> None:
    space = {
        "learning_rate": (0.002, 0.08),
        "init_std": (0.03, 0.3),
        "scale_emb": (2.0, 40.0),
        "scale_depth": (0.4, 4.0),
    }
    middle = {"learning_rate": 0.0152, "init_std": 0.12, "scale_emb": 14.0, "scale_depth": 1.3}
    trials = []
    for number in range(16):
        values = {}
        for i, (name, (low, high)) in enumerate(space.items()):
            place = ((number * (0.618, 0.414, 0.732, 0.236)[i] + 0.13 * i) % 1.0) ** (0.9 if number % 3 else 0.6)
            values[name] = float(f"{low * (high / low) ** place:.4g}")
        if number == 0:
            values = {"learning_rate": 0.01, "init_std": 0.06, "scale_emb": 12.0, "scale_depth": 2.4}
        if number == 13:
            values = {"learning_rate": 0.01524, "init_std": 0.14, "scale_emb": 17.2, "scale_depth": 1.19}
        weight = {"learning_rate": 0.06, "init_std": 0.02, "scale_emb": 0.015, "scale_depth": 0.02}
        loss = 1.49 + sum(weight[n] * math.log(values[n] / middle[n]) ** 2 for n in space)
        trials.append({"number": number, "loss": None if number == 11 else loss, **values})
    best = min((t for t in trials if t["loss"] is not None), key=lambda t: t["loss"])
    choices = {name: best[name] for name in space}
    rate = choices["learning_rate"]
    check = {
        "size": "0.1M", "width": 64, "rates": [rate / 2, rate, 2 * rate], "losses": [1.352, 1.331, 1.3405],
        "drift": 0.19, "carries_over": True,
    }  # fmt: skip
    book.put_fact(NAME, "study", "search", {
        "key": "k", "choices": choices, "best": best["number"], "edges": [], "trials": trials, "check": check,
        "size": "0.02M", "seed": 1,
    })  # fmt: skip
    for t in trials:
        stage = trial_stage(f"trial-{t['number']:03d}", shape_of("0.02M"), setting(), 122, 24)
        put_stage(
            book,
            replace(stage, seed=100 + t["number"]),
            "search",
            14.0,
            status="failed" if t["loss"] is None else "done",
        )


def put_scaling(book: LabBook) -> None:
    for i, size in enumerate(("0.02M", "0.05M", "0.1M")):
        trunk = trunk_stage(f"proxy-{size}-seed1", shape_of(size), setting(), 1250, [312, 625, 1250])
        put_stage(book, trunk, "scaling", 40.0 + 35 * i)
        for at in (312, 625, 1250):
            branch = decay_stage(trunk, f"{trunk.name}-{at}", setting(), at=at, steps=at // 4)
            put_stage(book, branch, "scaling", 6.0 + 4 * i, parent=f"{NAME}/{trunk.folder_name}")


def outcome() -> float:
    """Nats per byte that the target reached."""
    return 0.9965 * truth(shape_of("0.3M").body, 6.4e6)


def put_branches(book: LabBook) -> None:
    trunk, same, better = stages()
    average = sum(MIXTURE[name] * LEVEL[name] for name in MIXTURE)
    for stage in (same, better):
        put_stage(book, stage, "", 71.0, parent=f"{NAME}/{trunk.folder_name}")
        put_curves(book, stage)
        for name, level in LEVEL.items():
            nats = outcome() * level / average * (GAIN[name] if stage is better else 1.0)
            book.put_score(
                f"{NAME}/{stage.folder_name}", name, "bits_per_byte", nats / math.log(2), "bits per UTF-8 byte", 50_000
            )


def recipe() -> dict[str, Any]:
    return {
        "name": NAME, "seed": 1, "max_loss": None, "max_hours": None, "track": [],
        "corpus": {name: {"source": f"/home/somebody/private/{name}.jsonl", "licence": "CC-BY-SA-4.0"} for name in TOKENS},
        "model": {"family": "tiny", "size": "0.3M", "row": 128}, "trunk": {"tokens": "6.4M", "mixture": MIXTURE},
        "tunnel": {"trials": 8},
        "branch": {"same": {"tokens": "20%", "mixture": None}, "better": {"tokens": "20%", "mixture": BETTER}},
        "evaluate": {"tasks": {"quiz": "C:\\Users\\somebody\\quiz.jsonl"}},
        "machine": {"count": 1, "price": 0.4, "watts": 65, "currency": "EUR"},
    }  # fmt: skip


def put_corpora(book: LabBook) -> None:
    for name, tokens in TOKENS.items():
        stats = {
            "documents": {"kept": 10_018},
            "dropped": {"exact": 0, "near": 2, "short": 13 if name == "wiki" else 0},
            "warnings": [],
        }
        book.put_fact(NAME, "corpus", name, {
            "folder": f"corpora/{name}", "hash": content_hash(name), "tokens": tokens, "heldout_tokens": 50_000,
            "heldout_bytes": 146_116, "stats": stats, "licence": "CC-BY-SA-4.0",
        })  # fmt: skip


def put_models(book: LabBook) -> None:
    text = (
        "The Old Harbour is a village in the north of Norway.\n\nIt was built in 1904 and is known for its wooden boats"
    )
    for stage in stages()[1:]:
        book.put_fact(NAME, "model", stage.folder_name, {
            "samples": [text, HOSTILE, f"Soup\n\nIngredients:\n- 2 cups of {SECRET}\n- 1 onion\nSteps:\n1. Boil.", text[::-1], ""],
            "answers": [{"question": "What is a ferry?", "answer": ANSWER}] if stage.name == "better" else [],
            "tasks": {"quiz": {"accuracy": 0.315, "low": 0.27, "high": 0.362, "count": 400}},
            "sampling": {"temperature": 0.7, "top_p": 0.95, "tokens": 96, "seeds": [0, 1, 2, 3, 4]},
        })  # fmt: skip


def fill(book: LabBook, parts: Collection[str]) -> None:
    """Writes the named parts of the program."""
    trunk, same, better = stages()
    with book:
        if "recipe" in parts:
            book.put_fact(NAME, "recipe", "resolved", recipe())
        if "corpus" in parts:
            put_corpora(book)
        if "search" in parts:
            put_search(book)
        if "scaling" in parts:
            put_scaling(book)
        if "forecast" in parts:
            book.put_fact(NAME, "forecast", same.folder_name, sealed())
        if "trunk" in parts:
            put_stage(book, trunk, "", 260.0)
            put_curves(book, trunk)
        if "branches" in parts:
            put_branches(book)
        if "outcome" in parts:
            book.put_fact(
                NAME,
                "outcome",
                same.folder_name,
                {**score(forecasts()["average"], outcome()), "forecast": sealed()["hash"]},
            )
        if "model" in parts:
            put_models(book)
        if "export" in parts:
            book.put_fact(
                NAME, "export", better.folder_name, {"check": "reloaded: logits differ by 3e-06", "folder": "x/y"}
            )
        if "session" in parts:
            book.put_fact(NAME, "session", "1", {"seconds": 640.0})


@pytest.fixture
def make_book(tmp_path: Path) -> Iterator[Callable[..., LabBook]]:
    """A lab book with the parts that are asked for; all of them without ``parts``."""
    books: list[LabBook] = []

    def make(parts: Collection[str] = PARTS) -> LabBook:
        books.append(LabBook(tmp_path / f"book{len(books)}.sqlite"))
        fill(books[-1], parts)
        return books[-1]

    yield make
    for book in books:
        book.close()


def planted_losses(stage: Stage, size: float) -> list[float]:
    """The training loss of every update of a stage's run from the trunk's first on, by a curve law that knows the size."""
    law = CurveLaw(
        "power",
        {"L0": 3.0 * size**-0.01, "A": 0.5, "alpha": 0.5, "B": 15.0 * size**0.05, "tau": 20.0, "beta": 0.4},
    )
    rates = rates_of(stage.schedule, stage.optimizer.learning_rate, stage.steps)
    losses = law.losses(rates, np.arange(1, stage.steps + 1))
    return [float(loss) * (1 + 0.003 * wobble(i)) for i, loss in enumerate(losses, 1)]


@pytest.fixture
def home_of_curves(tmp_path: Path) -> Path:
    """A home with the whole program whose proxies have planted loss curves and whose trunk has a file of metrics."""
    with closing(LabBook(tmp_path / "labbook.sqlite")) as book:
        fill(book, PARTS)
        with book:
            for row in book.runs(program=NAME, study="scaling"):
                stage = Stage.from_dict(row["config"])
                first, losses = stage.start.step if stage.start else 0, planted_losses(stage, stage.shape.body)
                book.put_metrics(row["id"], [(i, "loss", v) for i, v in enumerate(losses, 1) if i > first])
    trunk = stages()[0]
    metrics = tmp_path / "programs" / NAME / "runs" / trunk.folder_name / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    losses = planted_losses(trunk, trunk.shape.body)
    metrics.write_text("".join(json.dumps([i, {"loss": loss}]) + "\n" for i, loss in enumerate(losses, 1)))
    return tmp_path


@pytest.fixture
def add_arm(home_of_curves: Path) -> Callable[..., None]:
    """Writes finished trials of a recipe that differs from others in its learning rate: arm, then seed to nats per byte."""

    def write(arm: str, losses: Mapping[int, float], program: str = NAME) -> None:
        base = trial_stage("t", shape_of("0.02M"), setting(), 122, 24)
        optimizer = AdamW(learning_rate=0.01 + ord(arm) / 1e4)
        with closing(LabBook(home_of_curves / "labbook.sqlite")) as book, book:
            for seed, loss in losses.items():
                stage = replace(
                    base, name=f"{arm}-{seed}", seed=seed, plan=replace(base.plan, seed=seed), optimizer=optimizer
                )
                run = f"{program}/{stage.folder_name}"
                book.put_run(run, program=program, kind="trial", name=stage.name, study="aside", status="done",
                             folder=f"programs/{program}/runs/{stage.folder_name}", config=stage.to_dict(), steps=122)  # fmt: skip
                book.put_score(run, "wiki", "nats_per_byte", loss, "nats per UTF-8 byte", 100)

    return write
