"""A recipe with a chat model: parents first, each grown once, finished, shown and exported like any branch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from windtunnel.base.artefact import read_json
from windtunnel.base.labbook import LabBook
from windtunnel.chats import template_read
from windtunnel.evaluate import before_after
from windtunnel.home import Home
from windtunnel.manage import clean
from windtunnel.measures import EXACT
from windtunnel.pipeline import run
from windtunnel.planning import plan
from windtunnel.recipe import load_recipe
from windtunnel.train.folder import checkpoint_path, steps_saved

RECIPE = """
name = "family"
seed = 3

[corpus.plain]
source = "plain.jsonl"
heldout = 0.1

[corpus.chats]
source = "chats.jsonl"
messages = "messages"
heldout = 0.1
minimum_characters = 8

[tokenizer]
vocab = 320
corpora = ["plain", "chats"]

[model]
family = "tiny"
size = "0.02M"
row = 128

[trunk]
tokens = "5120"
batch = "256"
warmup = "4 steps"
mixture = { plain = 1 }

[branch.same]
tokens = "20%"

[branch.chat]
kind = "sft"
parent = "same"
epochs = 2
batch = "512"
mixture = { chats = 3, plain = 1 }

[corpus.pairs]
source = "pairs.jsonl"
chosen = "chosen"
rejected = "rejected"
heldout = 0.2
minimum_characters = 8

[branch.aligned]
kind = "dpo"
parent = "chat"
epochs = 1
batch = "256"
betas = [0.02]
mixture = { pairs = 1 }

[branch.adapted]
kind = "adapt"
parent = "same"
tokens = "1024"
lora = { rank = 4, alpha = 8.0 }
mixture = { plain = 1 }

[branch.mean]
kind = "soup"
of = ["chat", "aligned"]
weights = [3.0, 1.0]

[branch.flat]
kind = "soup"
of = ["trunk"]
last = 2

[export]
branch = "aligned"

[evaluate]
tokens = "1k"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up) -> Path:
    made = tmp_path_factory.mktemp("family")
    write_made_up(made / "plain.jsonl", 300)
    lines = []
    for i in range(120):
        question, answer = f"What is {i} plus {i % 7}?", f"It is {i + i % 7}, said the teacher of village {i}."
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        )
    (made / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pairs = [
        {
            "prompt": f"What is {i} plus 1?",
            "chosen": f"It is {i + 1}.",
            "rejected": f"No {i}!",
        }
        for i in range(60)
    ]
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (made / "family.toml").write_text(RECIPE, encoding="utf-8")
    return made


TREE = ["same", "flat", "chat", "adapted", "aligned", "aligned-beta-0.02", "mean"]
"""Generation by generation."""


def weights_of(home: Path, row: dict, step: int | None = None) -> dict[str, torch.Tensor]:
    saved = steps_saved(home / row["folder"])
    return load_file(checkpoint_path(home / row["folder"], saved[-1] if step is None else step) / "weights.safetensors")


def averages_are_averages(home: Path, rows: dict[str, dict]) -> None:
    chat, aligned, mean = (weights_of(home, rows[name]) for name in ("chat", "aligned", "mean"))
    for name, value in mean.items():
        torch.testing.assert_close(
            value, (0.75 * chat[name].double() + 0.25 * aligned[name].double()).float(), rtol=0, atol=0
        )
    config = rows["flat"]["config"]
    steps = [member["step"] for member in config["average"]]
    assert len(steps) == 2
    assert steps[0] == rows["trunk"]["steps"]
    one, two = (weights_of(home, rows["trunk"], step) for step in steps)
    flat = weights_of(home, rows["flat"])
    assert any(not torch.equal(one[name], two[name]) for name in flat)
    for name, value in flat.items():
        torch.testing.assert_close(value, ((one[name].double() + two[name].double()) / 2).float(), rtol=0, atol=0)
    assert (rows["flat"]["steps"], rows["flat"]["flops"], rows["mean"]["parent"]) == (0, 0.0, rows["chat"]["id"])
    adapted, same = weights_of(home, rows["adapted"]), weights_of(home, rows["same"])
    assert torch.equal(adapted["embedding.weight"], same["embedding.weight"])
    assert not torch.equal(adapted["layers.0.mlp.up.weight"], same["layers.0.mlp.up.weight"])


def test_a_chat_model_grows_from_the_decayed_one_and_a_second_run_trains_nothing(
    folder, tmp_path, trained, monkeypatch
):
    monkeypatch.setattr(before_after, "PROMPTS", 6)
    recipe = load_recipe(folder / "family.toml")
    before = {line["name"]: line["state"] for line in plan(recipe, tmp_path, measure=False).data["stages"]}
    assert before["chat"] == "new"
    run(recipe, tmp_path, quiet=True)
    assert trained == ["trunk", *TREE]
    book = LabBook(Home(tmp_path).labbook)
    rows = {row["name"]: row for row in book.runs(program="family")}
    assert (rows["chat"]["kind"], rows["chat"]["parent"]) == ("sft", rows["same"]["id"])
    packed = read_json(Home(tmp_path).program("family") / "prepared.json")["corpora"]
    chats, texts = packed["chats"]["packed"], packed["plain"]["packed"]
    stage = rows["chat"]["config"]
    assert stage["steps"] == round(2 * (chats["rows"] + texts["rows"]) / 4)
    assert stage["plan"]["packed"] == {"chats": chats["hash"], "plain": texts["hash"]}
    weights = dict(stage["plan"]["segments"][0]["mixture"])
    assert weights["chats"] * chats["fill"] / (weights["plain"] * texts["fill"]) == pytest.approx(3)
    fact = book.facts("family", "model")[Path(rows["chat"]["folder"]).name]
    assert len(fact["answers"]) > 0
    preferences = book.facts("family", "model")[Path(rows["aligned"]["folder"]).name]["answering"]["preferences"][
        "pairs"
    ]
    assert preferences["before"]["count"] == preferences["after"]["count"] > 0
    assert all(found["low"] <= found["accuracy"] <= found["high"] for found in preferences.values())
    scores = {(s["corpus"], s["name"]): s for s in book.scores(rows["aligned"]["id"])}
    assert {corpus for corpus, _ in scores} == {"plain", "chats", "pairs", EXACT}
    told = {(EXACT, "accuracy"), (EXACT, "accuracy_sorting"), (EXACT, "stop_rate"), ("pairs", "stop_rate"),
            ("pairs", "answer_tokens"), ("pairs", "preference_accuracy"), ("pairs", "kl_to_reference")}  # fmt: skip
    assert told <= set(scores)
    assert scores["pairs", "preference_accuracy"]["value"] == preferences["after"]["accuracy"]
    sweep = book.fact("family", "study", "beta-aligned")["rows"]
    assert [row["beta"] for row in sweep] == [0.02, 0.1]
    assert sweep[1]["preferences"]["pairs"] == preferences
    assert sweep[0]["divergence"]["pairs"]["per_answer"] >= 0
    assert {row["study"] for row in book.runs(program="family")} == {"", "beta-aligned"}
    read_back = read_json(Home(tmp_path).root / rows["aligned"]["folder"] / "record.json")["scores"]
    assert [s for s in read_back if s["name"] == "kl_to_reference"]
    page = (Home(tmp_path).program("family") / "report.html").read_text(encoding="utf-8")
    for words in ("What post-training changed", "aligned, grown from chat", "dpo with β = 0.1", "alignment tax", "right: sorting",
                  "ends by itself: pairs", "Roles multiply the base rate", "share of training pairs with a positive margin", "0.1 (this branch)"):  # fmt: skip
        assert words in page, words
    after = {line["name"]: line["state"] for line in plan(recipe, tmp_path, measure=False).data["stages"]}
    assert set(after.values()) == {"done"}
    averages_are_averages(tmp_path, rows)
    for name, chats in (
        ("trunk", False),
        ("same", False),
        ("adapted", False),
        ("chat", True),
        ("aligned", True),
        ("mean", True),
    ):
        assert template_read(book, rows[name]["id"]) == ("chatml" if chats else None)
    (exported,) = (Home(tmp_path).program("family") / "exports").glob("aligned-*")
    assert (exported / "chat_template.jinja").is_file()
    run(recipe, tmp_path, quiet=True)
    assert trained == ["trunk", *TREE]
    run(load_recipe(folder / "family.toml", ["branch.chat.lr=0.002"]), tmp_path, quiet=True)
    assert trained == ["trunk", *TREE, "chat", "aligned", "aligned-beta-0.02", "mean"]
    assert not [name for name in clean(tmp_path).data["folders"] if "/runs/same" in name or "/runs/trunk" in name]
