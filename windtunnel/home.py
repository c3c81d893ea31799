"""The home folder: where everything that windtunnel makes lies. Needs no torch.

home/labbook.sqlite                     runs, metrics, scores, facts
home/downloads/                         fetched packages
home/text/  home/tokenizers/  home/corpora/     shared by all programs, named by content
home/programs/NAME/runs/STAGE-KEY/  one a run: stage.json, metrics.jsonl, checkpoints/, result.json or failed.json, record.json
home/programs/NAME/                     prepared.json, facts.json, studies/, forecasts/, exports/, report.html
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from windtunnel.base.artefact import write_json
from windtunnel.base.labbook import LabBook

RECORD = "record.json"
"""In a run's folder: its row and scores, as they stand in the lab book."""
FACTS = "facts.json"
"""In a program's folder: its facts, as they stand in the lab book."""


@dataclass(frozen=True)
class Home:
    """Paths inside a home folder."""

    root: Path

    @property
    def labbook(self) -> Path:
        return self.root / "labbook.sqlite"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def tokenizers(self) -> Path:
        return self.root / "tokenizers"

    @property
    def corpora(self) -> Path:
        return self.root / "corpora"

    def program(self, name: str) -> Path:
        """The folder of a program."""
        return self.root / "programs" / name

    def runs(self, program: str) -> Path:
        """The folder that holds a program's run folders."""
        return self.program(program) / "runs"

    def search(self, program: str, key: str) -> Path:
        """The record of a program's search with that key."""
        return self.program(program) / "studies" / f"search-{key[:12]}.json"


def write_facts(home: Path, program: str, book: LabBook) -> None:
    """Writes the facts of a program into its folder, from which a lab book is rebuilt."""
    write_json(Home(home).program(program) / FACTS, book.all_facts(program))


def keep_fact(home: Path, program: str, kind: str, name: str, fact: object) -> None:
    """Records a fact of a program in the lab book and in its folder."""
    with closing(LabBook(Home(home).labbook)) as book:
        with book:
            book.put_fact(program, kind, name, fact)
        write_facts(home, program, book)
