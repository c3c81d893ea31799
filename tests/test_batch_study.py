"""The batch study as a command: what it trains, what it finds in a planted world, what it records, repeats and reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from windtunnel import cli
from windtunnel import desk as desk_module
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import RecipeError
from windtunnel.base.labbook import LabBook
from windtunnel.base.units import si
from windtunnel.batch_study import batch
from windtunnel.home import Home
from windtunnel.laws.batch_terms import ThreeTermLaw
from windtunnel.pipeline import run
from windtunnel.planning import load_program
from windtunnel.program import step_law_batch
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.batches import equal_loss_figure, has_law, law_figure, read_batch
from windtunnel.report.page import render
from windtunnel.train.stage import Stage

STUDIES = Path(__file__).parents[1] / "docs" / "studies"
TUNNEL = """
trials = 0
[tunnel.batch]
batches = [64, 128, 256, 512, 1024, 2048]
tokens = ["5N", "10N", "20N"]
seeds = 2
"""
WORLD = ThreeTermLaw(
    {"E": 1.5, "A": 25.0, "a": 0.3, "B": 4.0, "b": 0.6, "C": 6.0, "c": 0.4}, (2e4, 1e5), (64.0, 2048.0), (1e5, 2e6), 0.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up, tiny_recipe) -> Path:
    made = tmp_path_factory.mktemp("batch")
    write_made_up(made / "plain.jsonl", 1500)
    (made / "tiny.toml").write_text(tiny_recipe(TUNNEL, tokens="2M", batch="256"), encoding="utf-8")
    return made


def planted(stage: Stage) -> float:
    """A world with a three-term law; a larger batch late in a run costs as much as the law says of its last steps."""
    batches, loss = stage.batches, 0.0
    for step_batch, share in _shares(stage):
        tokens = step_batch * stage.plan.row
        loss += share * WORLD.loss(stage.shape.body, tokens, stage.tokens / tokens)
    assert batches.sequences(stage.steps) * stage.plan.row == stage.tokens
    return loss + 1e-4 * (stage.seed % 7)


def _shares(stage: Stage) -> list[tuple[int, float]]:
    first = stage.batches.sequences(stage.batch_changes[0][0]) if stage.batch_changes else 0
    total = stage.batches.sequences(stage.steps)
    return [(stage.batch, first / total), (stage.batches.at(stage.steps), 1 - first / total)]


@pytest.fixture
def trained(monkeypatch) -> list[Stage]:
    """The stages that are asked for; their results come from the planted world."""
    asked: list[Stage] = []

    def train(self, title, study, stages, prepared, **_: Any):
        asked.extend(stages)
        self.use(study, [stage.folder_name for stage in stages])
        return {
            stage.key: {"scores": {"plain": {"nats": planted(stage) * 1000, "bytes": 3000, "tokens": 1000}},
                        "tokens": stage.tokens, "flops": stage.flops, "seconds": {"step": 1.0}}
            for stage in stages
        }  # fmt: skip

    monkeypatch.setattr(desk_module.Desk, "train", train)
    return asked


def test_a_planted_best_batch_is_found_with_what_half_and_double_cost(tmp_path, folder, trained):
    recipe = load_recipe(folder / "tiny.toml")
    found = batch(recipe, tmp_path, quiet=True).to_dict()
    answer = found["answer"]
    assert answer["tokens"] == 2_000_000
    best = WORLD.best_batch(2e6).value
    assert answer["best"]["value"] == pytest.approx(best, rel=0.15)
    assert answer["best"]["low"] < best < answer["best"]["high"]
    for name, factor in (("half", 0.5), ("double", 2.0)):
        assert answer[name]["value"] == pytest.approx(WORLD.cost(2e6, factor).value, rel=0.3)
    assert answer["own_cost"]["value"] == pytest.approx(WORLD.cost_of(2e6, 256).value, rel=0.3)
    assert found["terms"]["exponent"]["value"] == pytest.approx(0.4, abs=0.06)
    inside = [m for m in found["law"]["minima"] if not m["edge"]]
    assert inside
    for m in inside:  # the parabola's minimum lies where the law's best batch has that loss
        assert abs(math.log2(m["batch"] / WORLD.best_batch(m["tokens"]).value)) < 0.75
    assert found["law"]["exponent"] > 0
    assert "nats per token on C4" in found["paper"]["warning"]
    assert found["noise"] == pytest.approx(math.sqrt(0.5) * (1e-4 * abs(3 % 7 - 1003 % 7)) / 2.5, rel=0.3)

    trunks = [stage for stage in trained if stage.kind == "trunk"]
    assert len(trunks) == 3 * 6 * 2
    rates = {stage.batch * 32: stage.optimizer.learning_rate for stage in trunks}
    assert {b: round(r / 0.01, 3) for b, r in rates.items()} == {
        64: 0.5,
        128: 0.707,
        256: 1,
        512: 1.414,
        1024: 2,
        2048: 2.828,
    }
    assert len({stage.key for stage in trained}) == len(trained)
    assert found["cost"]["tokens"] == sum(stage.own_tokens for stage in trained)


def test_larger_batches_from_a_checkpoint_read_as_many_tokens_and_their_price_grows(tmp_path, folder, trained):
    recipe = load_recipe(folder / "tiny.toml", ["tunnel.batch.seeds=1"])
    found = batch(recipe, tmp_path, quiet=True).to_dict()
    assert len(found["branches"]) == 3 * 3
    for branch in found["branches"]:
        one, two, four = branch["costs"]
        assert one is None
        assert 0 < two < four
        assert branch["critical"] in (256, 512, 1024)
    grown = [stage for stage in trained if stage.batch_changes]
    assert {stage.batches.at(stage.steps) for stage in grown} == {16, 32}
    for stage in grown:
        at = stage.first_step
        assert stage.batch_changes == ((at, stage.batches.at(stage.steps)),)
        assert stage.own_tokens == pytest.approx(0.25 * at * 256, rel=0.15)
        assert stage.optimizer.learning_rate == pytest.approx(
            0.01 * math.sqrt(stage.batches.at(stage.steps) / 8), rel=1e-3
        )
        assert stage.schedule.factor(at + 1) == 1.0
        assert stage.schedule.factor(stage.steps) == pytest.approx(0.1)


def test_what_was_found_is_recorded_reported_and_asked_for_again_alike(tmp_path, folder, trained, capsys):
    recipe = load_recipe(folder / "tiny.toml")
    found = batch(recipe, tmp_path, quiet=True)
    first = [stage.key for stage in trained]
    again = batch(recipe, tmp_path, quiet=True)
    assert [stage.key for stage in trained[len(first) :]] == first
    assert again.to_dict() == found.to_dict()
    file = next((Home(tmp_path).program("tiny") / "studies").glob("batch-*.json"))
    assert read_json(file)["answer"] == found.to_dict()["answer"]
    with LabBook(Home(tmp_path).labbook) as book:
        html = render(book, "tiny")
        view = read_batch(book, "tiny")
    assert view is not None
    assert has_law(view)
    for width in (720, 340):
        assert (
            equal_loss_figure(view, width).count('class="best"')
            == sum(one.best is not None for one in view.levels)
            >= 4
        )
        assert "trunk dash" in law_figure(view, width)
    assert "Which batch, and what half or double of it costs" in html
    assert "1.21e+09 / L" in html
    assert cli._run(["law", "batch", "--law", str(file), "--loss", "2.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    law = found.to_dict()["law"]
    assert said["batch"] == pytest.approx(law["coefficient"] / 2.5 ** law["exponent"])
    assert cli._run(["law", "batch", "--law", "minicpm", "--loss", "2.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batch"] == pytest.approx(3.98e6, rel=0.01)
    assert "tied to one tokenizer" in said["warning"]


# -- what a run makes of the answer -------------------------------------------------------------------------------------------


@pytest.fixture
def undecided(folder, tmp_path) -> Callable[..., Recipe]:
    """The recipe without a batch, its learning rate as the study had it at every batch."""

    def made(*overrides: str) -> Recipe:
        text = (folder / "tiny.toml").read_text(encoding="utf-8").replace('batch = "256"\n', "")
        (folder / "open.toml").write_text(text, encoding="utf-8")
        return load_recipe(folder / "open.toml", ['tunnel.batch.rate_rule="none"', "tunnel.batch.seeds=1", *overrides])

    return made


def test_a_recipe_without_a_batch_takes_the_studys_answer_and_says_so_and_the_first_run_pins_it(
    tmp_path, undecided, trained, capsys
):
    recipe, home = undecided(), Home(tmp_path)
    by_rule = load_program(recipe, home).batch
    answer = batch(recipe, tmp_path, quiet=True).to_dict()["answer"]
    asked = [stage.key for stage in trained]
    assert answer["own"] == 32 * by_rule
    wanted = answer["best"]["value"] / 32
    program = load_program(recipe, home)
    assert program.batch != by_rule
    assert abs(math.log2(program.batch / wanted)) <= 0.51
    (source,) = [value.source for value in program.derived() if value.name == "batch"]
    assert f"tunnel batch found {si(answer['best']['value'])} tokens [{si(answer['best']['low'])}, " in source
    run(recipe, tmp_path, until="corpora")
    assert source in re.sub(r"\s+", " ", capsys.readouterr().err)

    trained.clear()  # the study itself asks for the same trials again, whatever its answer was used for
    batch(recipe, tmp_path, quiet=True)
    assert [stage.key for stage in trained] == asked
    with LabBook(home.labbook) as book:
        fact = book.fact("tiny", "batch", "batch")
        book.put_fact("tiny", "batch", "batch", {**fact, "answer": None})
    assert load_program(recipe, home).batch == program.batch  # pinned
    run(recipe, tmp_path, quiet=True, until="corpora")
    trained.clear()
    batch(recipe, tmp_path, quiet=True)
    assert [stage.key for stage in trained] == asked


def test_an_answer_for_another_program_or_at_another_learning_rate_is_not_taken(tmp_path, undecided, trained):
    home, recipe = Home(tmp_path), undecided()
    batch(recipe, tmp_path, quiet=True)
    answered, by_rule = load_program(recipe, home).batch, step_law_batch(2_000_000, 32)
    assert answered != by_rule
    assert load_program(undecided('trunk.tokens="1.9M"'), home).batch == step_law_batch(1_900_000, 32)
    assert load_program(undecided('trunk.batch="256"'), home).batch == 8
    batch(scaled := undecided('tunnel.batch.rate_rule="sqrt"'), tmp_path, quiet=True)
    assert load_program(scaled, home).batch == by_rule  # the rate would have to follow
    assert load_program(undecided("tunnel.trials=4"), home).batch == answered  # it is searched at the new batch
    run(recipe, tmp_path, quiet=True, until="corpora")
    assert load_program(undecided("tunnel.trials=4"), home).batch == by_rule  # pinned before


def test_a_grid_that_misses_the_best_batch_says_so_and_gives_no_line(tmp_path, folder, trained):
    recipe = load_recipe(folder / "tiny.toml", ["tunnel.batch.batches=[1024,2048,4096]"])
    found = batch(recipe, tmp_path, quiet=True).to_dict()
    assert "expected best batches at 2 losses or more" in found["law"]["undecided"]
    assert {m["edge"] for m in found["law"]["minima"]} == {"small"}
    assert any("outside the batches that were tried" in note for note in found["answer"]["notes"])
    with LabBook(Home(tmp_path).labbook) as book:
        html = render(book, "tiny")
    assert "No line through the minima" in html
    assert "smallest that was tried" in html


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tunnel.batch.batches=[100,200,300]", "expected multiples of model.row = 32, got 100"),
        ("tunnel.batch.batches=[64,64,128]", "expected each value once"),
        ('tunnel.batch.sizes=["7T"]', "tunnel.batch.sizes: expected a size"),
        ('tunnel.batch.tokens=["10%","20N"]', "expected lengths in tokens or as 20N, got '10%'"),
        ("tunnel.batch.factors=[2,4]", "expected rising factors from 1"),
    ],
)
def test_a_wrong_study_is_one_line_before_any_work(folder, override, words):
    with pytest.raises(RecipeError, match=r"batch") as error:
        load_recipe(folder / "tiny.toml", [override])
    assert words in str(error.value)


def test_the_study_in_the_documentation_is_valid_and_says_its_command_and_time() -> None:
    recipe = load_recipe(STUDIES / "batch.toml")
    assert recipe.tunnel is not None
    assert recipe.tunnel.batch is not None
    head = (STUDIES / "batch.toml").read_text(encoding="utf-8").splitlines()[:3]
    assert "windtunnel tunnel batch docs/studies/batch.toml" in head[0]
    assert "minutes on 2 cores" in head[1]
