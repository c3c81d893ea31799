"""The same jobs on a real local Ray cluster of two nodes: equal numbers, and a node that is lost costs nothing but time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.base.runtime import Runtime
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.prepared import Prepared
from windtunnel.pretrain.branch import decay_stage
from windtunnel.train.folder import RESULT, checkpoint_path, read_result, steps_saved
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.tunnel.cluster import RayFleet, pack, unpack
from windtunnel.tunnel.fleet import Job

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the package ray is not installed")
"""Ray's own local cluster."""


class Notes:
    """A watcher that only writes down; ``on_done`` is called with the number of jobs done so far."""

    def __init__(self, on_done=lambda number: None) -> None:
        self.said: list[str] = []
        self.finished: list[str] = []
        self._on_done = on_done

    def started(self, job: Job) -> None: ...

    def progress(self, job: Job, word) -> None: ...

    def done(self, job: Job, result, reason: str) -> None:
        self.finished.append(job.stage.name)
        self._on_done(len(self.finished))

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def cluster():
    """A head without cores and two nodes with one each."""
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_is_lost_in_the_middle_loses_no_trial_and_changes_no_number(
    cluster, tmp_path, make_trial, tiny_corpus
):
    kept, lost = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    jobs = [
        Job(replace(make_trial(30, seed=i), name=f"trial-{i}"), tmp_path / "runs" / str(i), {"tiny": tiny_corpus.path})
        for i in range(6)
    ]
    notes = Notes(on_done=lambda number: cluster.remove_node(lost, allow_graceful=False) if number == 2 else None)
    with RayFleet(cluster.address, "cpu", eager=True) as fleet:
        results = fleet.run(jobs, notes)
    assert sorted(notes.finished) == [f"trial-{i}" for i in range(6)]
    assert any("its machine was lost" in text for text in notes.said)
    workshop = Workshop(Runtime(compiled=False))
    for job in jobs:
        alone = run_stage(job.stage, tmp_path / "alone" / job.run.name, {"tiny": tiny_corpus}, workshop)
        assert results[str(job.run)]["scores"] == alone["scores"]
        assert read_result(job.run, job.stage) is not None
        assert list(read_metrics(job.run)) == list(read_metrics(tmp_path / "alone" / job.run.name))
    cluster.remove_node(kept)


@pytest.mark.slow
def test_a_branch_travels_with_the_checkpoint_it_grows_from(cluster, tmp_path, make_trunk, tiny_corpus, tiny_setting):
    node = cluster.add_node(num_cpus=1)
    trunk = make_trunk(12, (8,))
    branch = decay_stage(trunk, "branch", tiny_setting, at=8, steps=4)
    folders = {"tiny": tiny_corpus.path}
    jobs = [
        Job(trunk, tmp_path / "trunk", folders),
        Job(branch, tmp_path / "branch", folders, checkpoint_path(tmp_path / "trunk", 8)),
    ]
    with RayFleet(cluster.address, "cpu", eager=True) as fleet:
        results = fleet.run(jobs, Notes())
    assert steps_saved(tmp_path / "trunk") == [8, 12]
    assert steps_saved(tmp_path / "branch") == [12]
    assert all("failed" not in result for result in results.values())
    cluster.remove_node(node)


@pytest.mark.slow
def test_a_driver_on_a_cluster_writes_the_same_lab_book(
    cluster, tmp_path, make_trial, tiny_corpus, trained, monkeypatch
):
    node = cluster.add_node(num_cpus=1)
    monkeypatch.setattr(desk_module, "has_compiler", lambda: False)  # nothing is compiled, here or there
    corpora = {"tiny": {"folder": str(tiny_corpus.path), "hash": tiny_corpus.hash}}
    prepared = Prepared(tokenizer="", tokenizer_hash="", vocab=320, corpora=corpora)
    stages = [replace(make_trial(12, seed=i), name=f"trial-{i}") for i in range(3)]

    def book_of(home: str, devices: str | None) -> dict[str, list]:
        with Desk(Home(tmp_path / home), "p", devices=devices, quiet=True) as desk:
            results = desk.train("search", "search", stages, prepared)
            assert desk.used("search") == [stage.folder_name for stage in stages]
            assert not any("failed" in result for result in results.values())
        book = LabBook(Home(tmp_path / home).labbook, readonly=True)
        said, rows = book.dump(), book.runs(program="p")
        book.close()
        clock = {"started", "ended", "seconds"}
        runs = [{name: value for name, value in row.items() if name not in clock} for row in rows]
        return {"run": runs, "metric": said["metric"], "score": said["score"]}

    here = book_of("here", "cpu")
    assert trained == [stage.name for stage in stages]
    assert book_of("there", f"ray+cpu:{cluster.address}") == here
    assert len(trained) == len(stages), "the cluster trained its own"
    cluster.remove_node(node)


def test_an_address_at_which_nothing_answers_is_one_line():
    with pytest.raises(UserError, match=r"--devices ray: expected a Ray cluster at '127\.0\.0\.1:1', nothing answers"):
        RayFleet("127.0.0.1:1")


def test_a_run_folder_comes_out_of_its_packing_as_it_went_in(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000000004").mkdir(parents=True)
    (run / "checkpoints" / "step-000000004" / "manifest.json").write_text("{}")
    (run / RESULT).write_text(json.dumps({"step": 4}))
    unpack(pack(run), tmp_path / "there")
    assert names(tmp_path / "there") == names(run)
    assert not list((tmp_path / "there").glob(".incoming*"))


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
