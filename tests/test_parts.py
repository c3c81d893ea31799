"""A search that is cut into parts, killed, extended or moved is one search: nothing is lost and nothing is trained twice."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.artefact import read_json, write_json
from windtunnel.base.errors import UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.batch_study import batch
from windtunnel.corpus.store import open_corpus
from windtunnel.home import Home
from windtunnel.manage import clean
from windtunnel.merging import merge
from windtunnel.pipeline import run
from windtunnel.rebuild import rebuild
from windtunnel.recipe import load_recipe
from windtunnel.report.cost import cost_line
from windtunnel.report.page import render
from windtunnel.transfer_study import transfer
from windtunnel.tunnel.fleet import orphaned

TUNNEL = """
trials = 14
trial_tokens = "1280"
sampler = "sobol"
"""


class Killed(BaseException):
    """Ends a driver as a signal would: no handler runs."""


class Planted:
    """A fleet that trains nothing: a stage's loss is a bowl around a rate of 0.02; it can be killed before any job.

    What rates above ``high`` meet is in ``fails``; of a trunk's steps they meet it on the second rung.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.die_after: int | None = None
        self.fails: dict[str, Any] = {}
        self.high = 0.03
        self.on: dict[str, Any] = {}

    def __call__(self, *_, **__) -> Planted:
        return self

    def close(self) -> None:
        pass

    def run(self, jobs, watcher, *, stopping):
        results = {}
        for job in jobs:
            if self.die_after == 0:
                raise Killed
            self.die_after = None if self.die_after is None else self.die_after - 1
            stage, parent = job.stage, str(job.parent.parent.parent) if job.parent else ""
            if (end := orphaned(job, results.get(parent, {}))) is None:
                self.trained.append(stage.name)
                watcher.started(job)
                write_json(job.run / "stage.json", {"key": stage.key, **stage.to_dict()})
                high = stage.optimizer.learning_rate > self.high and (stage.kind != "trunk" or stage.steps > 8)
                end = self.fails if high and self.fails and job.parent is None else None
            if end is not None:
                results[str(job.run)] = end
                watcher.done(job, end, end["failed"])
                continue
            loss = 1.5 + 0.1 * math.log(stage.optimizer.learning_rate / 0.02) ** 2
            loss += 0.05 * math.log(stage.parametrization.init_std / 0.1) ** 2
            loss += 0.01 * (int(stage.key[:8], 16) / 2**32 - 0.5)  # each seed has its own luck
            score = {"nats": loss * 1000, "bytes": 1000, "tokens": 500, "bits_per_byte": loss / math.log(2)}
            result = {
                "key": stage.key, "step": stage.steps, "tokens": stage.tokens, "skipped": 0, "score_tokens": stage.score_tokens,
                "scores": {name: {**score, "corpus": open_corpus(job.corpora[name]).hash} for name in stage.score},
                "loss": loss, "numeric_class": self.on, "peak_memory": 0, "seconds": {"step": 1.0}, "timed_tokens": 1,
                "flops": stage.flops,
            }  # fmt: skip
            for step in stage.keep:
                (job.run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True, exist_ok=True)
            write_json(job.run / "result.json", result)
            results[str(job.run)] = {**result, "wall": 0.0}
            watcher.done(job, results[str(job.run)], "")
        return results


@pytest.fixture
def fleet(monkeypatch) -> Planted:
    made = Planted()
    monkeypatch.setattr(desk_module, "Fleet", made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up, tiny_recipe) -> Path:
    made = tmp_path_factory.mktemp("parts")
    write_made_up(made / "plain.jsonl", 300)
    (made / "parts.toml").write_text(tiny_recipe(TUNNEL, name="parts", trunk='warmup = "4 steps"'), encoding="utf-8")
    return made


def searched(folder: Path, home: Path, *overrides: str, part: str | None = None):
    return run(load_recipe(folder / "parts.toml", overrides), home, quiet=True, until="search", part=part)


def table(home: Path):
    """The search as the lab book has it, without which run folders it used."""
    book = LabBook(Home(home).labbook, readonly=True)
    fact = book.fact("parts", "study", "search")
    book.close()
    return {key: value for key, value in fact.items() if key not in ("key", "runs")}


def trials(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith("trial"))


def test_parts_trained_in_different_homes_join_into_the_search_that_one_home_would_have_made(folder, tmp_path, fleet):
    searched(folder, tmp_path / "alone")
    alone = trials(fleet.trained)
    assert len(alone) == 14
    fleet.trained.clear()
    homes = [tmp_path / f"laptop-{number}" for number in (1, 2, 3)]
    for number, home in enumerate(homes, 1):
        view = searched(folder, home, part=f"{number}/3")
        assert view.data == {"program": "parts", "part": [number, 3], "trials": (5, 5, 4)[number - 1]}
    assert trials(fleet.trained) == alone  # each exactly once
    assert not [name for name in fleet.trained if not name.startswith("trial")]
    fleet.trained.clear()
    joined = merge(homes, tmp_path / "joined")
    assert (joined.data["copied"], joined.data["known"]) == (14, 0)
    searched(folder, tmp_path / "joined")
    assert trials(fleet.trained) == []
    assert table(tmp_path / "joined") == table(tmp_path / "alone")
    before = {str(p): p.stat().st_mtime for p in (tmp_path / "joined" / "programs").rglob("runs/**/*") if p.is_file()}
    again = merge([*homes, tmp_path / "joined"], tmp_path / "joined")  # itself among them, and all known
    assert (again.data["copied"], again.data["known"]) == (0, 14)
    after = {str(p): p.stat().st_mtime for p in (tmp_path / "joined" / "programs").rglob("runs/**/*") if p.is_file()}
    assert after == before
    rows = {}
    for home in (tmp_path / "joined", tmp_path / "alone"):
        book = LabBook(Home(home).labbook, readonly=True)
        rows[home.name] = [(r["id"], r["study"], r["status"], r["tokens"], book.scores(r["id"])) for r in book.runs()]
        book.close()
    assert sorted(rows["joined"], key=str) == sorted(rows["alone"], key=str)


SMALL = {
    transfer: 'tunnel.transfer={axes=["width","batch"],factors=[1,2],tokens="2560",seeds=2,layers=2}',
    batch: 'tunnel.batch={sizes=["0.02M","0.05M"],batches=[64,128,256],tokens=["2560","5120"],seeds=2}',
}


@pytest.mark.parametrize("study", [transfer, batch])
def test_a_transfer_or_batch_study_is_cut_into_parts_as_a_search_is(folder, tmp_path, fleet, study):
    recipe = load_recipe(folder / "parts.toml", (SMALL[study],))
    alone = study(recipe, tmp_path / "alone", quiet=True)
    whole, homes, parts = sorted(fleet.trained), [tmp_path / f"laptop-{i}" for i in (1, 2, 3)], []
    for number, home in enumerate(homes, 1):
        fleet.trained.clear()
        view = study(recipe, home, quiet=True, part=f"{number}/3")
        assert view.data == {"program": "parts", "part": [number, 3], "trials": len(fleet.trained)}
        parts.append(list(fleet.trained))
    first = sorted(name for part in parts for name in part)
    assert len(set(first)) == len(first)
    assert max(map(len, parts)) - min(map(len, parts)) <= (
        1 if study is transfer else 3
    )  # a trunk and its decays stay together
    assert len(first) == (3 * 5 * 2 if study is transfer else 2 * 3 * 2 * 3)
    merge(homes, tmp_path / "joined")
    fleet.trained.clear()
    joined = study(recipe, tmp_path / "joined", quiet=True)
    assert sorted(first + fleet.trained) == whole
    assert joined.data == alone.data
    with pytest.raises(UserError, match="--part: expected a share such as 3/28, got '4/3'"):
        study(recipe, homes[0], quiet=True, part="4/3")


def scaled(folder: Path, home: Path, *overrides: str, part: str | None = None):
    return run(load_recipe(folder / "parts.toml", overrides), home, quiet=True, until="scaling", part=part)


def test_a_scaling_study_is_cut_into_parts_of_trunks_with_their_branches_and_says_what_it_cost(folder, tmp_path, fleet):
    still = ("tunnel.trials=0", "tunnel.seeds=2")
    alone = scaled(folder, tmp_path / "alone", *still)
    whole, parts = sorted(fleet.trained), []
    assert len(whole) == 3 * 2 * (1 + 3)
    homes = [tmp_path / f"laptop-{i}" for i in (1, 2, 3, 4)]
    for number, home in enumerate(homes, 1):
        fleet.trained.clear()
        view = scaled(folder, home, *still, part=f"{number}/4")
        assert view.data == {"program": "parts", "part": [number, 4], "trials": len(fleet.trained)}
        assert not list((tmp_path / home / "programs").rglob("forecasts/*"))
        parts.append(list(fleet.trained))
    assert [len(part) for part in parts] == [8, 8, 4, 4]  # a trunk and its decays stay together
    assert sorted(name for part in parts for name in part) == whole
    merge(homes, tmp_path / "joined")
    fleet.trained.clear()
    joined = scaled(folder, tmp_path / "joined", *still)
    assert fleet.trained == []
    assert joined.data == alone.data
    assert (joined.data["cost"]["runs"], joined.data["cost"]["failed"]) == (24, 0)
    assert f"the scaling study of 'parts': {cost_line(joined.data['cost'])}; " in str(joined.parts[0])


def test_a_part_of_a_scaling_study_has_the_choices_of_the_search_or_does_not_begin(folder, tmp_path, fleet):
    with pytest.raises(
        UserError, match="--part: expected a search that has ended, .* found none; end windtunnel tunnel"
    ):
        scaled(folder, tmp_path / "home", part="1/2")
    assert fleet.trained == []
    searched(folder, tmp_path / "home")
    fleet.trained.clear()
    scaled(folder, tmp_path / "home", part="1/2")
    assert [name for name in fleet.trained if not name.startswith("proxy")] == []
    stages = [read_json(path) for path in Home(tmp_path / "home").runs("parts").glob("proxy*/stage.json")]
    choices = table(tmp_path / "home")["choices"]
    assert len(stages) == 2 * 4
    assert {stage["optimizer"]["learning_rate"] for stage in stages} == {choices["learning_rate"]}


def test_a_search_of_nothing_is_refused_in_one_line_before_any_work(folder, tmp_path, fleet):
    stated = ("optimizer.lr=0.01", "model.init_std=0.1", "model.scale_emb=12", "model.scale_depth=1.4")
    for overrides, words in [
        (("tunnel.trials=0",), "--set tunnel.trials: expected trials to search with, got 0; windtunnel run takes"),
        (stated, "tunnel.space: expected a hyper-parameter that the recipe leaves open, got a value for each"),
        (("tunnel=none",), "tunnel: expected a [tunnel] to search with, found none"),
    ]:
        with pytest.raises(UserError) as error:
            searched(folder, tmp_path / "home", *overrides)
        assert words in str(error.value)
        assert not (tmp_path / "home").exists()
    scaled(folder, tmp_path / "home", "tunnel.trials=0")  # what comes later goes on without a search
    assert trials(fleet.trained) == []


def test_what_does_not_belong_to_one_study_is_refused_by_name_and_nothing_is_copied(
    folder, tmp_path, fleet, write_made_up
):
    searched(folder, tmp_path / "one", part="1/2")
    other = tmp_path / "text"
    other.mkdir()
    shutil.copy(folder / "parts.toml", other)
    write_made_up(other / "plain.jsonl", 300, seed=5)
    searched(other, tmp_path / "other-text", part="2/2")
    searched(folder, tmp_path / "other-recipe", "trunk.batch=256", part="2/2")
    searched(folder, tmp_path / "numerics", part="2/2")
    stage = next(Home(tmp_path / "numerics").runs("parts").glob("*/stage.json"))
    write_json(stage, {**read_json(stage), "key": "0" * 64})
    for name, part in (("newer", {"of_a_later_version": 1}), ("newer-shape", {"shape": {"unheard_of": 1}})):
        searched(folder, tmp_path / name, part="2/2")
        stage = next(Home(tmp_path / name).runs("parts").glob("*/stage.json"))
        write_json(stage, {**read_json(stage), **part})
    corpus = tmp_path / "corpus"
    shutil.copytree(tmp_path / "one", corpus)
    prepared = Home(corpus).program("parts") / "prepared.json"
    changed = read_json(prepared)
    changed["corpora"]["plain"]["hash"] = "f" * 64
    write_json(prepared, changed)
    for name, words in [
        ("other-text", "expected the tokenizer .* for 'parts', got"),
        ("corpus", "expected the corpus 'plain' .* for 'parts', got ffffffffffff"),
        ("other-recipe", "expected the recipe of .* got another: trunk.batch: 128 → 256"),
        ("numerics", "expected a run with the numerics of this version, got one with others"),
        ("newer", "expected a run with the numerics of this version, got one with others"),
        ("newer-shape", "expected a run with the numerics of this version, got one with others"),
        ("into", "expected another home to join into this one, got itself alone"),
        ("empty", "expected a home with a program whose corpora are built, found none"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            merge([tmp_path / name] if name == "into" else [tmp_path / "one", tmp_path / name], tmp_path / "into")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "into" / "labbook.sqlite").exists()
        assert not list((tmp_path / "into").rglob("stage.json"))


def test_trials_that_ran_on_different_things_are_joined_only_where_that_is_wanted(folder, tmp_path, fleet):
    homes = [tmp_path / "one", tmp_path / "two"]
    for number, home in enumerate(homes, 1):
        fleet.on = {"device": "x86_64", "threads": 1, "torch": f"2.{11 + number}.0"}
        searched(folder, home, part=f"{number}/2")
    with pytest.raises(UserError) as error:
        merge(homes, tmp_path / "into")
    assert re.search(
        r"two: expected the search of 'parts' to run on torch 2.12.0, as in .*one, got torch 2.13.0", str(error.value)
    )
    assert "device" not in str(error.value)
    assert str(error.value).endswith("or merge all the same with --mixed-numerics")
    assert not (tmp_path / "into" / "labbook.sqlite").exists()
    assert merge(homes, tmp_path / "into", mixed=True).data["copied"] == 14


@pytest.mark.parametrize(
    ("part", "overrides", "words"),
    [
        ("4/3", (), "--part: expected a share such as 3/28, got '4/3'"),
        ("0/3", (), "--part: expected a share"), ("x", (), "--part: expected a share"), ("1/", (), "--part: expected a share"),
        ("1/2", ("tunnel.sampler=tpe",), "got the sampler 'tpe'; write tunnel.sampler"),
        ("1/2", ("tunnel.trials=0",), "--part: expected a search to take part in"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_trained_alone_is_one_line(folder, tmp_path, fleet, part, overrides, words):
    with pytest.raises(UserError, match=words):
        searched(folder, tmp_path / "home", *overrides, part=part)
    assert fleet.trained == []


@pytest.mark.parametrize("sampler", ["sobol", "tpe"])
def test_a_search_killed_twenty_times_ends_with_the_table_of_one_that_nobody_killed(folder, tmp_path, fleet, sampler):
    options = (f"tunnel.sampler={sampler}", "tunnel.trials=26", "tunnel.per_round=3", "tunnel.on_edge=widen")
    searched(folder, tmp_path / "whole", *options)
    whole = sorted(fleet.trained)
    fleet.trained.clear()
    assert killed_often(fleet, folder, tmp_path / "killed", options, sampler, (0, 1, 1, 2)) == 20
    assert sorted(fleet.trained) == whole  # nothing lost, nothing trained twice
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert json.dumps(table(tmp_path / "killed")).count('"number"') >= 26


def test_a_search_is_extended_and_shrunk_without_training_a_trial_again(folder, tmp_path, fleet):
    searched(folder, tmp_path / "home", "tunnel.trials=6", "tunnel.sampler=tpe")
    assert trials(fleet.trained) == [f"trial-{i:03d}" for i in range(6)]
    fleet.trained.clear()
    searched(folder, tmp_path / "home", "tunnel.trials=13", "tunnel.sampler=tpe")
    assert trials(fleet.trained) == [f"trial-{i:03d}" for i in range(6, 13)]
    fleet.trained.clear()
    longer = table(tmp_path / "home")
    searched(folder, tmp_path / "home", "tunnel.trials=4", "tunnel.sampler=tpe")
    assert trials(fleet.trained) == []
    assert table(tmp_path / "home")["trials"] == longer["trials"][:4]


@pytest.mark.parametrize("rule", ["halving", "forecast"])
def test_a_pruned_search_trains_fewer_tokens_finishes_its_best_and_survives_kills_as_well(
    folder, tmp_path, fleet, rule
):
    options = (f"tunnel.prune={rule}", "tunnel.sampler=tpe", "tunnel.trials=24", "tunnel.trial_tokens=20480")
    searched(folder, tmp_path / "whole", *options)
    whole, fact = sorted(fleet.trained), table(tmp_path / "whole")
    finished = [t for t in fact["trials"] if t["loss"] is not None]
    assert 1 <= len(finished) <= 8
    assert min(finished, key=lambda t: t["loss"])["number"] == fact["best"]
    assert all(t.get("guess") is not None for t in fact["trials"] if t["loss"] is None)
    book = LabBook(Home(tmp_path / "whole").labbook, readonly=True)
    runs = book.runs(program="parts", study="search")
    book.close()
    assert {r["status"] for r in runs} == {"done"}
    trunks = {r["name"]: r["config"]["steps"] for r in runs if r["kind"] == "trunk"}
    assert len(trunks) == 24
    assert sorted(set(trunks.values())) == [
        8,
        32,
        128,
    ]  # the trunks' ends of 10, 40 and 160 steps, a fifth each for the decay
    decays = [r["config"]["steps"] - r["config"]["start"]["step"] for r in runs if r["kind"] == "decay"]
    assert sum(trunks.values()) + sum(decays) < 0.45 * 24 * 160
    fleet.trained.clear()
    killed_often(fleet, folder, tmp_path / "killed", options, 1, (0, 1, 3, 5))
    assert sorted(fleet.trained) == whole
    assert table(tmp_path / "killed") == fact


DIVERGED = {"failed": "10 updates in a row were not finite", "diverged": True}
CRASHED = {"failed": "the worker ended with code 7"}


def killed_often(fleet, folder, home: Path, options, seed: int | str, after: tuple[int, ...]) -> int:
    """One search, killed up to twenty times after a number of trials drawn from ``after``, then left to end; how often it was."""
    draw, kills = random.Random(seed), 0
    while True:
        fleet.die_after = draw.choice(after) if kills < 20 else None
        try:
            searched(folder, home, *options)
            return kills
        except Killed:
            kills += 1


def failed_trials(home: Path) -> list[str]:
    book = LabBook(Home(home).labbook, readonly=True)
    rows = [row["name"] for row in book.runs(program="parts", status="failed")]
    book.close()
    return sorted(rows)


@pytest.mark.parametrize("end", [DIVERGED, CRASHED])
def test_a_trial_that_failed_is_a_result_too_in_a_search_that_is_killed_extended_merged_or_rebuilt(
    folder, tmp_path, fleet, end
):
    fleet.fails = end
    options = ("tunnel.trials=26", "tunnel.sampler=tpe", "tunnel.per_round=3", "tunnel.on_edge=widen")
    searched(folder, tmp_path / "whole", *options)
    whole, fact = sorted(fleet.trained), table(tmp_path / "whole")
    lost = failed_trials(tmp_path / "whole")
    assert 3 <= sum(t["loss"] is None for t in fact["trials"]) <= len(lost)
    fleet.trained.clear()
    killed_often(fleet, folder, tmp_path / "killed", options, 5, (0, 1, 1, 2))
    assert sorted(fleet.trained) == whole
    assert table(tmp_path / "killed") == fact
    fleet.trained.clear()
    searched(folder, tmp_path / "killed", *options, "tunnel.trials=30", "tunnel.on_edge=say")
    assert not set(lost) & set(trials(fleet.trained))
    homes = [tmp_path / "laptop-1", tmp_path / "laptop-2"]
    for number, home in enumerate(homes, 1):
        searched(folder, home, part=f"{number}/2")
    fleet.trained.clear()
    merge(homes, tmp_path / "joined")
    rebuild(tmp_path / "joined")
    apart = failed_trials(tmp_path / "joined")
    assert apart == sorted(failed_trials(homes[0]) + failed_trials(homes[1]))
    assert apart
    searched(folder, tmp_path / "joined")
    assert trials(fleet.trained) == []
    assert set(apart) <= set(failed_trials(tmp_path / "joined"))


@pytest.mark.parametrize("prune", ["none", "halving"])
@pytest.mark.parametrize(
    ("end", "words"),
    [
        (DIVERGED, "lower its learning rates"),
        (
            CRASHED,
            "mend what ended trial-000 (the worker ended with code 7), then windtunnel clean --failed --really lets",
        ),
    ],
)
def test_a_search_without_a_single_loss_names_the_space_and_the_way_out(folder, tmp_path, fleet, end, words, prune):
    fleet.fails, fleet.high = end, 0.0
    with pytest.raises(WindtunnelError) as error:
        searched(folder, tmp_path / "home", "tunnel.sampler=tpe", "tunnel.trial_tokens=81920", f"tunnel.prune={prune}")
    said = str(error.value)
    assert "tunnel.space: expected a trial with a loss, got 14, all failed or diverged; " in said
    assert words in said
    assert ("clean --failed" in said) == (end is CRASHED)
    assert "\n" not in said


@pytest.mark.parametrize("study", [transfer, batch])
def test_a_study_without_a_single_loss_says_that_it_is_undecided_and_so_does_its_report(folder, tmp_path, fleet, study):
    fleet.fails, fleet.high = DIVERGED, 0.0
    recipe = load_recipe(folder / "parts.toml", (SMALL[study],))
    view = study(recipe, tmp_path / "home", quiet=True)
    verdicts = [part for part in view.parts if "undecided" in str(part)]
    assert len(verdicts) == (2 if study is transfer else 3)  # width and batch; line, terms and answer
    assert view.data.get("cost", view.data.get("axes", {}).get("width", {}).get("cost"))["failed"] > 0
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    page = render(book, "parts")
    book.close()
    assert "undecided" in page if study is transfer else "No answer" in page


def test_pruned_trials_that_diverge_on_a_later_rung_are_not_tried_again_and_their_decays_not_at_all(
    folder, tmp_path, fleet
):
    fleet.fails, fleet.high = DIVERGED, 0.02
    options = ("tunnel.prune=halving", "tunnel.sampler=tpe", "tunnel.trials=16", "tunnel.trial_tokens=20480")
    space = "tunnel.space={learning_rate=[0.01,0.08]}"
    searched(folder, tmp_path / "home", *options, space)
    fact, lost = table(tmp_path / "home"), failed_trials(tmp_path / "home")
    assert [name for name in lost if name.endswith("rung1")]
    assert not [name for name in lost if name in fleet.trained and "rung" in name]
    fleet.trained.clear()
    for record in Home(tmp_path / "home").program("parts").glob("studies/search-*.json"):
        record.unlink()
    searched(folder, tmp_path / "home", *options, space)
    assert fleet.trained == []
    assert table(tmp_path / "home") == fact
    assert failed_trials(tmp_path / "home") == lost


def test_a_trial_that_was_given_up_is_named_and_clean_lets_it_be_tried_again(folder, tmp_path, fleet, capsys):
    fleet.fails = CRASHED
    searched(folder, tmp_path / "home")
    lost = failed_trials(tmp_path / "home")
    fleet.trained.clear()
    run(load_recipe(folder / "parts.toml", ("tunnel.trials=16",)), tmp_path / "home", until="search")
    assert "not tried again: trial-" in capsys.readouterr().err.replace("\n", " ")
    listed = clean(tmp_path / "home", failed=True).data
    assert len([name for name in listed["folders"] if name.endswith("failed.json")]) >= len(lost)
    assert not [name for name in clean(tmp_path / "home").data["folders"] if "failed" in name]
    clean(tmp_path / "home", really=True, failed=True)
    fleet.fails = {}
    fleet.trained.clear()
    searched(folder, tmp_path / "home", "tunnel.trials=16")
    assert set(lost) <= set(fleet.trained)
    assert set(trials(fleet.trained)) <= set(lost) | {"trial-014", "trial-015"}
    assert failed_trials(tmp_path / "home") == []
    assert not list((tmp_path / "home").rglob("failed.json"))


def test_a_renamed_search_takes_its_trials_over_and_says_so(folder, tmp_path, fleet, capsys):
    fleet.fails = DIVERGED
    searched(folder, tmp_path / "home")
    fact, lost = table(tmp_path / "home"), failed_trials(tmp_path / "home")
    fleet.trained.clear()
    renamed = load_recipe(folder / "parts.toml", ("name=other", "tunnel.trials=16"))
    run(renamed, tmp_path / "home", until="search")
    assert trials(fleet.trained) == ["trial-014", "trial-015"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("search: runs of 'parts' in this home that are the same are taken over, not trained again") == 1
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    again = book.fact("other", "study", "search")
    rows = {row["name"]: row for row in book.runs(program="other", study="search")}
    book.close()
    assert again["trials"][:14] == fact["trials"]
    assert {row["status"] for row in rows.values()} == {"done", "failed"}
    assert {name for name, row in rows.items() if row["status"] == "failed"} >= {
        n for n in lost if n.startswith("trial")
    }
    assert all(row["folder"].startswith("programs/other/runs/") for row in rows.values())
    fleet.trained.clear()
    run(renamed, tmp_path / "elsewhere", quiet=True, until="search")
    assert len(trials(fleet.trained)) == 16


def test_a_target_that_failed_is_tried_again_by_the_same_command(folder, tmp_path, fleet):
    fleet.fails = DIVERGED
    recipe = load_recipe(folder / "parts.toml", ("tunnel.trials=0", "optimizer.lr=0.05"))
    for _ in range(2):
        fleet.trained.clear()
        with pytest.raises(WindtunnelError, match="not finite; the same command tries again"):
            run(recipe, tmp_path / "home", quiet=True, until="trunk")
        assert len(fleet.trained) >= 1
        assert not list((tmp_path / "home").rglob("trunk-*/failed.json"))


def test_a_search_stops_by_itself_when_its_gap_is_under_the_noise_that_repeats_of_its_best_trial_measured(
    folder, tmp_path, fleet
):
    options = ("tunnel.sampler=tpe", "tunnel.trials=120", "tunnel.stop=enough", "optimizer.beta1=0.9")
    space = "tunnel.space={learning_rate=[0.002,0.08],init_std=[0.03,0.3]}"
    searched(folder, tmp_path / "home", *options, space)
    fact = table(tmp_path / "home")
    repeats = sorted(name for name in fleet.trained if name.startswith("repeat"))
    assert len(repeats) == 3
    assert len({name.rpartition("-")[0] for name in repeats}) == 1
    assert 8 <= len(fact["trials"]) == len(trials(fleet.trained)) < 120
    assert fact["stopped"].startswith("the gap to the optimum is under the seed noise after")
    assert fact["gap"]["enough"]
    assert 0 < fact["gap"]["noise"] < 0.01
    assert min(t["loss"] for t in fact["trials"]) < 1.5 + 0.01
    fleet.trained.clear()
    searched(folder, tmp_path / "home", *options, space)
    assert fleet.trained == []
    searched(folder, tmp_path / "stated", *options, space, "tunnel.noise=0.002")
    assert not [name for name in fleet.trained if name.startswith("repeat")]
    assert table(tmp_path / "stated")["gap"]["noise"] == pytest.approx(0.002 * 1.5, rel=0.02)
    searched(folder, tmp_path / "all", "tunnel.sampler=tpe", "tunnel.trials=14", space)
    assert table(tmp_path / "all")["stopped"] == ""
    assert len(table(tmp_path / "all")["trials"]) == 14
