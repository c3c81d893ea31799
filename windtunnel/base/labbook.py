"""The lab book: the SQLite file that holds runs, metrics, scores, facts and their lineage.

One writer, the driver; workers return results and each run folder keeps its own ``metrics.jsonl`` and ``result.json``, from
which the book can be rebuilt row for row. Every number in a plot or page comes from here.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import explained
from windtunnel.base.errors import ArtefactError, UserError

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "lustre", "beegfs", "glusterfs", "ceph", "afs"}
_TABLES = """
CREATE TABLE IF NOT EXISTS run (
    id TEXT PRIMARY KEY, program TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, study TEXT NOT NULL DEFAULT '',
    parent TEXT NOT NULL DEFAULT '', status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', folder TEXT NOT NULL,
    config TEXT NOT NULL, started REAL, ended REAL, steps INTEGER, tokens INTEGER, flops REAL, seconds REAL);
CREATE TABLE IF NOT EXISTS metric (
    run TEXT NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL, PRIMARY KEY (run, step, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS score (
    run TEXT NOT NULL, corpus TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL, unit TEXT NOT NULL,
    count INTEGER NOT NULL DEFAULT 0, low REAL, high REAL, PRIMARY KEY (run, corpus, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (
    program TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (program, kind, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS run_program ON run (program, study, kind);
"""
MIGRATIONS = (
    _TABLES,
    "ALTER TABLE run ADD COLUMN forecast TEXT NOT NULL DEFAULT ''",  # hash of the sealed forecast under which it began
)
"""What leads from one version of the schema to the next: the first entry makes a new book. Entries are added, never changed."""


def network_file_system(path: Path) -> str:
    """The type of the network file system that holds ``path``, or an empty string (Linux; elsewhere always empty)."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in mounts:
        fields = line.split(" ")
        point = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
        if point and (resolved + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind if kind in _NETWORK else ""


class LabBook:
    """Opens or creates a lab book. One of an earlier version is brought up to date, unless it is opened to be read.

    Raises:
        UserError: the file cannot be written, is locked by another driver for over ten seconds, or lies on a network
            file system (SQLite's locks do not hold there).
        ArtefactError: the file is no lab book, or a newer windtunnel wrote it.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        if not readonly and (kind := network_file_system(path.parent)):
            raise UserError(
                str(path),
                f"the lab book would lie on a network file system ({kind}), where SQLite can lose data",
                "choose a local folder with --home and copy it afterwards",
            )
        if readonly and not path.is_file():
            way_out = "windtunnel quickstart or run makes one, --home names another folder"
            raise ArtefactError(str(path), "expected a lab book, found none", way_out)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open(readonly)
            except sqlite3.OperationalError as error:
                fix = (
                    "choose another folder with --home"
                    if "unable to open" in str(error) or "readonly" in str(error)
                    else ""
                )
                raise UserError(str(path), f"the lab book cannot be opened ({error})", fix) from None
            except sqlite3.DatabaseError:
                raise ArtefactError(
                    str(path),
                    "expected a lab book, found a damaged or foreign file",
                    "move it away: windtunnel rebuilds it",
                ) from None

    def _open(self, readonly: bool) -> None:
        self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        newest, version = len(MIGRATIONS), self._version()
        if version > newest:
            raise ArtefactError(
                str(self.path), f"expected a lab book up to version {newest}, found {version}", "use a newer windtunnel"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        if version < newest and not (readonly and version):
            self._migrate()

    def _version(self) -> int:
        return self._db.execute("PRAGMA user_version").fetchone()[0]

    def _migrate(self) -> None:
        """Brings an older book to the newest version in one transaction, a copy of it beside; an empty file becomes a book."""
        with self:
            version = self._version()  # another process may have been faster
            if 0 < version < len(MIGRATIONS):
                copy = self.path.with_name(f"{self.path.name}.version-{version}.old")
                with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            for step in MIGRATIONS[version:]:
                for statement in step.split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    def __enter__(self) -> LabBook:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise self._refused(error) from None
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        except sqlite3.OperationalError as failure:
            error = failure
        if self._db.in_transaction:  # a full disk may have ended it already
            self._db.execute("ROLLBACK")
        if isinstance(error, sqlite3.OperationalError):
            raise self._refused(error) from None

    def _refused(self, error: sqlite3.OperationalError) -> UserError:
        """What SQLite says about a disk or a lock, as one line."""
        fix = "wait for the other command" if "locked" in str(error) else "make room"
        return UserError(
            str(self.path), f"the lab book cannot be written ({error})", f"{fix} and run the same command again"
        )

    def close(self) -> None:
        """Closes the file; further calls are errors."""
        self._db.close()

    def put_run(self, run: str, **columns: Any) -> None:
        """Inserts a run or changes columns of one; ``config`` is stored as JSON."""
        if "config" in columns:
            columns["config"] = json.dumps(columns["config"], sort_keys=True)
        known = self._db.execute("SELECT 1 FROM run WHERE id = ?", (run,)).fetchone()
        if known:
            sets = ", ".join(f"{name} = ?" for name in columns)
            self._db.execute(f"UPDATE run SET {sets} WHERE id = ?", (*columns.values(), run))
        else:
            columns = {"id": run, **columns}
            marks = ", ".join("?" * len(columns))
            self._db.execute(f"INSERT INTO run ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))

    def put_metrics(self, run: str, rows: Iterable[tuple[int, str, float | None]]) -> None:
        """Records (step, name, value) rows; a step that is trained again replaces its earlier row."""
        self._db.executemany(
            "INSERT OR REPLACE INTO metric VALUES (?, ?, ?, ?)",
            ((run, step, name, value) for step, name, value in rows),
        )

    def put_score(
        self, run: str, corpus: str, name: str, value: float, unit: str, count: int = 0,
        low: float | None = None, high: float | None = None,
    ) -> None:  # fmt: skip
        """Records one evaluation result of a run on a corpus or task, with its unit, item count and interval."""
        self._db.execute(
            "INSERT OR REPLACE INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (run, corpus, name, value, unit, count, low, high),
        )

    def put_fact(self, program: str, kind: str, name: str, value: object) -> None:
        """Records a derived thing of a program as JSON: a law, a forecast, a plan, a choice, samples."""
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?, ?, ?)", (program, kind, name, json.dumps(value)))

    def forget_run(self, run: str) -> None:
        """Removes a run with its metrics and scores."""
        for table, column in (("run", "id"), ("metric", "run"), ("score", "run")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (run,))

    def forget_fact(self, program: str, kind: str, name: str) -> None:
        """Removes a fact, if there is one."""
        self._db.execute("DELETE FROM fact WHERE program = ? AND kind = ? AND name = ?", (program, kind, name))

    def run(self, run: str) -> dict[str, Any] | None:
        """One run's row with its configuration as a dictionary, or None."""
        row = self._db.execute("SELECT * FROM run WHERE id = ?", (run,)).fetchone()
        return _run_row(row) if row else None

    def runs(self, **columns: str) -> list[dict[str, Any]]:
        """Runs whose columns have the given values, in the order in which they were first recorded."""
        where = " AND ".join(f"{name} = ?" for name in columns) or "1"
        rows = self._db.execute(f"SELECT * FROM run WHERE {where} ORDER BY rowid", tuple(columns.values()))
        return [_run_row(row) for row in rows]

    def metrics(self, run: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of a run, in step order."""
        rows = self._db.execute(
            "SELECT step, value FROM metric WHERE run = ? AND name = ? ORDER BY step", (run, name)
        ).fetchall()
        return [row[0] for row in rows], [float("nan") if row[1] is None else row[1] for row in rows]

    def metric_names(self, run: str) -> list[str]:
        """Names of the metrics that a run has."""
        return [
            row[0] for row in self._db.execute("SELECT DISTINCT name FROM metric WHERE run = ? ORDER BY name", (run,))
        ]

    def scores(self, run: str) -> list[dict[str, Any]]:
        """All evaluation results of a run."""
        return [
            dict(row) for row in self._db.execute("SELECT * FROM score WHERE run = ? ORDER BY corpus, name", (run,))
        ]

    def fact(self, program: str, kind: str, name: str) -> Any:
        """One recorded fact, or None."""
        row = self._db.execute(
            "SELECT value FROM fact WHERE program = ? AND kind = ? AND name = ?", (program, kind, name)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def facts(self, program: str, kind: str) -> dict[str, Any]:
        """All facts of a kind, by name."""
        rows = self._db.execute(
            "SELECT name, value FROM fact WHERE program = ? AND kind = ? ORDER BY name", (program, kind)
        )
        return {row[0]: json.loads(row[1]) for row in rows}

    def all_facts(self, program: str) -> list[list[Any]]:
        """All facts of a program as [kind, name, JSON text], in a fixed order."""
        rows = self._db.execute("SELECT kind, name, value FROM fact WHERE program = ? ORDER BY kind, name", (program,))
        return [list(row) for row in rows]

    def programs(self) -> list[str]:
        """Names of the programs that have runs or facts."""
        rows = self._db.execute("SELECT program FROM run UNION SELECT program FROM fact ORDER BY 1")
        return [row[0] for row in rows]

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table, sorted: two books with equal dumps say the same."""
        tables: Mapping[str, str] = {
            "run": "id",
            "metric": "run, step, name",
            "score": "run, corpus, name",
            "fact": "program, kind, name",
        }
        return {t: [tuple(r) for r in self._db.execute(f"SELECT * FROM {t} ORDER BY {o}")] for t, o in tables.items()}


def _run_row(row: sqlite3.Row) -> dict[str, Any]:
    return {"forecast": "", **dict(row), "config": json.loads(row["config"])}
