"""An artefact folder is whole or absent at every moment of its writing, and whatever happens to it later is noticed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from windtunnel.base import artefact
from windtunnel.base.artefact import MANIFEST, content_hash, read_json, read_manifest, sweep, write_artefact, write_json
from windtunnel.base.errors import ArtefactError, UserError


def write(path: Path, text: str, parents: tuple[str, ...] = ()) -> None:
    facts: dict[str, object] = {"seconds": 1.5, "pinned": True}
    with write_artefact(path, "thing", {"text": text}, parents, facts) as folder:
        (folder / "a.txt").write_text(text * 50, encoding="utf-8")
        (folder / "inner").mkdir()
        (folder / "inner" / "b.bin").write_bytes(bytes(range(256)))


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_what_was_written_is_read_back_and_its_hash_depends_on_content_alone(tmp_path):
    write(tmp_path / "x", "one", ("parent-hash",))
    write(tmp_path / "y", "one", ("parent-hash",))
    write(tmp_path / "z", "two", ("parent-hash",))
    x, y, z = (read_manifest(tmp_path / name, "thing") for name in "xyz")
    assert (x.config, x.parents, set(x.files)) == ({"text": "one"}, ("parent-hash",), {"a.txt", "inner/b.bin"})
    assert x.facts == {"seconds": 1.5, "pinned": True}
    assert x.hash == y.hash != z.hash
    with pytest.raises(ArtefactError, match="expected an artefact of kind 'other'"):
        read_manifest(tmp_path / "x", "other")


CALLS = ("replace", "rename", "fsync", "mkdir", "open", "unlink", "rmdir")


def at_call(patch: pytest.MonkeyPatch, moment: int, act) -> list[int]:
    """Calls ``act`` in place of the ``moment``-th file-system call; returns the counter of calls."""
    count = [0]

    def wrap(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == moment:
                act()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return count


def dies_at(moment: int, write_it) -> bool:
    """Forks a child that is gone, like after kill -9, at the ``moment``-th file-system call; False if it got through."""
    child = os.fork()
    if child == 0:
        at_call(pytest.MonkeyPatch(), moment, lambda: os._exit(9))
        try:
            write_it()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_system_call_leaves_the_artefact_whole_or_absent(tmp_path, replacing):
    moment, seen, died = 0, set(), True
    while died:
        moment += 1
        path = tmp_path / f"case-{moment}" / "x"
        path.parent.mkdir()
        if replacing:
            write(path, "old")
        died = dies_at(moment, lambda path=path: write(path, "new"))
        # Whole or absent: reading raises if it is anything else.
        seen.add(read_manifest(path, "thing").config["text"] if path.exists() else "absent")
        write(path, "again")
        assert read_manifest(path).config["text"] == "again"
        sweep(path.parent)
        assert sorted(p.name for p in path.parent.iterdir()) == ["x"]
    assert moment > 15
    assert {"old" if replacing else "absent", "new"} <= seen


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_refusal_at_any_system_call_is_one_line_and_the_earlier_artefact_is_intact(tmp_path, monkeypatch, number):
    path = tmp_path / "x"
    write(path, "old")
    before = snapshot(path)
    moment, refused = 0, 0
    while True:
        moment += 1
        with monkeypatch.context() as patch:

            def refuse():
                raise OSError(number, os.strerror(number), str(path))

            count = at_call(patch, moment, refuse)
            try:
                write(path, "new")
            except UserError as error:
                refused += 1
                assert str(path.parent) in str(error)
                assert "\n" not in str(error)
                assert ("full" in str(error)) == (number in (errno.ENOSPC, errno.EDQUOT))
            reached = count[0] >= moment
        if not reached:
            break
        if read_manifest(path).config["text"] == "old":
            assert snapshot(path) == before
        else:  # the call that was refused came after the rename: a clean-up, or the sync of the parent folder
            assert read_manifest(path).config["text"] == "new"
            shutil.rmtree(path)
            write(path, "old")
            before = snapshot(path)
    assert refused > 5


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_the_earlier_artefact(tmp_path):
    path = tmp_path / "x"
    write(path, "old")
    before = snapshot(path)
    script = f"""
import resource
from pathlib import Path
from windtunnel.base.artefact import write_artefact
from windtunnel.base.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with write_artefact(Path({str(path)!r}), "thing", {{}}) as folder:
        (folder / "large").write_bytes(bytes(10_000))
except UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"{path}: the disk or quota is full (")
    assert out.count("\n") == 1
    assert snapshot(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_error_of_the_caller_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), write_artefact(tmp_path / "x", "thing", {}) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    write(tmp_path / "x", "one")
    files = sorted(p for p in (tmp_path / "x").rglob("*") if p.is_file())
    draw = random.Random(1)
    for file in files:
        data = file.read_bytes()
        bits = draw.sample(range(8 * len(data)), 200 if file.name == MANIFEST else 40)
        for bit in bits:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(ArtefactError):
                read_manifest(tmp_path / "x", "thing")
        file.write_bytes(data)
    read_manifest(tmp_path / "x", "thing")


def test_a_truncated_missing_extra_or_swapped_file_is_noticed_and_named(tmp_path):
    for change, words in {
        "truncate": "expected 256 bytes, found 255",
        "remove": "this file is missing",
        "add": "this file is not in the manifest",
        "swap": "does not match|expected",
        "empty manifest": "found a damaged file",
        "no manifest": "expected a folder with a manifest.json",
        "list manifest": "expected a windtunnel manifest",
        "newer": "expected manifest schema 1, found 2",
    }.items():
        path = tmp_path / change.replace(" ", "-")
        write(path, "one")
        inner = path / "inner" / "b.bin"
        if change == "truncate":
            inner.write_bytes(inner.read_bytes()[:-1])
        elif change == "remove":
            inner.unlink()
        elif change == "add":
            (path / "c.txt").write_text("", encoding="utf-8")
        elif change == "swap":
            first, second = (path / "a.txt").read_bytes(), inner.read_bytes()
            (path / "a.txt").write_bytes(second)
            inner.write_bytes(first)
        elif change == "empty manifest":
            (path / MANIFEST).write_bytes(b"")
        elif change == "no manifest":
            (path / MANIFEST).unlink()
        elif change == "list manifest":
            (path / MANIFEST).write_text("[]", encoding="utf-8")
        else:
            raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            (path / MANIFEST).write_text(json.dumps({**raw, "schema": 2}), encoding="utf-8")
        with pytest.raises(ArtefactError, match=words) as error:
            read_manifest(path, "thing")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(UserError, match="the disk or quota is full"):
            write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"old": 1}


def test_the_hash_of_a_value_ignores_the_order_of_keys_and_refuses_what_json_cannot_say():
    assert content_hash({"a": 1, "b": [1.5, "ü"]}) == content_hash({"b": [1.5, "ü"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 1.5})
    with pytest.raises(ValueError):
        content_hash(float("inf"))
    assert artefact.SCHEMA == 1
