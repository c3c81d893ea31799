"""A model is talked to, asked and exported in the template of the chats that it has read, or that it grew from a reader of."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from windtunnel import finishing, manage
from windtunnel.base.labbook import LabBook
from windtunnel.chats import template_of, template_read
from windtunnel.corpus.chat import MINICPM_JINJA, render
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.finishing import VERBS
from windtunnel.home import Home
from windtunnel.pipeline import run
from windtunnel.recipe import load_recipe
from windtunnel.serve import chat as terminal


class Book:
    """Runs and facts as a lab book holds them."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.facts: dict[tuple[str, str, str], Any] = {}

    def add(self, run: str, mixture: dict[str, float], parent: str | None = None) -> None:
        plan = {"segments": [{"start": 0, "mixture": list(mixture.items())}]}
        self.rows[run] = {"id": run, "program": run.split("/")[0], "parent": parent, "config": {"plan": plan}}

    def run(self, run: str) -> Any:
        return self.rows.get(run)

    def fact(self, program: str, kind: str, name: str) -> Any:
        return self.facts.get((program, kind, name))


def corpus(template: str | None = None, **keys: str) -> dict[str, Any]:
    return {**({"template": template} if template else {}), **keys}


TABLES = {
    "text": corpus("chatml", text="text"), "old": corpus(messages="messages"), "paper": corpus("minicpm", user="{{ q }}", assistant="{{ a }}"),
    "own": corpus("{{ x }}", chosen="chosen", rejected="rejected"),
}  # fmt: skip


def test_the_template_of_a_mixture_is_that_of_its_chats_and_of_the_heaviest_of_several():
    assert template_of(TABLES, [("text", 1.0)]) is None
    assert template_of(TABLES, [("text", 9.0), ("old", 1.0)]) == "chatml"  # stored before corpora had templates
    assert template_of(TABLES, [("text", 9.0), ("paper:long", 1.0)]) == "minicpm"
    assert template_of(TABLES, [("old", 0.2), ("own", 0.5), ("paper", 0.3)]) == "{{ x }}"
    assert template_of({}, [("gone", 1.0)]) is None


def test_the_nearest_reader_of_chats_decides_in_its_own_program_and_a_note_outlives_a_recipe():
    book = Book()
    book.facts["p", "recipe", "resolved"] = {"corpus": TABLES}
    book.facts["q", "recipe", "resolved"] = {"corpus": {"paper": corpus("chatml", text="text")}}
    book.add("p/trunk", {"text": 1.0})
    book.add("p/chat", {"text": 1.0, "old": 1.0}, "p/trunk")
    book.add("p/again", {"paper": 1.0}, "p/chat")
    book.add("p/adapted", {"text": 1.0}, "p/again")
    book.add("q/grown", {"paper": 1.0}, "p/adapted")  # its own corpus of that name is text
    found = {name: template_read(book, name) for name in book.rows}
    assert found == {
        "p/trunk": None,
        "p/chat": "chatml",
        "p/again": "minicpm",
        "p/adapted": "minicpm",
        "q/grown": "minicpm",
    }
    book.facts["p", "model", "again"] = {"template": "{{ y }}", "samples": []}
    assert template_read(book, "q/grown") == "{{ y }}"
    book.facts["p", "model", "again"] = {"samples": []}  # finished before it was noted
    book.facts["p", "recipe", "resolved"] = {"corpus": {}}
    assert template_read(book, "q/grown") is None
    assert template_read(book, "p/none") is None


RECIPE = """
name = "marks"
seed = 3
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[corpus.chats]
source = "chats.jsonl"
messages = "messages"
template = "minicpm"
heldout = 0.1
minimum_characters = 8
[tokenizer]
vocab = 320
corpora = ["plain", "chats"]
[model]
family = "tiny"
size = "0.02M"
row = 64
[trunk]
tokens = "2560"
batch = "256"
warmup = "2 steps"
mixture = { plain = 1 }
[branch.better]
tokens = "20%"
mixture = { plain = 1, chats = 1 }
[branch.adapted]
kind = "adapt"
parent = "better"
tokens = "512"
mixture = { plain = 1 }
[export]
branch = "adapted"
[evaluate]
tokens = "500"
"""


@pytest.fixture
def home(tmp_path: Path, write_made_up, trained, monkeypatch) -> Path:
    """A program whose chats are marked as in the paper, trained and exported."""
    find = importlib.util.find_spec  # loading transformers takes a while
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more)
    )
    write_made_up(tmp_path / "plain.jsonl", 150)
    chats = [
        [("user", f"What is {i} plus {i % 7}?"), ("assistant", f"It is {i + i % 7}, said the teacher of village {i}.")]
        for i in range(80)
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "marks.toml").write_text(RECIPE, encoding="utf-8")
    run(load_recipe(tmp_path / "marks.toml"), tmp_path / "home", quiet=True)
    assert trained == ["trunk", "better", "adapted"]
    return tmp_path / "home"


def test_a_model_of_the_papers_chats_is_talked_to_and_exported_with_their_marks(home: Path, trained, monkeypatch):
    book = LabBook(Home(home).labbook)
    rows = {row["name"]: row for row in book.runs(program="marks")}
    assert {name: template_read(book, row["id"]) for name, row in rows.items()} == {
        "trunk": None, "better": "minicpm", "adapted": "minicpm"
    }  # fmt: skip
    facts = book.facts("marks", "model")
    noted = {name: facts[Path(row["folder"]).name].get("template") for name, row in rows.items() if name != "trunk"}
    assert noted == {"better": "minicpm", "adapted": None}

    jobs, seen = [], []
    with monkeypatch.context() as patched:
        patched.setattr(
            subprocess, "run", lambda command, **_: jobs.append(command) or subprocess.CompletedProcess(command, 0)
        )
        patched.setattr(
            terminal, "generate", lambda model, ids, **options: seen.append((ids, options["stop"])) or iter(())
        )
        for name, template in (("trunk", "chatml"), ("better", "minicpm"), ("adapted", "minicpm")):
            manage.chat(home, f"marks/{name}", prompt="Where is the river?")
            job = json.loads(jobs[-1][-1])
            VERBS[jobs[-1][-2]](job)
            tokenizer = Tokenizer.load(Path(job["tokenizer"]))
            question: Any = [{"role": "user", "content": "Where is the river?"}]
            ids, _ = render(question, tokenizer, template, add_generation_prompt=True)
            assert seen[-1] == (ids, {2} if template == "minicpm" else {2, 4})
        patched.setattr(finishing, "generate", terminal.generate)
        job = {"checkpoint": job["checkpoint"], "tokenizer": job["tokenizer"], "template": "minicpm", "tasks": {}}
        questions = len(VERBS["finish"](job)["answers"])
        asked = [(tokenizer.decode(ids, control=True), stop) for ids, stop in seen[-questions:]]
        assert all(text.startswith("<s><用户>") and text.endswith("?<AI>") and stop == {2} for text, stop in asked)
        assert [(ids, stop) for ids, stop in seen[3:-questions]] == [([1], {2, 4})] * 5
    assert tokenizer.decode(seen[2][0], control=True) == "<s><用户>Where is the river?<AI>"

    (exported,) = (Home(home).program("marks") / "exports").iterdir()
    (fact,) = book.facts("marks", "export").values()
    assert fact["template"] == "minicpm"
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "ChatML" not in card or "not ChatML" in card
    assert "an answer ends with `</s>`" in card
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [2]
    if (exported / "chat_template.jinja").is_file():
        assert (exported / "chat_template.jinja").read_text(encoding="utf-8") == MINICPM_JINJA
    else:
        assert "the chat template is left out" in fact["check"]

    # An older version exported it with ChatML and did not note so: it is exported again, and once.
    with LabBook(Home(home).labbook) as writer:
        writer.put_fact(
            "marks", "export", exported.name, {key: value for key, value in fact.items() if key != "template"}
        )
    for text, again in (("older", True), ("touched", False)):
        (exported / "README.md").write_text(text, encoding="utf-8")
        run(load_recipe(home.parent / "marks.toml"), home, quiet=True)
        assert ("`</s>`" in (exported / "README.md").read_text(encoding="utf-8")) is again
    assert trained == ["trunk", "better", "adapted"]
