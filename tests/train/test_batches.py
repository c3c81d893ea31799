"""A batch that changes on the way: tokens are counted exactly, and resuming and branching change no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windtunnel.base.errors import RecipeError, Stopped
from windtunnel.pretrain.branch import decay_stage, whole_run
from windtunnel.train.batches import Batches
from windtunnel.train.control import Control
from windtunnel.train.folder import checkpoint_path
from windtunnel.train.loop import Workshop, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import Stage

CHANGES = ((5, 6), (9, 3))


@pytest.fixture(scope="module")
def workshop(eager):
    return Workshop(eager)


def weights(run, step) -> list[bytes]:
    return [file.read_bytes() for file in sorted(checkpoint_path(run, step).glob("*.safetensors"))]


schedules = st.builds(
    lambda first, gaps, batches: Batches(
        first, tuple((sum(gaps[: i + 1]), b) for i, b in enumerate(batches[: len(gaps)]))
    ),
    st.integers(1, 9), st.lists(st.integers(1, 7), max_size=4), st.lists(st.integers(1, 9), min_size=4, max_size=4),
)  # fmt: skip


@given(schedules, st.integers(1, 40))
def test_sequences_are_the_sum_of_all_batches_and_steps_is_its_inverse(batches, step):
    assert batches.sequences(step) == sum(batches.at(s) for s in range(1, step + 1))
    assert batches.steps(batches.sequences(step)) == step
    cut = Batches(batches.first, batches.until(step))
    assert [cut.at(s) for s in range(1, step + 1)] == [batches.at(s) for s in range(1, step + 1)]
    assert cut.at(step + 50) == batches.at(step)


@pytest.mark.parametrize("changes", [((0, 2),), ((3, 2), (3, 4)), ((4, 2), (2, 4)), ((3, 0),)])
def test_changes_that_do_not_rise_or_empty_batches_are_refused(changes):
    with pytest.raises(RecipeError, match="expected"):
        Batches(4, changes)


def test_a_stage_with_a_schedule_reads_back_and_one_without_keeps_its_key(make_trunk):
    stage = make_trunk(12)
    ramp = replace(stage, batch_changes=CHANGES)
    assert "batch_changes" not in stage.to_dict()
    assert Stage.from_dict(ramp.to_dict()) == ramp
    assert ramp.key != stage.key
    assert ramp.tokens == (5 * 4 + 4 * 6 + 3 * 3) * ramp.plan.row
    assert ramp.flops == pytest.approx(ramp.tokens * ramp.shape.flops_per_token(ramp.plan.row).total)


def test_a_trunk_whose_batch_changes_resumes_and_branches_bit_for_bit(
    tmp_path, workshop, make_trunk, tiny_setting, tiny_corpus
):
    corpora = {"tiny": tiny_corpus}
    trunk = replace(make_trunk(12, (4, 7, 9, 12)), batch_changes=CHANGES)
    result = run_stage(trunk, tmp_path / "whole", corpora, workshop)
    assert result["tokens"] == trunk.tokens == result["timed_tokens"]

    control = Control()
    seen = []

    def stop(progress) -> None:
        seen.append(progress)
        control.stop = len(seen) == 1

    control.tell, control.interval = stop, 0.0
    with pytest.raises(Stopped):
        run_stage(trunk, tmp_path / "again", corpora, workshop, control=control)
    run_stage(trunk, tmp_path / "again", corpora, workshop)
    assert weights(tmp_path / "again", 12) == weights(tmp_path / "whole", 12)
    assert list(read_metrics(tmp_path / "again")) == list(read_metrics(tmp_path / "whole"))

    for at, own in ((4, 4), (7, 6), (9, 6), (12, 3)):  # at 9 the third batch has not begun
        branch = decay_stage(trunk, f"from-{at}", tiny_setting, at=at, steps=3)
        done = run_stage(branch, tmp_path / f"b{at}", corpora, workshop, parent=checkpoint_path(tmp_path / "whole", at))
        run_stage(whole_run(branch), tmp_path / f"w{at}", corpora, workshop)
        assert weights(tmp_path / f"b{at}", at + 3) == weights(tmp_path / f"w{at}", at + 3)
        assert branch.own_tokens == 3 * own * branch.plan.row
        assert done["tokens"] == branch.tokens == branch.own_tokens + trunk.batches.sequences(at) * branch.plan.row
