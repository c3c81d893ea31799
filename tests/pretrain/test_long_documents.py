"""Long and short documents, packed whole, each with its share of the tokens; what stands where follows from seed and plan."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.corpus.loader import Loader
from windtunnel.corpus.mixture import DataPlan, Segment, corpus_of
from windtunnel.corpus.packing import length_facts, row_index, shared_by_length
from windtunnel.corpus.store import open_corpus
from windtunnel.home import Home
from windtunnel.planning import data_by_length, load_program, plan
from windtunnel.program import Program
from windtunnel.recipe import load_recipe

RECIPE = """
name = "lengths"

[corpus.books]
source = "books.jsonl"
heldout = 0.1

[corpus.notes]
source = "notes.jsonl"
heldout = 0.1

[tokenizer]
vocab = 320

[model]
family = "tiny"
size = "0.02M"
row = 32

[trunk]
tokens = "5120"
batch = "128"
warmup = "4 steps"
mixture = { books = 1, notes = 1 }

[branch.long]
kind = "long"
at = "80%"
tokens = "4096"
batch = "512"
context = { row = 128, long_share = 0.44, items = 0 }
"""


def write(path, sizes, seed):
    draw = random.Random(seed)
    words = ("river", "stone", "garden", "bread", "window", "letter")
    lines = [
        json.dumps({"text": " ".join(f"{draw.choice(words)}{draw.randint(0, 99)}" for _ in range(n))}) for n in sizes
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "books.jsonl", [40 + i % 60 for i in range(120)] + [8] * 60, 1)
    write(tmp_path / "notes.jsonl", [6 + i % 4 for i in range(400)], 2)
    (tmp_path / "lengths.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def test_a_batch_that_does_not_divide_into_the_longer_rows_is_refused_if_it_is_inherited_too(folder, tmp_path):
    lines = (folder / "lengths.toml").read_text(encoding="utf-8").replace('batch = "512"\n', "")
    (folder / "inherits.toml").write_text(lines, encoding="utf-8")
    assert plan(load_recipe(folder / "inherits.toml"), tmp_path / "home", measure=False).data["stages"]
    for tokens, way_out in (("96", "write batch = 128"), ("192", "write batch = 256")):
        words = f"branch.long.batch: expected a multiple of context.row = 128, got the {tokens} tokens of 'trunk'; {way_out}"
        with pytest.raises(RecipeError, match=words):
            plan(load_recipe(folder / "inherits.toml", [f"trunk.batch={tokens}"]), tmp_path / "home", measure=False)


@pytest.fixture
def prepared(folder, trained):
    """A home in which the recipe's corpora have been read, and the recipe."""
    from windtunnel.pipeline import run

    recipe = load_recipe(folder / "lengths.toml")
    run(recipe, folder / "home", quiet=True)
    return recipe, Home(folder / "home")


def test_forty_four_percent_of_the_tokens_come_from_long_documents_and_none_is_cut_that_fits(prepared):
    recipe, home = prepared
    program = load_program(recipe, home)
    stage = program.branch("long")
    assert stage.plan.long_from == 32
    assert stage.plan.corpora == ("books:long", "books:short", "notes:short")  # notes are all short
    assert type(stage.plan).from_dict(json.loads(json.dumps(stage.plan.to_dict()))) == stage.plan
    assert stage.corpora == program.trunk().corpora
    corpora = {name: open_corpus(home.root / facts["folder"]) for name, facts in program.prepared.corpora.items()}
    loader = Loader(stage.plan, corpora)
    rows = loader.rows(0, 4000)
    tokens = {"long": 0, "short": 0}
    for row, documents in zip(rows.inputs, rows.documents, strict=True):
        filled = np.flatnonzero(row != 0)
        for number in range(documents[filled[-1]] + 1):
            own = row[(documents == number) & (row != 0)]
            if own[0] == 1:  # a whole document, or the beginning of one longer than a row
                tokens["long" if len(own) + 1 >= 32 else "short"] += len(own)
            else:
                tokens["long"] += len(own)
    assert tokens["long"] / sum(tokens.values()) == pytest.approx(0.44, abs=0.005)
    again = loader.rows(1234, 7)
    assert np.array_equal(again.inputs, rows.inputs[1234:1241])
    assert not np.array_equal(Loader(replace(stage.plan, seed=9), corpora).rows(0, 20).inputs, rows.inputs[:20])
    parts = data_by_length(program, stage)
    assert sum(part["rows"] for part in parts) == stage.own_steps * stage.batch
    view = plan(recipe, home.root, measure=False)
    assert {line["name"]: line["state"] for line in view.data["stages"]}["long"] == "done"


def test_each_part_holds_its_documents_whole(tiny_corpus):
    sizes = np.diff(tiny_corpus.train.documents)
    least = int(np.median(sizes))
    facts = length_facts(tiny_corpus, 2 * least, least)
    assert facts["longest"] == sizes.max()
    assert facts["long"]["whole"] + facts["short"]["whole"] == len(sizes)
    short = row_index(tiny_corpus, 2 * least, "short", least)
    assert sorted(short.windows[:, 1].tolist()) == sorted((sizes[sizes < least] - 1).tolist())
    assert facts["long"]["tokens"] + facts["short"]["tokens"] == (sizes - 1).sum()


def test_shares_are_of_tokens_and_a_corpus_gives_of_each_length_as_it_has():
    long, short = {"fill": 0.5, "tokens": 900}, {"fill": 1.0, "tokens": 100}
    facts = {"a": {"long": long, "short": short}, "b": {"long": None, "short": short}}
    weights = dict(shared_by_length({"a": 1, "b": 3}, 0.44, facts))
    assert weights == pytest.approx({"a:long": 0.88, "a:short": 0.56 * 0.1 / 3.1, "b:short": 0.56 * 3 / 3.1})
    assert {corpus_of(name) for name in weights} == {"a", "b"}
    assert dict(shared_by_length({"a": 2}, 0.25, {})) == pytest.approx({"a:long": 0.25, "a:short": 0.75})


def test_a_plan_without_parts_is_stored_as_it_always_was():
    assert DataPlan(1, 8, (Segment(0, (("a", 1.0),)),)).to_dict().keys() == {"seed", "row", "segments"}


def test_what_cannot_be_is_refused_in_one_line(folder, prepared):
    recipe, home = prepared
    program = load_program(recipe, home)
    facts = {"books": {"long": None, "short": {"fill": 1.0, "hash": "h"}, "longest": 27}}
    hidden = Program(recipe, replace(program.prepared, corpora={
        name: {**own, "by_length": {"128/32": facts["books"]}} for name, own in program.prepared.corpora.items()
    }))  # fmt: skip
    with pytest.raises(
        DataError, match=r"expected documents of 32 tokens or more in books, notes, the longest has 27; lower"
    ):
        hidden.branch("long")
    with pytest.raises(RecipeError, match="long_from: expected long_share beside it"):
        load_recipe(folder / "lengths.toml", ["branch.long.context={row=128,long_from=64}"])
    with pytest.raises(RecipeError, match=r"expected at most context.row = 128, got 256"):
        load_recipe(folder / "lengths.toml", ["branch.long.context={row=128,long_share=0.4,long_from=256}"])
