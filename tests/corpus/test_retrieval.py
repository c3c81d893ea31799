"""Made long documents: everything that is asked is told once, in no form that the evaluation uses, and never from held-out text."""

from __future__ import annotations

import json
import random
import re

import pytest

from windtunnel.base.errors import DataError
from windtunnel.corpus import retrieval
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.prepare import HELDOUT, prepare
from windtunnel.corpus.retrieval import DIGITS, KINDS, compose, draw_text, long_documents, parse
from windtunnel.corpus.sources import read_documents, source_fingerprint
from windtunnel.corpus.tokenizer import train
from windtunnel.evaluate.passkey import FILLER, TASKS, build_item

NOUNS = ("river", "stone", "garden", "bread", "window", "letter", "forest", "candle", "mountain", "teacher")


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"On day {n} of {seed} the {draw.choice(NOUNS)} of {draw.choice(NOUNS)} number {n} met a {draw.choice(NOUNS)} near it."
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"title": f"t{i}", "text": " ".join(sentences(i, 12))}) for i in range(60)]
    (tmp_path / "real.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def config(**changes) -> SourceConfig:
    values = {"source": "made:long/40/3000+real.jsonl", "heldout": 0.2, "clean": {"near": False}, **changes}
    return SourceConfig.model_validate(values)


def documents(folder, **changes) -> list[str]:
    return [d.text for d in read_documents(config(**changes), downloads=folder, base=folder)]


def test_the_same_name_gives_the_same_documents_and_another_seed_others(folder):
    first = documents(folder)
    assert first == documents(folder)
    assert len(first) == len(set(first)) == 40
    assert first[:10] == documents(folder, source="made:long/10/3000+real.jsonl")
    assert not set(first) & set(documents(folder, source="made:long/40/3000/1+real.jsonl"))
    assert 3000 * 0.7 < max(map(len, first)) <= 3000
    assert min(map(len, first)) > 3000 / 4 * 0.7


def test_each_question_is_answered_once_in_the_text_before_it():
    kinds = set()
    for seed in range(60):
        text, asked = compose(random.Random(seed), sentences(seed, 60), 8000)
        kinds |= {made.kind for made in asked}
        body = text[: text.index("\n")]
        for made in asked:
            assert text.count(f"\n{made.question} {made.answer}") == 1
            assert made.key in made.answer
            assert made.key in body
            if made.sentence:
                assert body.count(made.sentence) == 1
        assert len({made.subject for made in asked}) == len(asked) > 10
    assert kinds == set(KINDS)


def test_texts_have_the_stated_lengths_and_as_many_questions_as_their_spacing_asks_for(folder):
    found = documents(folder, source="made:long/60/2700-3000@150+real.jsonl")
    assert 2700 - 80 < min(map(len, found)) <= 2760
    assert 2940 < max(map(len, found)) <= 3000
    assert {text.count("\n") for text in found} <= {18, 19, 20}
    short = documents(folder, source="made:long/60/500-500@100+real.jsonl")
    assert {text.count("\n") for text in short} == {5}
    assert max(map(len, short)) < 900
    text, asked = compose(random.Random(1), sentences(1, 60), 4000, 120)
    assert len(asked) == 33
    assert all(made.key in text[: text.index("\n")] for made in asked)
    near = documents(folder, source="made:long/60/60-200@150+real.jsonl")
    assert {text.count("\n") for text in near} == {1}
    assert max(map(len, near)) < 320


def test_a_share_of_the_questions_stands_anywhere_between_what_states_it_and_the_end():
    early, near, asked_for = 0, 0, 0
    for seed in range(60):
        text, asked = compose(random.Random(seed), sentences(seed, 60), 4000, 150, within=0.4)
        assert not re.search(r"\s\n|\n\s", text)
        goes_on = text.rindex("\n", 0, text.rindex("near it."))  # the last line that has real text behind its answer
        for made in asked:
            question = f"\n{made.question} {made.answer}"
            assert text.count(question) == 1
            if made.sentence:
                assert text.index(made.sentence) < text.index(question)
                near += 1000 < text.index(made.sentence) > text.index(question) - 200
            early += text.index(question) <= goes_on
        asked_for += len(asked)
    assert 0.2 < early / asked_for <= 0.4
    assert near > 60, "the last thing said is asked for too, late in a text"
    assert parse("made:long/5/3000@150:40+a").numbers == (5, 750, 3000, 150, 0, 40)
    assert parse("made:long/5/3000@150+a").numbers == (5, 750, 3000, 150, 0), "an old name stays what it was"


def test_a_name_that_asks_for_questions_within_gives_texts_that_have_them(folder):
    def lines_that_go_on(source: str) -> int:
        """Lines behind whose answer more text follows: the first line is the body, where questions are only at the end."""
        texts = documents(folder, source=source)
        return sum(len(line) > 150 for text in texts for line in text.split("\n")[1:])

    assert lines_that_go_on("made:long/40/3000@150+real.jsonl") == 0
    assert lines_that_go_on("made:long/40/3000@150:40+real.jsonl") > 20


def test_in_a_list_every_statement_is_of_something_else_and_only_the_subject_tells_which_is_meant(monkeypatch):
    for name in ("_LISTS", "_ONE_LINK"):
        monkeypatch.setattr(retrieval, name, 1.0)
    numbers, others = [], []
    for seed in range(200):
        text, asked = draw_text(random.Random(seed), [" ".join(sentences(seed, 60))], 600, 200)
        body = {f"{stated}." for stated in text[: text.index("\n")].rstrip(".").split(". ")}
        pairs = [made for made in asked if made.kind == "pair"]
        links = {made.sentence.removeprefix(f"{made.subject} ").removesuffix(f" {made.key}.") for made in pairs}
        assert len(links) <= 1, "one word joins all"
        for made in pairs:
            link = next(iter(links))
            assert [stated for stated in body if stated.startswith(f"{made.subject} {link} ")] == [made.sentence]
        numbers += [any(c.isdigit() for c in made.key) for made in pairs]
        asked_for = {made.sentence for made in asked}
        others += [any(c.isdigit() for c in stated) for stated in body - asked_for]
    assert 0.7 < sum(numbers) / len(numbers) < 0.9
    assert sum(others) / len(others) < 0.5, "numbers of real text are words too"


def test_no_wording_key_or_filler_is_one_of_the_evaluation(folder):
    tokenizer = train([*FILLER, *sentences(0, 50)] * 5, 300)
    keys = set()
    for seed in range(200):
        text, asked = compose(random.Random(seed), sentences(seed, 40), 6000)
        keys |= {made.key for made in asked if made.kind in ("code", "locker")}
        assert not any(filler in text for filler in FILLER)
        assert not re.search(r"pass ?key|sequence of digits|[Tt]he value of|Remember it|\b\d{4}: \d{4},", text)
    assert {len(key) for key in keys if key.isdigit()} == set(DIGITS)
    assert not {5, 10} & set(DIGITS)
    for task in TASKS:  # what is hidden and asked there does not occur here
        text = tokenizer.decode(list(build_item(task, tokenizer, 300, 0.5, 1).ids))
        assert re.search(r"pass key is \d{5}\.|sequence of digits is \d{10}\.|\d{4}: \d{4},", text)


def test_held_out_real_text_is_in_no_made_document(folder):
    real = config(source="real.jsonl")
    prepared = prepare(real, folder / "text", downloads=folder, base=folder)
    kept_apart = [raw.decode() for batch in prepared.batches(prepared.select(HELDOUT)) for raw in batch]
    assert len(kept_apart) > 3
    together = "\n".join(documents(folder, source="made:long/200/3000+real.jsonl"))
    for text in kept_apart:
        assert not any(sentence in together for sentence in re.split(r"(?<=\.) ", text))


def test_its_fingerprint_follows_the_text_the_name_and_the_split(folder):
    def found(**changes) -> str:
        return source_fingerprint(config(**changes), downloads=folder, base=folder)

    first = found()
    assert first == found()
    assert len({first, found(source="made:long/41/3000+real.jsonl"), found(heldout=0.1)}) == 3
    with (folder / "real.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    assert found() != first


@pytest.mark.parametrize(
    "name",
    [
        "made:long/0/3000+a",
        "made:long/5/10+a",
        "made:long/5/3000",
        "made:long/5/3000+made:exact/3",
        "made:long/5/4000-3000+a",
        "made:long/5/50-3000+a",
        "made:long/5/3000@20+a",
        "made:long/5/3000@150:101+a",
        "made:long/5/3000:40+a",
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name):
    with pytest.raises(DataError, match=r"expected made:long/COUNT/CHARACTERS\+SOURCE"):
        parse(name)


def test_too_little_text_is_refused_in_one_line(folder):
    with pytest.raises(DataError, match="expected 9,000,000 characters of text"):
        list(long_documents("made:long/3/9000000+x", [], config()))
