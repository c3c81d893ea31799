"""The lab book holds one row for each thing, refuses what it cannot keep safe, and never half a transaction."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from windtunnel.base import labbook
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.labbook import LabBook, network_file_system

ROW = {"program": "p", "kind": "trunk", "name": "trunk", "status": "running", "folder": "f", "config": {"steps": 4}}


@pytest.fixture
def book(tmp_path):
    made = LabBook(tmp_path / "labbook.sqlite")
    yield made
    made.close()


def test_metrics_of_a_step_that_is_trained_again_replace_the_earlier_ones(book):
    with book:
        book.put_run("p/a", **ROW)
        book.put_metrics("p/a", [(1, "loss", 3.0), (2, "loss", 2.5), (2, "gradient_norm", 1.0)])
    with book:
        book.put_metrics("p/a", [(2, "loss", 2.4), (3, "loss", None)])
    steps, values = book.metrics("p/a", "loss")
    assert steps == [1, 2, 3]
    assert values[:2] == [3.0, 2.4]
    assert values[2] != values[2]  # a non-finite loss is kept as a gap, not as a number
    assert book.metric_names("p/a") == ["gradient_norm", "loss"]


def test_a_run_is_one_row_however_often_it_is_put(book):
    with book:
        book.put_run("p/a", **ROW)
        book.put_run("p/b", **{**ROW, "program": "q"})
        book.put_run("p/a", status="done", steps=4)
    assert [row["id"] for row in book.runs()] == ["p/a", "p/b"]
    assert book.run("p/a")["status"] == "done"
    assert book.run("p/a")["config"] == {"steps": 4}
    assert book.runs(program="q")[0]["id"] == "p/b"
    assert book.run("none") is None


def test_an_error_inside_a_block_undoes_the_whole_block(book):
    with book:
        book.put_run("p/a", **ROW)
    before = book.dump()
    with pytest.raises(ZeroDivisionError), book:
        book.put_score("p/a", "tiny", "bits_per_byte", 2.0, "bits", 10)
        1 / 0  # noqa: B018
    assert book.dump() == before


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_written(book):
    with book:
        book.put_run("p/a", **ROW)
    before = book.dump()
    pages = book._db.execute("PRAGMA page_count").fetchone()[0]
    book._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(UserError, match=r"the lab book cannot be written \(database or disk is full\)") as error, book:
        book.put_metrics("p/a", [(step, "loss", 1.0) for step in range(50_000)])
    assert "make room" in str(error.value)
    book._db.execute("PRAGMA max_page_count = 1000000")
    assert book.dump() == before
    with book:
        book.put_metrics("p/a", [(1, "loss", 1.0)])


def test_a_book_that_another_driver_is_writing_is_waited_for_and_then_refused_in_one_line(book, tmp_path):
    other = LabBook(tmp_path / "labbook.sqlite")
    other._db.execute("PRAGMA busy_timeout = 50")
    with book:
        book.put_run("p/a", **ROW)
        with pytest.raises(UserError, match=r"database is locked\); wait for the other command"), other:
            pass
    with other:
        other.put_run("p/b", **ROW)
    other.close()


def test_readers_see_whole_transactions_while_one_writes(tmp_path):
    book = LabBook(tmp_path / "labbook.sqlite")
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        reader = LabBook(tmp_path / "labbook.sqlite", readonly=True)
        while not done.is_set():
            seen.append(len(reader.metrics("p/a", "loss")[0]))
        reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    while not seen and thread.is_alive():
        time.sleep(0.001)
    for block in range(40):
        with book:
            book.put_metrics("p/a", [(10 * block + i, "loss", 1.0) for i in range(10)])
    done.set()
    thread.join()
    book.close()
    assert seen
    assert all(count % 10 == 0 for count in seen)


def test_a_newer_book_and_a_foreign_file_are_refused_and_left_alone(tmp_path):
    newer, foreign = tmp_path / "newer.sqlite", tmp_path / "foreign.sqlite"
    LabBook(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute(f"PRAGMA user_version = {len(labbook.MIGRATIONS) + 1}")
    db.close()
    foreign.write_bytes(b"this is a shopping list, not a database" * 50)
    for path, words in (
        (newer, f"expected a lab book up to version {len(labbook.MIGRATIONS)}, found {len(labbook.MIGRATIONS) + 1}"),
        (foreign, "damaged or foreign file"),
    ):
        before = path.read_bytes()
        with pytest.raises(ArtefactError, match=words):
            LabBook(path)
        assert path.read_bytes() == before
    with pytest.raises(ArtefactError, match="expected a lab book, found none"):
        LabBook(tmp_path / "none.sqlite", readonly=True)
    assert not (tmp_path / "none.sqlite").exists()


OLD = """
CREATE TABLE run (id TEXT PRIMARY KEY, program TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, status TEXT NOT NULL,
    folder TEXT NOT NULL, config TEXT NOT NULL);
CREATE TABLE metric (run TEXT, step INTEGER, name TEXT, value REAL, PRIMARY KEY (run, step, name))"""
NEWER = (
    "ALTER TABLE run ADD COLUMN study TEXT NOT NULL DEFAULT ''; UPDATE run SET study = 'search' WHERE kind = 'trial'",
    "ALTER TABLE run ADD COLUMN reason TEXT NOT NULL DEFAULT ''",
)


@pytest.fixture
def old_book(tmp_path) -> Path:
    """A book of an earlier schema, two versions behind, as another version of the program left it."""
    path = tmp_path / "labbook.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(OLD)
        db.execute("PRAGMA user_version = 1")
        db.execute("INSERT INTO run VALUES ('p/a', 'p', 'trial', 'trial-000', 'done', 'f', '{\"steps\": 4}')")
        db.executemany("INSERT INTO metric VALUES ('p/a', ?, 'loss', ?)", [(1, 3.0), (2, 2.5)])
    db.close()
    return path


def test_an_older_book_is_brought_to_the_newest_version_with_all_its_rows_and_a_copy_beside(old_book, monkeypatch):
    monkeypatch.setattr(labbook, "MIGRATIONS", (OLD, *NEWER))
    for _ in range(2):  # once, and then no more
        book = LabBook(old_book)
        wanted = {
            "id": "p/a", "program": "p", "kind": "trial", "name": "trial-000", "study": "search", "status": "done", "reason": "",
            "folder": "f", "config": {"steps": 4},
        }  # fmt: skip
        row = book.runs(study="search")[0]
        assert {name: row[name] for name in wanted} == wanted
        assert book.metrics("p/a", "loss") == ([1, 2], [3.0, 2.5])
        with book:
            book.put_run("p/a", reason="none")
            book.put_run("p/a", reason="")
        book.close()
    copies = sorted(path.name for path in old_book.parent.glob("*.old"))
    assert copies == ["labbook.sqlite.version-1.old"]
    with sqlite3.connect(old_book.parent / copies[0]) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT COUNT(*) FROM metric").fetchone() == (2,)
        assert len(db.execute("SELECT * FROM run").fetchone()) == 7
    db.close()


def test_a_migration_that_fails_halfway_leaves_the_older_book_as_it_was(old_book, monkeypatch):
    monkeypatch.setattr(labbook, "MIGRATIONS", (OLD, *NEWER, "ALTER TABLE absent ADD COLUMN x"))
    with pytest.raises(UserError, match="no such table: absent"):
        LabBook(old_book)
    monkeypatch.setattr(labbook, "MIGRATIONS", (OLD, *NEWER))
    book = LabBook(old_book)
    assert book.run("p/a")["study"] == "search"
    book.close()


def test_a_new_book_has_the_newest_version_and_no_copy(book):
    assert book._db.execute("PRAGMA user_version").fetchone()[0] == len(labbook.MIGRATIONS)
    assert not list(book.path.parent.glob("*.old"))


def test_an_older_book_is_read_as_it_is_and_brought_up_to_date_when_written(tmp_path):
    path, new = tmp_path / "old.sqlite", tmp_path / "new.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(labbook.MIGRATIONS[0])
        db.execute("PRAGMA user_version = 1")
        db.execute(
            "INSERT INTO run (id, program, kind, name, status, folder, config) VALUES ('p/a', 'p', 'trunk', 'a', 'done', 'f', '{}')"
        )
    db.close()
    book = LabBook(path, readonly=True)
    assert book.runs(program="p")[0]["forecast"] == ""
    book.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,), "a reader changes nothing"
    db.close()
    with LabBook(path) as book:
        book.put_run(
            "p/b", program="p", kind="decay", name="b", status="done", folder="g", config={}, forecast="f" * 64
        )
    assert [row["forecast"] for row in book.runs()] == ["", "f" * 64]
    with LabBook(new) as fresh:
        for row in book.runs():
            fresh.put_run(**{"run" if name == "id" else name: value for name, value in row.items()})
    assert fresh.dump() == book.dump(), "columns have one order, whichever version began the book"
    book.close()
    fresh.close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "lustre", "ext4", "tmpfs"])
def test_a_home_on_a_network_file_system_is_refused_with_the_way_out(tmp_path, monkeypatch, kind):
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/x {str(tmp_path).replace(' ', chr(92) + '040')} {kind} rw 0 0\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **o: mounts if str(p) == "/proc/self/mounts" else real(p, **o))
    network = kind not in ("ext4", "tmpfs")
    assert network_file_system(tmp_path / "home") == (kind if network else "")
    assert network_file_system(Path("/elsewhere")) == ""
    if network:
        with pytest.raises(UserError, match=rf"network file system \({kind}\).*--home"):
            LabBook(tmp_path / "home" / "labbook.sqlite")
        assert not (tmp_path / "home").exists()
    else:
        LabBook(tmp_path / "home" / "labbook.sqlite").close()


def test_a_folder_that_cannot_be_written_is_one_line_with_the_path(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="the folder cannot be written; choose another with --home") as error:
        LabBook(tmp_path / "home" / "labbook.sqlite")
    assert str(tmp_path) in str(error.value)


def test_facts_keep_their_json_and_programs_are_listed_once(book):
    with book:
        book.put_fact("p", "study", "search", {"b": [1, None, 2.5], "a": "ü"})
        book.put_fact("p", "study", "search", {"a": 1})
        book.put_fact("q", "study", "other", [])
        book.put_run("p/a", **ROW)
    assert book.fact("p", "study", "search") == {"a": 1}
    assert book.facts("p", "study") == {"search": {"a": 1}}
    assert book.fact("p", "study", "none") is None
    assert book.programs() == ["p", "q"]
