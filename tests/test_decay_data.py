"""What a corpus is worth in the decay: equal tokens from one checkpoint, paired seeds, and planted corpora in their order."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import typer
from scipy.stats import spearmanr
from typer.testing import CliRunner

from windtunnel import cli_studies
from windtunnel import desk as desk_module
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.decay_data_study import blend, decay_data
from windtunnel.home import Home
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.page import render
from windtunnel.train.stage import Stage

WORTH = {"clean": 3.0, "noised": 1.0, "foreign": -2.0}
PLANTED = ("clean", "noised10", "noised30", "duplicated", "foreign")
WORDS = ("bright", "quiet", "early", "broken", "golden", "little", "heavy", "narrow")
NOUNS = ("river", "stone", "garden", "bread", "window", "letter", "forest", "harbour", "candle", "mountain")
VERBS = ("sees", "finds", "carries", "leaves", "builds", "paints")


def write_recipe(folder: Path, names: tuple[str, ...], *, tokens: str, batch: int, row: int = 32) -> Recipe:
    corpora = "".join(
        f'[corpus.{name}]\nsource = "{name}.jsonl"\nheldout = 0.1\nclean = {{ near = false }}\n'
        for name in ("coarse", *names)
    )
    text = f"""
name = "which"
seed = 3
{corpora}
[tokenizer]
vocab = 320
corpora = ["coarse", "{names[0]}"]
[model]
family = "tiny"
size = "0.02M"
row = {row}
[optimizer]
lr = 0.0125
[trunk]
tokens = "{tokens}"
batch = "{batch}"
mixture = {{ coarse = 1 }}
"""
    (folder / "which.toml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "which.toml")


@pytest.fixture
def recipe(tmp_path, write_made_up) -> Recipe:
    for i, name in enumerate(("coarse", *WORTH)):
        write_made_up(tmp_path / f"{name}.jsonl", 150, i)
    return write_recipe(tmp_path, tuple(WORTH), tokens="7680", batch=128)


@pytest.fixture
def asked(monkeypatch) -> list[Stage]:
    """Stages that are asked for; a branch's loss falls with the worth and share of what it mixes in, and with noise by seed."""
    stages_seen: list[Stage] = []

    def train(self, title, study, stages, prepared, **_: Any):
        stages_seen.extend(stages)
        results = {}
        for stage in stages:
            mixture = dict(stage.plan.segments[-1].mixture)
            worth = sum(WORTH.get(name, 0.0) * share for name, share in mixture.items())
            level = 1.2 * (1 + 0.02 * ((stage.seed // 1000) % 5)) * (1 - worth / 100)
            scores = {name: {"nats": 1000 * level, "bytes": 1000} for name in ("coarse", *WORTH)}
            results[stage.key] = {"scores": scores, "seconds": {"step": 1.0}}
        return results

    monkeypatch.setattr(desk_module.Desk, "train", train)
    return stages_seen


def test_candidates_are_ranked_by_their_planted_worth_and_seed_noise_cancels_in_pairs(recipe, tmp_path, asked):
    view = decay_data(recipe, tmp_path / "home", quiet=True)
    found = view.data["candidates"]
    assert [one["name"] for one in found] == sorted(WORTH, key=lambda name: -WORTH[name])
    for one in found:
        assert one["value"]["value"] == pytest.approx(0.3 * WORTH[one["name"]], rel=1e-6)
        assert one["value"]["high"] - one["value"]["low"] < 1e-9, "the seeds differ by 2 %, their pairs by nothing"
    assert [one["verdict"] for one in found] == ["helps", "helps", "hurts"]
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    (fact,) = book.facts("which", "decay-data").values()
    page = render(book, "which")
    book.close()
    assert "What each corpus is worth in the decay" in page
    assert all(f"<td>{name}</td>" in page for name in WORTH)
    assert fact["candidates"] == json.loads(json.dumps(found))
    svg = Path(view.data["figure"]).read_text(encoding="utf-8")
    assert all(f">{name}<" in svg for name in WORTH)


def test_all_branches_of_a_seed_grow_from_one_checkpoint_and_read_equally_many_tokens(recipe, tmp_path, asked):
    decay_data(recipe, tmp_path / "home", quiet=True, seeds=2, share=0.25)
    for seed in {stage.seed for stage in asked}:
        trunk, *branches = [stage for stage in asked if stage.seed == seed]
        assert trunk.kind == "trunk"
        assert len(branches) == 1 + len(WORTH)
        assert {(b.start.stage, b.start.step, b.steps) for b in branches if b.start} == {
            (trunk.key, trunk.steps, branches[0].steps)
        }
        for branch in branches[1:]:
            mixture = dict(branch.plan.segments[-1].mixture)
            (name,) = set(mixture) - {"coarse"}
            assert (mixture[name], mixture["coarse"]) == (pytest.approx(0.25), pytest.approx(0.75))
            read = branch.plan.counts(branch.steps * branch.batch)[name] / ((branch.steps - trunk.steps) * branch.batch)
            assert read == pytest.approx(0.25, abs=0.05)


def test_a_share_of_the_decay_given_on_the_command_line_is_what_every_branch_takes_of_an_equal_whole(
    recipe, tmp_path, asked, monkeypatch
):
    spans = {}
    monkeypatch.setattr(cli_studies, "load", lambda path, overrides: recipe)
    options = ["recipe.toml", "--seeds", "1", "--size", "0.02M", "--json"]
    app = typer.Typer()
    app.command()(cli_studies.law_decay_data)
    for decay in (None, "0.4"):
        asked.clear()
        more = ["--home", str(tmp_path / f"home-{decay}"), *(["--decay", decay] if decay else [])]
        outcome = CliRunner().invoke(app, [*options, *more])
        assert outcome.exit_code == 0, outcome.output
        trunk, *branches = asked
        (spans[decay],) = {(trunk.steps, branch.steps) for branch in branches}
    assert spans[None][1] == spans["0.4"][1]
    for decay, share in ((None, 0.1), ("0.4", 0.4)):
        begins, ends = spans[decay]
        assert (ends - begins) / ends == pytest.approx(share, abs=1 / ends)


def test_a_blend_keeps_the_rest_in_proportion_even_where_the_candidate_is_in_it():
    assert dict(blend({"a": 3, "b": 1}, "c", 0.2)) == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    assert dict(blend({"a": 3, "b": 1}, "b", 0.2)) == pytest.approx({"a": 0.6, "b": 0.4})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": ["clear"]}, "--candidate: expected some of coarse, clean, noised, foreign, got 'clear'"),
        ({"on": ["x"]}, "--on: expected some of coarse"),
        ({"tokens": "long"}, "--tokens: expected a count"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, tmp_path, asked, options, words):
    with pytest.raises(UserError) as error:
        decay_data(recipe, tmp_path / "home", quiet=True, **options)
    assert words in str(error.value)


def sentence(draw: random.Random) -> str:
    return f"The {draw.choice(WORDS)} {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(WORDS)} {draw.choice(NOUNS)}."


def noised(text: str, share: float, draw: random.Random) -> str:
    """Some words replaced by others of the language, in no order."""
    every = (*WORDS, *NOUNS, *VERBS, "The", "the")
    return " ".join(draw.choice(every) if draw.random() < share else word for word in text.split())


def write_planted(folder: Path) -> None:
    """The clean corpus is the kind of text that judges; the coarse one has its words in no order."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(sentence(draw) for _ in range(12))

    def shuffled() -> str:
        words = text().split()
        draw.shuffle(words)
        return " ".join(words)

    one = " ".join(sentence(draw) for _ in range(3))
    made = {
        "coarse": [shuffled() for _ in range(900)], "clean": [text() for _ in range(400)],
        "noised10": [noised(text(), 0.1, draw) for _ in range(400)], "noised30": [noised(text(), 0.3, draw) for _ in range(400)],
        # One short document over and over, told apart by a number so that cleaning keeps it.
        "duplicated": [f"{one} {i}" for i in range(1600)],
        "foreign": [" ".join(str(draw.randint(0, 99999)) for _ in range(80)) for _ in range(400)],
    }  # fmt: skip
    for name, documents in made.items():
        lines = [json.dumps({"text": document}) for document in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_planted_corpora_are_ranked_right(tmp_path, trained):
    write_planted(tmp_path)
    recipe = write_recipe(tmp_path, PLANTED, tokens="200k", batch=1024, row=64)
    view = decay_data(recipe, tmp_path / "home", on=["clean"], tokens="200k", decay=0.2, seeds=3, quiet=True)
    values = {one["name"]: one["value"]["value"] for one in view.data["candidates"]}
    found: Any = spearmanr([values[name] for name in PLANTED], range(len(PLANTED), 0, -1))
    rank = float(found.statistic)
    assert rank > 0.9 - 1e-9, values  # two neighbours may change places
    verdicts = {one["name"]: one["verdict"] for one in view.data["candidates"]}
    assert verdicts["clean"] == "helps"
