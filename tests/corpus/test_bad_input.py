"""Each kind of bad input gives one clear line that names the file and a way out, and is counted exactly."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.corpus import packages, records
from windtunnel.corpus.build import build_tokenizer
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.prepare import prepare
from windtunnel.corpus.sources import Tally, read_documents


def read(tmp_path: Path, source: str, tally: Tally | None = None, say=lambda line: None, **settings) -> list[str]:
    config = SourceConfig(source=(source,), **settings)
    return [
        d.text for d in read_documents(config, downloads=tmp_path / "downloads", base=tmp_path, tally=tally, say=say)
    ]


def refused(tmp_path: Path, source: str, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, source, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert caught.value.fix, line
    return line


def test_a_missing_file(tmp_path):
    assert refused(tmp_path, "none.txt").startswith("none.txt: expected a file or directory, found none")
    assert "match this pattern" in refused(tmp_path, "none/*.txt")


def test_an_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("text")
    original = Path.open

    def refuse(path, *arguments, **settings):
        if path.name == "secret.txt":
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(tmp_path, "secret.txt").startswith("secret.txt: it cannot be read (Permission denied)")


def test_a_directory_without_text(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    assert "folder: expected a directory with text files, found none" in refused(tmp_path, "folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "expected a regular file" in refused(tmp_path, "pipe.txt")


def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert "loop.txt: it cannot be read" in refused(tmp_path, "loop.txt")


def test_broken_utf8_names_the_byte_and_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first line\nsecond \xff line\n")
    assert refused(tmp_path, "a.txt").startswith("a.txt line 2: expected UTF-8, found the byte 0xff; convert it")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "not \xfe fine"}\n')
    assert refused(tmp_path, "b.jsonl").startswith("b.jsonl line 2: expected UTF-8, found the byte 0xfe")


def test_nul_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree \0 four")
    assert refused(tmp_path, "a.txt").startswith("a.txt line 3: it holds NUL characters")
    (tmp_path / "b.jsonl").write_text('{"text": "a\\u0000b"}\n')
    assert refused(tmp_path, "b.jsonl").startswith("b.jsonl line 1: it holds NUL characters")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "a\0b"}\n')
    assert refused(tmp_path, "c.jsonl").startswith("c.jsonl line 2: it holds NUL bytes")


def packed(kind: str, data: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    return lzma.compress(data) if kind == "xz" else zstandard.compress(data)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_truncated_compressed_files(tmp_path, kind, prose):
    data = "".join(json.dumps({"text": prose(s)}) + "\n" for s in range(50)).encode()
    whole = packed(kind, data)
    (tmp_path / f"a.jsonl.{kind}").write_bytes(whole)
    assert len(read(tmp_path, f"a.jsonl.{kind}")) == 50
    for share in (0.999, 0.6, 0.3):
        (tmp_path / f"a.jsonl.{kind}").write_bytes(whole[: int(len(whole) * share)])
        assert "truncated" in refused(tmp_path, f"a.jsonl.{kind}")
    damaged = bytearray(whole)
    damaged[0] ^= 255
    (tmp_path / f"a.jsonl.{kind}").write_bytes(bytes(damaged))
    assert "damaged" in refused(tmp_path, f"a.jsonl.{kind}")


def test_a_truncated_parquet_file(tmp_path, prose):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [prose(s) for s in range(50)]}), path)
    assert len(read(tmp_path, "a.parquet")) == 50
    path.write_bytes(path.read_bytes()[:-100])
    assert "a.parquet: expected a parquet file, found a damaged or truncated one" in refused(tmp_path, "a.parquet")
    tally = Tally()
    assert read(tmp_path, "a.parquet", tally, on_bad="skip") == []
    assert (tally.good, tally.bad) == (0, 1)


def test_a_missing_field_proposes_the_right_one(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "long text", "id": "7"}])
    line = refused(tmp_path, "a.jsonl")
    assert line.startswith("a.jsonl line 2: expected the field 'text', found the fields body, id; set text = \"body\"")
    write_jsonl(tmp_path / "b.jsonl", [{"text": ["x", "y"]}])
    assert "expected text in the field 'text', found a list; write a template" in refused(tmp_path, "b.jsonl")


def test_sharegpt_records_are_recognised_and_the_way_out_works(tmp_path, write_jsonl):
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "conversations": turns}])
    for settings_ in ({}, {"messages": "messages"}):
        assert 'ShareGPT record (conversations of from and value): set messages = "conversations"' in refused(
            tmp_path, "a.jsonl", **settings_
        )
    assert read(tmp_path, "a.jsonl", messages="conversations") == ["Who?\nMe."]


def test_broken_lines_are_an_error_a_warning_or_skipped_with_exact_counts(tmp_path):
    good = [json.dumps({"text": f"document {i}"}) for i in range(20)]
    bad = [
        "{broken",
        "[1, 2]",
        '{"body": "x"}',
        '{"text": ""}',
        '"word"',
        "[" * 5000,
        '{"text": "\\ud800"}',
        "12" * 4000,
    ]
    lines = good + bad
    random.Random(0).shuffle(lines)
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    first = 1 + 2 * min(lines.index(line) for line in bad)
    assert refused(tmp_path, "a.jsonl").startswith(f"a.jsonl line {first}: ")
    for on_bad in ("warn", "skip"):
        tally, said = Tally(), []
        assert sorted(read(tmp_path, "a.jsonl", tally, said.append, on_bad=on_bad)) == sorted(
            f"document {i}" for i in range(20)
        )
        assert (tally.good, tally.bad, tally.total) == (20, len(bad), len(lines))
        assert sum(tally.reasons.values()) == len(bad)
        if on_bad == "warn":
            assert said[-1] == f"left out: {len(bad)} damaged records of {len(lines)} in all"
            assert len(said) == 6
        else:
            assert said == []


def test_a_line_beyond_the_limit_is_one_bad_record_and_the_next_line_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAXIMUM_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    tally = Tally()
    assert read(tmp_path, "a.jsonl", tally, on_bad="skip") == ["a", "b"]
    assert (tally.good, tally.bad) == (2, 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{broken", "broken text in line 1"),
        ("3", "expected a list or dictionary"),
        ('{"a": 3}', "expected a record (an object), found a int"),
    ],
)
def test_json_that_holds_no_records(tmp_path, text, problem):
    (tmp_path / "a.json").write_text(text)
    assert problem in refused(tmp_path, "a.json")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("s3://bucket/x", "got the scheme 's3:'; download the file first"),
        ("https://example.org/a.txt", "got the scheme 'https:'"),
        ("pipy:name==1/x", "got the unknown scheme 'pipy:'; did you mean 'pypi:'?"),
        ("magnet:abc", "got the unknown scheme 'magnet:'"),
        ("pypi:name/x", "expected pypi:NAME==VERSION/path/inside/the/wheel"),
        ("hf:", "expected hf:NAME"),
    ],
)
def test_an_unknown_scheme(tmp_path, source, problem):
    assert problem in refused(tmp_path, source)


def test_a_file_with_another_sha256(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert "a.txt: expected sha256 0000" in refused(tmp_path, "a.txt", sha256="0" * 64)


def test_no_network_says_where_to_put_the_wheel(tmp_path, monkeypatch):
    def offline(command, **settings):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for a-b==1\n"
        )

    monkeypatch.setattr(packages.subprocess, "run", offline)
    line = refused(tmp_path, "pypi:a-b==1.0/x.json", sha256="0" * 64)
    assert (
        "could not be fetched (No matching distribution found for a-b==1); connect to the network once, or put the wheel"
        in line
    )
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_corpus_of_nothing_but_short_documents(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}] * 5)
    with pytest.raises(
        DataError, match=r"found no document that is kept \(5 read, 0 damaged\); lower minimum_characters \(now 32\)"
    ):
        prepare(SourceConfig(source=("a.jsonl",)), tmp_path / "out", downloads=tmp_path, base=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_nothing_but_damaged_records_says_why(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}] * 5)
    with pytest.raises(DataError, match=r"5 damaged, mostly: expected the field 'text'"):
        prepare(SourceConfig(source=("a.jsonl",), on_bad="skip"), tmp_path / "out", downloads=tmp_path, base=tmp_path)


def test_an_empty_heldout_part_names_a_share_that_works(tmp_path, prose, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(s)} for s in range(20)])
    with pytest.raises(DataError, match=r"the held-out part is empty \(heldout = 1e-06 of 20 documents\)") as caught:
        prepare(SourceConfig(source=("a.jsonl",), heldout=1e-6), tmp_path / "out", downloads=tmp_path, base=tmp_path)
    share = float(caught.value.fix.split(" = ")[1].split()[0])
    found = prepare(
        SourceConfig(source=("a.jsonl",), heldout=share), tmp_path / "out", downloads=tmp_path, base=tmp_path
    )
    assert found.stats["documents"]["heldout"] >= 1


def test_a_single_document_cannot_be_split(tmp_path, prose):
    (tmp_path / "a.txt").write_text(prose(0))
    with pytest.raises(DataError, match="give more documents, or set split"):
        prepare(SourceConfig(source=("a.txt",), heldout=1e-9), tmp_path / "out", downloads=tmp_path, base=tmp_path)


def test_a_vocabulary_larger_than_the_corpus_can_train_names_one_that_works(tmp_path, prose, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(s)} for s in range(50)])
    configs = {"a": SourceConfig(source=("a.jsonl",), heldout=0.2)}
    with pytest.raises(
        DataError, match=r"expected a vocabulary of 30000 entries, but .* give only \d+; set vocab = "
    ) as caught:
        build_tokenizer(configs, 30_000, downloads=tmp_path, base=tmp_path)
    vocab = int(caught.value.fix.split(" = ")[1].split()[0])
    assert build_tokenizer(configs, vocab, downloads=tmp_path, base=tmp_path).vocab_size == vocab
    with pytest.raises(DataError, match="expected at least 261"):
        build_tokenizer(configs, 260, downloads=tmp_path, base=tmp_path)


def test_a_template_that_is_none(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(RecipeError, match="expected a Jinja template"):
        read(tmp_path, "a.jsonl", text="{{ text")


BYTES = st.binary(max_size=300)
LINES = st.one_of(
    BYTES,
    st.text(max_size=40).map(lambda t: json.dumps({"text": t}).encode()),
    st.just(b'{"text": "fine text"}'),
    st.just(b""),
)
CONTENT = st.one_of(BYTES, st.lists(LINES, max_size=8).map(b"\n".join))


@given(
    content=CONTENT, suffix=st.sampled_from([".txt", ".md", ".jsonl", ".json", ".parquet"]),
    packing=st.sampled_from(["", ".gz", ".xz", ".zst"]), cut=st.floats(0, 1), whole=st.booleans(), mark=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused_in_one_line_and_counted(tmp_path, content, suffix, packing, cut, whole, mark):
    data = b"\xef\xbb\xbf" * mark + content
    if packing:
        data = packed(packing[1:], data)
    if not whole:
        data = data[: int(cut * len(data))]
    (tmp_path / f"a{suffix}{packing}").write_bytes(data)
    tally = Tally()
    texts = read(tmp_path, f"a{suffix}{packing}", tally, on_bad="skip")
    assert len(texts) == tally.good
    assert sum(tally.reasons.values()) == tally.bad
    assert all("\0" not in text and text.encode() is not None for text in texts)
    if tally.bad:
        with pytest.raises(DataError) as caught:
            read(tmp_path, f"a{suffix}{packing}")
        assert "\n" not in str(caught.value)
    else:
        assert read(tmp_path, f"a{suffix}{packing}") == texts
