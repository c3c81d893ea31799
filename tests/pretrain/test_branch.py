"""A branch is the uninterrupted run of its schedule, and neither branching nor extending changes what was there before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from windtunnel.base.artefact import read_json, read_manifest
from windtunnel.corpus.loader import Loader
from windtunnel.corpus.mixture import locate
from windtunnel.pretrain.branch import decay_stage, whole_run
from windtunnel.train.folder import RESULT, checkpoint_path, read_result, steps_saved
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics


@pytest.fixture(scope="module")
def workshop(eager):
    return Workshop(eager)


def weights(run, step) -> list[bytes]:
    return [file.read_bytes() for file in sorted(checkpoint_path(run, step).glob("*.safetensors"))]


@pytest.mark.parametrize("form", ["linear", "exponential"])
def test_a_decay_branch_is_bit_for_bit_the_uninterrupted_run_of_its_schedule_and_its_parent_is_untouched(
    tmp_path, workshop, make_trunk, tiny_setting, tiny_corpus, form
):
    corpora = {"tiny": tiny_corpus}
    trunk = make_trunk(12, (8, 12))
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    parent = checkpoint_path(tmp_path / "trunk", 8)
    hash_before = read_manifest(parent).hash
    branch = decay_stage(trunk, "same", tiny_setting, at=8, steps=6, form=form)
    result = run_stage(branch, tmp_path / "branch", corpora, workshop, parent=parent)
    reference = run_stage(whole_run(branch), tmp_path / "whole", corpora, workshop)
    assert weights(tmp_path / "branch", 14) == weights(tmp_path / "whole", 14)
    assert result["scores"] == reference["scores"]
    series = [list(read_metrics(tmp_path / name)) for name in ("trunk", "branch", "whole")]
    assert series[0][:8] + series[1] == series[2]
    assert read_manifest(parent).hash == hash_before
    assert result["tokens"] == branch.tokens == 14 * branch.step_tokens


def test_a_trunk_extended_by_more_steps_is_the_longer_trunk_and_trains_only_what_is_new(
    tmp_path, workshop, make_trunk, tiny_corpus
):
    corpora = {"tiny": tiny_corpus}
    run_stage(make_trunk(10), tmp_path / "trunk", corpora, workshop)
    longer = make_trunk(17, (5,))
    longer = replace(longer, keep=(10, 17))
    assert read_result(tmp_path / "trunk", longer) is None
    result = run_stage(longer, tmp_path / "trunk", corpora, workshop)
    assert result["timed_tokens"] == 7 * longer.step_tokens
    run_stage(longer, tmp_path / "whole", corpora, workshop)
    assert weights(tmp_path / "trunk", 17) == weights(tmp_path / "whole", 17)
    assert weights(tmp_path / "trunk", 10) == weights(tmp_path / "whole", 10)
    assert list(read_metrics(tmp_path / "trunk")) == list(read_metrics(tmp_path / "whole"))
    assert {10, 17} <= set(steps_saved(tmp_path / "trunk"))
    assert longer.key == make_trunk(10).key  # its length is no part of a trunk's identity


def test_a_branch_with_other_data_reads_on_where_the_trunk_stopped_and_rereads_nothing(make_trunk, tiny_setting):
    setting = replace(tiny_setting, corpora=(*tiny_setting.corpora, ("better", "hash")))
    trunk = make_trunk(8)
    branch = decay_stage(trunk, "better", setting, at=8, steps=4, mixture=(("better", 1.0), ("tiny", 1.0)))
    rows = {"tiny": 500, "better": 300}
    which, row = locate(branch.plan, rows, 0, 12 * branch.batch)
    before = [(int(c), int(r)) for c, r in zip(which, row, strict=True)]
    names = branch.plan.corpora
    read = [(names[c], r) for c, r in before]
    own = locate(trunk.plan, {"tiny": 500}, 0, 8 * trunk.batch)
    assert read[:32] == [("tiny", int(r)) for r in own[1]]
    assert len(set(read)) == len(read)
    assert {name for name, _ in read[32:]} == {"tiny", "better"}
    assert dict(branch.corpora).keys() == {"tiny", "better"}


def test_the_same_data_means_the_same_plan_and_a_key_depends_on_what_changes_numbers_alone(make_trunk, tiny_setting):
    trunk = make_trunk(8)
    branch = decay_stage(trunk, "same", tiny_setting, at=8, steps=4)
    assert branch.plan == trunk.plan
    assert decay_stage(trunk, "other", tiny_setting, at=8, steps=4, mixture=tiny_setting.mixture).key == branch.key
    for other in (
        decay_stage(trunk, "same", tiny_setting, at=7, steps=4), decay_stage(trunk, "same", tiny_setting, at=8, steps=5),
        decay_stage(trunk, "same", tiny_setting, at=8, steps=4, floor=0.2),
        decay_stage(trunk, "same", tiny_setting, at=8, steps=4, form="linear"),
        decay_stage(make_trunk(8, seed=9), "same", tiny_setting, at=8, steps=4),
        replace(branch, corpora=(("tiny", "another hash"),)), replace(branch, masking="causal"),
    ):  # fmt: skip
        assert other.key != branch.key
    assert replace(branch, keep=(9,), keep_last=9, save_every=1, score=(), name="x").key == branch.key


def test_moments_and_counts_are_inherited_by_a_branch(tmp_path, workshop, make_trunk, tiny_setting, tiny_corpus):
    corpora = {"tiny": tiny_corpus}
    trunk = make_trunk(6)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    branch = decay_stage(trunk, "same", tiny_setting, at=6, steps=3)
    run_stage(branch, tmp_path / "b", corpora, workshop, parent=checkpoint_path(tmp_path / "trunk", 6))
    state = read_manifest(checkpoint_path(tmp_path / "b", 9)).config
    assert (state["step"], state["optimizer_step"], state["sequences"]) == (9, 9, 36)
    assert read_json(tmp_path / "b" / RESULT)["tokens"] == 36 * 32


def test_position_counts_sequences_so_that_another_batch_reads_the_same_stream(make_trunk, tiny_corpus):
    plan = make_trunk(8).plan
    loader = Loader(plan, {"tiny": tiny_corpus})
    whole = loader.rows(0, 24).inputs
    for batch in (1, 3, 8):
        parts = [loader.rows(start, batch).inputs for start in range(0, 24, batch)]
        assert (whole == [row for part in parts for row in part]).all()


def test_a_trial_is_a_pure_function_of_its_stage_whatever_its_worker_trained_before(
    tmp_path, eager, make_trial, tiny_corpus
):
    corpora, stage = {"tiny": tiny_corpus}, make_trial(10)
    fresh = run_stage(stage, tmp_path / "a", corpora, Workshop(eager))
    used = Workshop(eager)
    other = make_trial(6, seed=77)
    other = replace(other, parametrization=replace(other.parametrization, scale_emb=3.0, scale_depth=0.7, init_std=0.2))
    run_stage(other, tmp_path / "b", corpora, used)
    again = run_stage(stage, tmp_path / "c", corpora, used)
    assert (fresh["scores"], fresh["loss"]) == (again["scores"], again["loss"])
    assert list(read_metrics(tmp_path / "a")) == list(read_metrics(tmp_path / "c"))
