"""``windtunnel data`` shows a corpus as training would see it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.inspect import inspect_source, render_inspection
from windtunnel.corpus.language import guess_language, language_shares


def test_an_inspection_counts_what_is_there_and_shows_the_first_rows(tmp_path, prose, write_jsonl):
    records = [{"text": prose(s)} for s in range(80)] + [
        {"text": prose(3)},
        {"body": "x"},
        {"text": "evil \x1b[31m" + prose(99)},
    ]
    write_jsonl(tmp_path / "a.jsonl", records)
    config = SourceConfig(source=("a.jsonl",), heldout=0.2, on_bad="skip")
    found = inspect_source(config, downloads=tmp_path, base=tmp_path, vocab=300, row=64, rows=3)
    assert found.records["bad"] == 1
    assert found.documents["read"] == 82
    assert found.dropped["exact"] == 1
    assert found.vocab == 300
    assert [sum(run["tokens"] for run in row) for row in found.batch] == [64] * 3
    json.dumps(found.to_dict())
    screen = io.StringIO()
    Console(file=screen, width=120, force_terminal=True, color_system=None).print(render_inspection(found))
    shown = screen.getvalue()
    assert "82 read" in shown
    assert "cleaning step 'exact': 1 examples" in shown
    assert "first packed rows of 64 tokens" in shown
    assert "evil \x1b" not in shown


def test_chats_are_shown_with_what_is_scored(tmp_path, prose, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"q": prose(s, 9), "a": prose(s + 500, 30)} for s in range(60)])
    config = SourceConfig(source=("a.jsonl",), heldout=0.2, user="{{ q }}", assistant="{{ a }}")
    found = inspect_source(config, downloads=tmp_path, base=tmp_path, vocab=300, row=400)
    runs = [run for row in found.batch for run in row]
    assert any("assistant\n" in run["text"] for run in runs if not run["scored"])
    assert any(run["text"].endswith("<|im_end|>") for run in runs if run["scored"])


def test_a_corpus_smaller_than_a_row_or_the_vocabulary_is_still_shown(tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(4):
        (tmp_path / "a" / f"{n}.txt").write_text(f"Only {n} few words in this small text file.")
    found = inspect_source(SourceConfig(source=("a",), heldout=0.5), downloads=tmp_path, base=tmp_path, row=512)
    assert found.batch == []
    assert found.vocab < 4096


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat and it was not amused by the rain.", "en"),
        ("Der Hund ist nicht mit dem Ball auf die Straße gelaufen und wartet.", "de"),
        ("Le chat est dans la maison avec les enfants et il ne sort pas.", "fr"),
        ("El perro está en la casa con los niños y no quiere salir por la lluvia.", "es"),
        ("今天天气很好，我们去公园散步。", "zh"), ("今日はとても良い天気ですね。", "ja"), ("Сегодня очень хорошая погода.", "ru"),
        ("import os\n\ndef main():\n    return os.getcwd()\n\nclass A:\n    pass\n", "code"), ("12345 67890", "?"),
    ],
)  # fmt: skip
def test_languages_are_guessed(text, language):
    assert guess_language(text) == language


def test_language_shares_add_up():
    shares = language_shares(["The cat and the dog are in the house.", "今天天气很好。"])
    assert sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "en"
