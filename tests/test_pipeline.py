"""One tiny program from text to report: in order, once, continued, extended, redone where it must be and nowhere else."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from windtunnel import desk as desk_module
from windtunnel.base import labbook
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import ArtefactError, LimitReached, UserError, WindtunnelError
from windtunnel.base.labbook import LabBook
from windtunnel.comparison import compare, find_run
from windtunnel.home import Home
from windtunnel.laws.sealed import read_forecast
from windtunnel.manage import clean, evaluate, finish, status
from windtunnel.pipeline import run
from windtunnel.planning import plan
from windtunnel.rebuild import rebuild
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.train.checkpoint import newest_whole
from windtunnel.train.folder import checkpoint_path, steps_saved
from windtunnel.tunnel import fleet as fleet_module

RECIPE = """
name = "tiny"
seed = 3

[corpus.plain]
source = "plain.jsonl"
heldout = 0.1

[corpus.fine]
source = "fine.jsonl"
heldout = 0.1

[tokenizer]
vocab = 320

[model]
family = "tiny"
size = "0.2M"
row = 32

[tunnel]
proxies = ["0.02M", "0.05M", "0.1M"]
tokens = ["2560", "3840", "5120"]
trials = 3
trial_tokens = "1280"

[trunk]
tokens = "7680"
batch = "128"
warmup = "4 steps"
mixture = { plain = 1 }
checkpoint_every = "10 steps"

[branch.same]
tokens = "20%"

[branch.better]
tokens = "20%"
mixture = { plain = 1, fine = 1 }

[evaluate]
tokens = "2k"
"""


@pytest.fixture(scope="module", autouse=True)
def eager_workers():
    """Compiling takes longer than these few hundred steps."""
    patch = pytest.MonkeyPatch()
    patch.setattr(desk_module, "has_compiler", lambda: False)
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up) -> Path:
    """A recipe and its text."""
    made = tmp_path_factory.mktemp("pipeline")
    write_made_up(made / "plain.jsonl", 500)
    write_made_up(made / "fine.jsonl", 300, seed=7)
    (made / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def ran(folder) -> tuple[Path, list[tuple[str, bool]], Any]:
    """A home in which the recipe has run to its end, the order of what was trained, and what the run returned."""
    order: list[tuple[str, bool]] = []
    real = desk_module.Desk.train

    def train(self, title, study, stages, prepared, **options):
        sealed = any((self.home.program(self.program) / "forecasts").glob("*.json"))
        order.append((title.partition(":")[0], sealed))
        return real(self, title, study, stages, prepared, **options)

    def started(self, job):
        parent = self._desk.book.run(self._desk.run_id(job.stage))["forecast"]
        assert bool(parent) == (job.stage.name in ("trunk", "same")), "the forecast is its parent before it starts"
        started_before(self, job)

    started_before = desk_module._Recorder.started
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(desk_module._Recorder, "started", started)
        patch.setattr(desk_module.Desk, "train", train)
        view = run(recipe(folder), folder / "home", quiet=True)
    return folder / "home", order, view


@pytest.fixture
def home(ran, tmp_path, trained) -> Path:
    """A copy of that home, to do something to, without waiting for processes."""
    shutil.copytree(ran[0], tmp_path / "home")
    return tmp_path / "home"


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "tiny.toml", overrides)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def states(made: Recipe, home: Path) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in plan(made, home, measure=False).data["stages"]}


def run_folder(home: Path, name: str) -> Path:
    found = sorted(Home(home).runs("tiny").glob(f"{name}-??????????"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def trees(home: Path) -> dict[str, float]:
    """Every file of all runs with its time of change."""
    return {str(p.relative_to(home)): p.stat().st_mtime for p in Home(home).runs("tiny").rglob("*") if p.is_file()}


def test_everything_happens_in_order_and_the_forecast_is_sealed_before_the_trunks_first_step(ran):
    home, order, view = ran
    assert [title for title, _ in order] == ["search", "check", "scaling", "trunk", "branches"]
    assert [sealed for _, sealed in order] == [False, False, False, True, True]
    program = Home(home).program("tiny")
    (file,) = (program / "forecasts").glob("*.json")
    assert file.stat().st_mtime < (run_folder(home, "trunk") / "metrics.jsonl").stat().st_mtime
    sealed = read_forecast(file)
    trunk, branch = (read_json(run_folder(home, name) / "stage.json") for name in ("trunk", "same"))
    assert sealed.facts["target"] == branch["key"]
    assert sealed.facts["kind"] == "blind"
    assert branch["start"] == {"stage": trunk["key"], "step": 48}
    assert (program / "report.html").is_file()
    assert next((program / "exports").glob("better-*")).joinpath("config.json").is_file()
    assert set(view.data["scores"]) == {"same", "better"}
    assert view.data["outcome"]["forecast"] == sealed.hash
    book = LabBook(Home(home).labbook, readonly=True)
    assert {r["name"]: r["forecast"] for r in book.runs(study="")} == {
        "trunk": sealed.hash,
        "same": sealed.hash,
        "better": "",
    }
    assert {r["forecast"] for r in book.runs() if r["study"]} == {""}
    book.close()


def test_the_lab_book_holds_every_run_with_its_lineage_and_every_step_once(ran):
    home, _, _ = ran
    book = LabBook(Home(home).labbook, readonly=True)
    rows = {row["name"]: row for row in book.runs(program="tiny")}
    assert len(rows) == 3 + 3 + 3 * 4 + 3
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows["same"]["parent"] == rows["better"]["parent"] == rows["trunk"]["id"]
    assert book.metrics(rows["trunk"]["id"], "loss")[0] == list(range(1, 49))
    assert book.metrics(rows["better"]["id"], "loss")[0] == list(range(49, 61))
    for row in rows.values():
        if row["kind"] != "trunk":
            assert {s["name"] for s in book.scores(row["id"])} == {"bits_per_byte", "nats_per_byte"}
    book.close()


def test_a_second_run_trains_nothing_and_changes_no_run(folder, home, trained):
    before = trees(home)
    run(recipe(folder), home, quiet=True)
    assert trained == []
    assert trees(home) == before
    assert set(states(recipe(folder), home).values()) == {"done"}


def test_the_book_rebuilt_from_the_folders_is_the_book_row_for_row(home):
    path = Home(home).labbook
    book = LabBook(path)
    before = book.dump()
    book.close()
    path.write_bytes(b"damaged" * 100)
    with pytest.raises(ArtefactError, match="damaged or foreign file"):
        LabBook(path)
    view = rebuild(home)
    assert view.data["runs"] == len(before["run"])
    book = LabBook(path)
    after = book.dump()
    for table, rows in before.items():
        assert after[table] == rows, table
    book.close()
    assert [p.read_bytes()[:7] for p in home.glob("labbook.sqlite.*.old")] == [b"damaged"]
    for record in Home(home).runs("tiny").glob("*/record.json"):
        record.unlink()
    rebuild(home)
    book = LabBook(path)
    again = book.dump()
    book.close()
    assert again["metric"] == before["metric"]
    assert again["score"] == before["score"]


def test_more_tokens_extend_the_trunk_redo_only_the_branches_and_leave_the_old_ones(folder, home, trained):
    more = recipe(folder, "trunk.tokens=8960")
    found = states(more, home)
    assert found["search"] == found["scaling"] == "done"
    assert found["trunk"] == "extends (from step 48)"
    assert found["same"].startswith("redoes (because ")
    old = {name: run_folder(home, name) for name in ("trunk", "same", "better")}
    old_result = (old["same"] / "result.json").read_bytes()
    series = (old["trunk"] / "metrics.jsonl").read_text(encoding="utf-8")
    run(more, home, quiet=True, until="better")
    assert trained == ["trunk", "same", "better"] or trained == ["trunk", "better", "same"]
    assert run_folder(home, "trunk") == old["trunk"]
    assert run_folder(home, "same") != old["same"]
    assert (old["same"] / "result.json").read_bytes() == old_result
    longer = (old["trunk"] / "metrics.jsonl").read_text(encoding="utf-8")
    assert longer.startswith(series)
    assert len(longer.splitlines()) == 56
    # And back: fewer tokens find everything as it was.
    trained.clear()
    assert set(states(recipe(folder), home).values()) == {"done"}
    run(recipe(folder), home, quiet=True, until="better")
    assert trained == []


def test_fewer_tokens_branch_from_the_nearest_checkpoint_and_train_no_trunk(folder, home, trained, capsys):
    fewer = recipe(folder, "trunk.tokens=5760")
    assert states(fewer, home)["trunk"] == "done"
    run(fewer, home, until="same")
    assert trained == ["same"]
    assert "same: branches at step 30, the nearest checkpoint before 36" in said(capsys)


def test_a_changed_batch_says_what_it_redoes_and_because_of_what_and_redoes_it(folder, home, trained, capsys):
    changed = recipe(folder, "trunk.batch=256")
    found = states(changed, home)
    assert found["trunk"].startswith("redoes (because batch 4 → 8")
    assert "redoes (because" in found["same"]
    run(changed, home, until="scaling")
    assert "the recipe has changed since the last run: trunk.batch: 128 → 256" in said(capsys)
    assert {name.partition("-")[0] for name in trained} == {"trial", "check", "proxy"}
    assert states(recipe(folder), home)["trunk"] == "done"  # the old runs are still there


def test_a_changed_scoring_scores_again_and_trains_nothing(folder, home, trained):
    changed = recipe(folder, "evaluate.tokens=1500")
    series = {p: p.read_bytes() for p in Home(home).runs("tiny").glob("same-*/metrics.jsonl")}
    tokens = read_json(run_folder(home, "same") / "result.json")["scores"]["plain"]["tokens"]
    run(
        recipe(folder, "evaluate.tokens=1500", "tunnel.trials=0", "optimizer.lr=0.01"),
        home,
        quiet=True,
        until="corpora",
    )
    assert trained == []
    run(changed, home, quiet=True, until="same")
    assert "trunk" not in trained
    assert "same" in trained
    assert {p: p.read_bytes() for p in series} == series
    assert read_json(run_folder(home, "same") / "result.json")["scores"]["plain"]["tokens"] < tokens


@pytest.mark.parametrize(
    ("override", "words"),
    [("max_loss=0.01", "expected loss .* > max_loss 0.01"), ("max_hours=0.0000001", "expected time .* > max_hours")],
)
def test_a_forecast_beyond_a_limit_stops_before_the_trunk_with_its_own_code(folder, home, trained, override, words):
    for name in ("trunk", "same", "better"):
        shutil.rmtree(run_folder(home, name))
    with pytest.raises(LimitReached, match=f"stopped before the trunk: {words}.*raise the limit to go on") as error:
        run(recipe(folder, override), home, quiet=True)
    assert error.value.exit_code == 3
    assert trained == []
    assert not list(Home(home).runs("tiny").glob("trunk-*"))


def test_until_stops_where_it_is_told_and_an_unknown_name_is_one_line(folder, tmp_path, home, trained):
    with pytest.raises(
        UserError, match="--until: expected one of corpora, search, scaling, forecast, trunk, same, better"
    ):
        run(recipe(folder), tmp_path / "new", until="branches")
    for name in ("same", "better"):
        shutil.rmtree(run_folder(home, name))
    run(recipe(folder), home, quiet=True, until="trunk")
    assert trained == []
    run(recipe(folder), home, quiet=True, until="same")
    assert trained == ["same"]
    view = run(recipe(folder), tmp_path / "new", quiet=True, until="corpora")
    assert view.data == {"program": "tiny", "until": "corpora"}
    assert sorted(p.name for p in (tmp_path / "new" / "corpora").iterdir())[0].startswith("fine-")


def test_a_trunk_that_was_told_to_finish_decays_from_there_and_more_tokens_extend_it_again(folder, home, trained):
    for name in ("trunk", "same", "better"):
        shutil.rmtree(run_folder(home, name))
    short = recipe(folder, "trunk.tokens=3840")
    run(short, home, quiet=True, until="trunk")
    saved = steps_saved(run_folder(home, "trunk"))
    trained.clear()
    finish(home, "tiny/trunk")
    assert sorted(trained) == ["better", "same"]
    branch = read_json(run_folder(home, "same") / "stage.json")
    assert branch["start"]["step"] == saved[-1] == 24
    trained.clear()
    finish(home, "tiny/trunk")
    assert trained == []
    run(recipe(folder, "trunk.tokens=5120"), home, quiet=True, until="trunk")
    assert trained == ["trunk"]
    assert steps_saved(run_folder(home, "trunk"))[-1] == 32
    with pytest.raises(UserError, match="expected a trunk, got the decay 'same'; write tiny/trunk"):
        finish(home, "tiny/same")


def test_a_damaged_newest_checkpoint_is_passed_over_aloud_and_the_run_goes_on(folder, home, trained, capsys):
    trunk = run_folder(home, "trunk")
    series = (trunk / "metrics.jsonl").read_text(encoding="utf-8")
    newest = checkpoint_path(trunk, steps_saved(trunk)[-1]) / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 16
    newest.write_bytes(data)
    run(recipe(folder, "trunk.tokens=8960"), home, until="trunk")
    text = said(capsys)
    assert "passing over a damaged checkpoint" in text
    assert "does not match its hash" in text
    assert (trunk / "metrics.jsonl").read_text(encoding="utf-8").startswith(series)
    assert newest_whole(trunk) is not None


def test_a_damaged_parent_is_one_line_and_nothing_grows_from_it(folder, home):
    for name in ("same", "better"):
        shutil.rmtree(run_folder(home, name))
    trunk = run_folder(home, "trunk")
    file = checkpoint_path(trunk, 48) / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(WindtunnelError, match=r"the content does not match its hash.*delete that folder") as error:
        run(recipe(folder), home, quiet=True, until="better")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_full_disk_under_a_worker_ends_the_run_in_one_line_and_the_next_one_goes_on(folder, home, monkeypatch):
    for name in ("same", "better"):
        shutil.rmtree(run_folder(home, name))
    monkeypatch.setattr(desk_module, "Fleet", fleet_module.Fleet)
    real = fleet_module.subprocess.Popen

    def limited(command, **options):
        return real(
            command, **options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        )

    with monkeypatch.context() as patch:
        patch.setattr(fleet_module.subprocess, "Popen", limited)
        with pytest.raises(WindtunnelError, match="the disk or quota is full") as error:
            run(recipe(folder), home, quiet=True, until="better")
    assert error.value.exit_code == 2
    run(recipe(folder), home, quiet=True, until="better")
    assert states(recipe(folder), home)["better"] == "done"


def test_a_home_on_a_network_file_system_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(labbook, "network_file_system", lambda _: "nfs4")
    with pytest.raises(UserError, match=r"network file system \(nfs4\).*--home"):
        run(recipe(folder), tmp_path / "remote", quiet=True)
    assert not (tmp_path / "remote").exists()


def test_two_drivers_of_one_program_do_not_work_at_the_same_time(folder, home):
    desk = desk_module.Desk(Home(home), "tiny", quiet=True)
    with (
        desk,
        pytest.raises(UserError, match=f"another windtunnel process is at work here \\(process {os.getpid()}\\)"),
    ):
        run(recipe(folder), home, quiet=True)
    run(recipe(folder), home, quiet=True)


def test_compare_says_what_differs_and_puts_losses_at_equal_tokens_and_seconds(home):
    view = compare(home, ["tiny/same", "tiny/better"], out=home / "compare.html")
    text = json.dumps(view.data)
    assert "plan" in text
    shown = io.StringIO()
    Console(file=shown, width=160).print(view)
    assert "held-out bits per byte" in shown.getvalue()
    assert "training loss at" in shown.getvalue()


def test_clean_lists_old_runs_and_touches_neither_them_nor_what_is_needed_until_it_is_told(folder, home):
    needed = {p.name for p in Home(home).runs("tiny").iterdir()}
    run(recipe(folder, "tunnel.tokens=['2560','3840','6400']", "tunnel.trials=0"), home, quiet=True, until="scaling")
    new = {p.name for p in Home(home).runs("tiny").iterdir()} - needed
    before = trees(home)
    listed = clean(home)
    assert trees(home) == before
    gone = {Path(name).name for name in listed.data["folders"]}
    book = LabBook(Home(home).labbook, readonly=True)
    rows = {Path(row["folder"]).name: row for row in book.runs(program="tiny")}
    book.close()
    parents = {row["parent"].partition("/")[2] for name, row in rows.items() if name not in gone}
    assert not gone & (new | parents)
    assert not any(rows[name]["kind"] == "decay" and not rows[name]["study"] for name in gone if name in rows)
    assert gone & needed
    clean(home, really=True)
    assert not any((Home(home).runs("tiny") / name).exists() for name in gone)
    run(recipe(folder, "tunnel.tokens=['2560','3840','6400']", "tunnel.trials=0"), home, quiet=True, until="better")


def test_clean_keeps_what_the_latest_recipe_needs_even_where_it_was_trained_before_another(folder, home):
    first = {p.name for p in Home(home).runs("tiny").iterdir()}
    other = recipe(folder, "tunnel.tokens=['2560','3840','6400']", "tunnel.trials=2")
    run(other, home, quiet=True, until="scaling")
    run(recipe(folder), home, quiet=True)
    gone = {Path(name).name for name in clean(home).data["folders"]}
    assert gone
    assert not gone & first


def test_scores_of_eval_stay_when_the_lab_book_is_written_anew(home):
    view = evaluate(home, "tiny/trunk", tokens=500, retrieval=1)
    assert view.data["retrieval"] == []  # its rows are too short to hide anything in
    book = LabBook(Home(home).labbook)
    scores = book.scores(find_run(book, "tiny/trunk")["id"])
    book.close()
    assert {score["corpus"] for score in scores} == {"plain", "fine"}
    rebuild(home)
    book = LabBook(Home(home).labbook)
    assert book.scores(find_run(book, "tiny/trunk")["id"]) == scores
    book.close()


def test_a_held_out_part_that_changed_is_scored_again_and_nothing_is_trained(folder, tmp_path, write_made_up, trained):
    source = tmp_path / "text"
    source.mkdir()
    for name in ("plain.jsonl", "tiny.toml"):
        shutil.copy(folder / name, source)
    write_made_up(source / "fine.jsonl", 300, seed=7)
    options = ("tunnel.trials=0", "branch.better.mixture={plain=1}", "branch.better.floor=0.2")
    run(recipe(source, *options), tmp_path / "home", quiet=True, until="better")
    before = read_json(run_folder(tmp_path / "home", "same") / "result.json")
    write_made_up(source / "fine.jsonl", 320, seed=7)
    trained.clear()
    run(recipe(source, *options), tmp_path / "home", quiet=True, until="better")
    after = read_json(run_folder(tmp_path / "home", "same") / "result.json")
    assert "trunk" not in trained
    assert {"same", "better"} <= set(trained)
    assert (before["step"], before["loss"]) == (after["step"], after["loss"])
    assert before["scores"]["plain"] == after["scores"]["plain"]
    assert before["scores"]["fine"]["corpus"] != after["scores"]["fine"]["corpus"]


def test_status_shows_what_is_done(home):
    data = status(home).data["tiny"]
    assert {row["name"]: row["status"] for row in data["runs"]} == {"trunk": "done", "same": "done", "better": "done"}
    assert set(data["studies"]) == {"search", "check", "scaling"}
    assert data["runs"][1]["scores"].keys() == {"plain", "fine"}
