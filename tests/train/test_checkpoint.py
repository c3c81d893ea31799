"""A checkpoint gives back what was saved, a damaged one is passed over aloud, and none that matters is ever rotated away."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from windtunnel.base.artefact import read_manifest
from windtunnel.base.errors import ArtefactError, Diverged, UserError
from windtunnel.base.runtime import Runtime
from windtunnel.train import checkpoint
from windtunnel.train.checkpoint import Position, load_model, newest_whole, restore, rotate, save
from windtunnel.train.control import Control
from windtunnel.train.folder import checkpoint_path, read_result, steps_saved
from windtunnel.train.loop import Workshop, begin, run_stage
from windtunnel.train.metrics import read_metrics
from windtunnel.train.stage import AdamW, optimizer_of


@pytest.fixture
def workshop(eager):
    return Workshop(eager)


@pytest.fixture
def corpora(tiny_corpus):
    return {"tiny": tiny_corpus}


def bytes_of(run, step) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(checkpoint_path(run, step).glob("*.safetensors")))


def losses(run) -> list[tuple[int, float]]:
    return [(step, values["loss"]) for step, values in read_metrics(run)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_moments_and_position_come_back_bit_for_bit(tmp_path, workshop, make_trunk, corpora, kind):
    stage = make_trunk(6, optimizer=optimizer_of(kind, AdamW()))
    run_stage(stage, tmp_path, corpora, workshop)
    trainer = workshop.trainer(stage)
    position = restore(checkpoint_path(tmp_path, 6), trainer.model, trainer.optimizer)
    assert position == Position(step=6, optimizer_step=6, sequences=24, skipped=0)
    again = tmp_path / "again"
    save(again, stage, trainer.model, trainer.optimizer, position, workshop.runtime)
    assert bytes_of(again, 6) == bytes_of(tmp_path, 6)
    assert read_manifest(checkpoint_path(again, 6)).hash == read_manifest(checkpoint_path(tmp_path, 6)).hash
    model, manifest = load_model(checkpoint_path(tmp_path, 6))
    assert not model.training
    assert manifest.config["stage"]["shape"] == stage.shape.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_muon_keeps_one_moment_of_each_hidden_matrix_and_goes_on_bit_for_bit_where_it_was_cut_off(
    tmp_path, workshop, make_trunk, corpora
):
    stage = make_trunk(12, save_every=5, optimizer=optimizer_of("muon", AdamW(decay="independent", weight_decay=1e-3)))
    run_stage(stage, tmp_path / "whole", corpora, workshop)
    run_stage(stage.with_steps(7), tmp_path / "cut", corpora, workshop)
    (tmp_path / "cut" / "result.json").unlink()
    run_stage(stage, tmp_path / "cut", corpora, workshop)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert bytes_of(tmp_path / "cut", 12) == bytes_of(tmp_path / "whole", 12)
    moments = load_file(checkpoint_path(tmp_path / "whole", 12) / "optimizer.safetensors")
    sizes = {kind: sum(m.numel() for name, m in moments.items() if name.startswith(kind + "/")) for kind in
             ("momentum_buffer", "exp_avg", "exp_avg_sq")}  # fmt: skip
    rest = stage.shape.gains + stage.shape.embedding
    assert sizes == {"momentum_buffer": stage.shape.matrices, "exp_avg": rest, "exp_avg_sq": rest}
    assert len(moments) == 7 * 2 + 2 * (2 * 2 + 2)


def test_moments_of_another_optimizer_are_refused(tmp_path, workshop, make_trunk, corpora):
    stage = make_trunk(2)
    run_stage(stage, tmp_path, corpora, workshop)
    trainer = workshop.trainer(replace(stage, optimizer=optimizer_of("muon", stage.optimizer)))
    with pytest.raises(ArtefactError, match="another optimizer's"):
        restore(checkpoint_path(tmp_path, 2), trainer.model, trainer.optimizer)


def test_muon_on_several_ranks_is_refused_before_anything_is_written(tmp_path, make_trunk, corpora):
    stage = make_trunk(2, optimizer=optimizer_of("muon", AdamW()))
    with pytest.raises(UserError, match=r"optimizer\.kind: expected one process for Muon"):
        run_stage(stage, tmp_path / "run", corpora, Workshop(Runtime(compiled=False, world=2)))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_safetensors_and_json_and_holds_its_numeric_class(tmp_path, workshop, make_trunk, corpora):
    run_stage(make_trunk(2), tmp_path, corpora, workshop)
    names = sorted(f.name for f in checkpoint_path(tmp_path, 2).iterdir())
    assert names == ["manifest.json", "optimizer.safetensors", "weights.safetensors"]
    found = read_manifest(checkpoint_path(tmp_path, 2)).facts["numeric_class"]
    assert {"device", "capability", "threads", "dtype", "compiled", "world", "torch"} <= set(found)


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest", "swap"])
def test_a_damaged_checkpoint_is_passed_over_aloud_and_the_run_ends_as_if_nothing_had_happened(
    tmp_path, workshop, make_trunk, corpora, damage
):
    stage = make_trunk(12, save_every=4)
    run_stage(stage, tmp_path / "whole", corpora, workshop)
    run, said = tmp_path / "run", []
    run_stage(stage.with_steps(8), run, corpora, workshop)
    (run / "result.json").unlink()
    newest = checkpoint_path(run, 8)
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        bit = random.Random(7).randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-7])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    else:
        shutil.copy(checkpoint_path(run, 4) / "optimizer.safetensors", file)
    found = newest_whole(run, said.append)
    assert found == (4, checkpoint_path(run, 4))
    assert len(said) == 1
    assert said[0].startswith("passing over a damaged checkpoint: ")
    assert "step-000000008" in said[0]
    run_stage(stage, run, corpora, workshop, control=Control(say=said.append))
    assert losses(run) == losses(tmp_path / "whole")
    assert bytes_of(run, 12) == bytes_of(tmp_path / "whole", 12)


def test_two_hundred_flipped_bits_in_weights_and_moments_are_all_found(tmp_path, workshop, make_trunk, corpora):
    run_stage(make_trunk(2), tmp_path, corpora, workshop)
    folder, draw = checkpoint_path(tmp_path, 2), random.Random(2)
    for _ in range(200):
        file = folder / draw.choice(["weights.safetensors", "optimizer.safetensors"])
        data = file.read_bytes()
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([data[place] ^ bit]))
        assert newest_whole(tmp_path) is None
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(data[place : place + 1])
    assert newest_whole(tmp_path) == (2, folder)


def test_the_parent_that_a_branch_needs_is_never_replaced_by_another_when_it_is_damaged(
    tmp_path, workshop, make_trunk, corpora
):
    trunk = make_trunk(4)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    file = checkpoint_path(tmp_path / "trunk", 4) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    branch = make_trunk(6, start=trunk_start(trunk, 4), open_ended=False)
    with pytest.raises(ArtefactError, match="does not match its hash"):
        run_stage(branch, tmp_path / "b", corpora, workshop, parent=checkpoint_path(tmp_path / "trunk", 4))
    with pytest.raises(ArtefactError, match="run it first"):
        run_stage(branch, tmp_path / "c", corpora, workshop)


def trunk_start(trunk, step):
    from windtunnel.train.stage import Start

    return Start(trunk.key, step)


def test_rotation_keeps_the_newest_and_everything_pinned(tmp_path, workshop, make_trunk, corpora):
    stage = make_trunk(20, (6,), save_every=2, keep_last=2)
    run_stage(stage, tmp_path, corpora, workshop)
    assert steps_saved(tmp_path) == [6, 18, 20]
    run_stage(make_trunk(30, (6, 25), save_every=2, keep_last=2), tmp_path, corpora, workshop)
    assert steps_saved(tmp_path) == [6, 20, 25, 28, 30]  # 6 is asked for, 20 was an end and 25 a branch point
    rotate(tmp_path, 1, frozenset())
    assert steps_saved(tmp_path) == [6, 20, 25, 30]
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_what_killed_saves_left_behind_is_swept_away_and_never_read(tmp_path, workshop, make_trunk, corpora):
    run_stage(make_trunk(4), tmp_path, corpora, workshop)
    left = [
        tmp_path / "checkpoints" / name for name in (".step-000000002.ab12cd34.tmp", ".step-000000003.old", ".slices-7")
    ]
    for folder in left:
        shutil.copytree(checkpoint_path(tmp_path, 4), folder)
    assert steps_saved(tmp_path) == [4]
    run_stage(make_trunk(6), tmp_path, corpora, workshop)
    assert not [folder for folder in left if folder.exists()]


def test_a_checkpoint_that_is_asked_for_later_is_made_without_touching_the_others(
    tmp_path, workshop, make_trunk, corpora
):
    run_stage(make_trunk(20, (10, 20), save_every=5), tmp_path, corpora, workshop)
    before = {step: bytes_of(tmp_path, step) for step in steps_saved(tmp_path)}
    series = losses(tmp_path)
    stage = make_trunk(20, (10, 13, 20), save_every=5)
    assert read_result(tmp_path, stage) is None
    result = run_stage(stage, tmp_path, corpora, workshop)
    assert result["step"] == 20
    assert 13 in steps_saved(tmp_path)
    assert sorted(losses(tmp_path)) == series
    assert all(bytes_of(tmp_path, step) == data for step, data in before.items() if step in steps_saved(tmp_path))
    assert read_result(tmp_path, stage) is not None


def test_a_trunk_that_is_asked_for_less_keeps_what_it_has(tmp_path, workshop, make_trunk, corpora):
    run_stage(make_trunk(20, (10, 20)), tmp_path, corpora, workshop)
    shorter = make_trunk(10)
    assert read_result(tmp_path, shorter)["step"] == 20
    (tmp_path / "result.json").unlink()
    run_stage(shorter, tmp_path, corpora, workshop)
    assert steps_saved(tmp_path) == [10, 20]
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 21))


def test_a_result_counts_only_for_the_same_identity_length_scores_and_checkpoints(
    tmp_path, workshop, make_trial, corpora
):
    stage = make_trial(8)
    result = run_stage(stage, tmp_path, corpora, workshop)
    assert read_result(tmp_path, stage) == result
    assert steps_saved(tmp_path) == []  # a trial leaves no checkpoint
    for other in (
        replace(stage, seed=6), replace(stage, batch=8), make_trial(9), replace(stage, score=("tiny", "other")),
        replace(stage, keep=(4,)), replace(stage, score_tokens=300),
    ):  # fmt: skip
        assert read_result(tmp_path, other) is None
    assert read_result(tmp_path, replace(stage, name="renamed", keep_last=7)) == result
    assert read_result(tmp_path / "nowhere", stage) is None


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run_and_the_last_checkpoint_is_from_before(
    tmp_path, eager, make_trunk, corpora, monkeypatch
):
    stage = make_trunk(40, save_every=4)
    for healthy_again, ends in ((None, True), (14, False)):
        run, workshop = tmp_path / str(healthy_again), Workshop(eager)
        trainer = workshop.trainer(stage)
        real, steps = trainer.compute, [0]

        def compute(*arguments, real=real, steps=steps, healthy_again=healthy_again):
            steps[0] += 1
            loss, sums = real(*arguments)
            bad = steps[0] > 9 and (healthy_again is None or steps[0] <= healthy_again)
            return (loss * float("nan"), sums * float("nan")) if bad else (loss, sums)

        monkeypatch.setattr(workshop, "trainer", lambda _, t=trainer, c=compute: (setattr(t, "compute", c), t)[1])
        if ends:
            with pytest.raises(
                Diverged, match="10 updates in a row were not finite at step 19; lower the learning rate"
            ):
                run_stage(replace(stage, score=()), run, corpora, workshop)
        else:
            result = run_stage(replace(stage, score=()), run, corpora, workshop)
            assert result["skipped"] == 5
            assert [values["loss"] for step, values in read_metrics(run) if 9 < step <= 14] == [None] * 5
        for step in steps_saved(run):
            model, manifest = load_model(checkpoint_path(run, step))
            assert all(torch.isfinite(p).all() for p in model.parameters())
            assert manifest.config["optimizer_step"] == step - manifest.config["skipped"]
            moments = checkpoint_path(run, step) / "optimizer.safetensors"
            assert all(torch.isfinite(t).all() for t in load_file(moments).values())


def test_a_full_disk_during_a_save_is_one_line_and_the_earlier_checkpoint_and_the_series_are_intact(
    tmp_path, workshop, make_trunk, corpora, monkeypatch
):
    stage = make_trunk(12, save_every=4)
    run_stage(stage, tmp_path / "whole", corpora, workshop)
    run, real, calls = tmp_path / "run", checkpoint.save_file, [0]

    def full(tensors, file):
        calls[0] += 1
        if calls[0] == 4:  # the second file of the second checkpoint
            raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="the disk or quota is full") as error:
        run_stage(stage, run, corpora, workshop)
    assert "step-000000008" in str(error.value)
    assert "\n" not in str(error.value)
    assert steps_saved(run) == [4]
    assert newest_whole(run) is not None
    run_stage(stage, run, corpora, workshop)
    assert losses(run) == losses(tmp_path / "whole")
    assert bytes_of(run, 12) == bytes_of(tmp_path / "whole", 12)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_metrics_that_cannot_be_written_are_one_line(tmp_path, workshop, make_trunk, corpora, monkeypatch, number):
    from windtunnel.train.metrics import Metrics

    real = Metrics.__init__

    def opened(self, *arguments):
        real(self, *arguments)
        self._stream = Refusing(self._stream, number)

    monkeypatch.setattr(Metrics, "__init__", opened)
    with pytest.raises(UserError, match="full|cannot be written") as error:
        run_stage(make_trunk(8, save_every=4), tmp_path, corpora, workshop)
    assert "metrics.jsonl" in str(error.value)


class Refusing:
    """A stream onto a disk that takes nothing more."""

    def __init__(self, stream, number):
        self._stream, self._number = stream, number

    def write(self, _):
        raise OSError(self._number, "refused")

    def flush(self):
        raise OSError(self._number, "refused")

    def close(self):
        self._stream.close()


def test_a_real_limit_on_file_size_is_the_same_one_line(tmp_path, make_trunk, tiny_corpus):
    import json

    job = {"stage": make_trunk(4).to_dict(), "run": str(tmp_path / "run"), "corpora": {"tiny": str(tiny_corpus.path)}}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "windtunnel.tunnel.worker", "--eager", "--job", str(tmp_path / "job.json")]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    words = json.loads(done.stdout.splitlines()[-1])
    assert words["code"] == 2
    assert "the disk or quota is full" in words["error"]
    assert steps_saved(tmp_path / "run") == []


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path, workshop, make_trunk, corpora):
    stage = make_trunk(2)
    run_stage(stage, tmp_path, corpora, workshop)
    for change in ({"layers": 3}, {"ff": 96}, {"tied": False}):
        other = replace(stage, shape=replace(stage.shape, **change))
        trainer = workshop.trainer(other)
        with pytest.raises(ArtefactError, match="expected the tensors of this shape"):
            restore(checkpoint_path(tmp_path, 2), trainer.model, trainer.optimizer)


def test_the_order_of_beginnings_is_own_checkpoint_then_parent_then_seed(tmp_path, workshop, make_trunk, corpora):
    trunk = make_trunk(4)
    run_stage(trunk, tmp_path / "trunk", corpora, workshop)
    parent = checkpoint_path(tmp_path / "trunk", 4)
    branch = make_trunk(8, start=trunk_start(trunk, 4), open_ended=False, save_every=2)
    trainer = workshop.trainer(branch)
    assert begin(trunk, tmp_path / "fresh", None, trainer, Control()).step == 0
    assert begin(branch, tmp_path / "fresh", parent, trainer, Control()).step == 4
    run_stage(branch.with_steps(6), tmp_path / "own", corpora, workshop, parent=parent)
    assert begin(branch, tmp_path / "own", parent, trainer, Control()).step == 6
