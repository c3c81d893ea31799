"""The tree of models: shown, grown by one line from any checkpoint, and never cut under a child."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from windtunnel.base.errors import RecipeError, Stopped, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.cli import _run
from windtunnel.home import Home
from windtunnel.lineage import branch, delete, disk, doomed, tree
from windtunnel.pipeline import run
from windtunnel.rebuild import rebuild
from windtunnel.recipe import load_recipe
from windtunnel.train.folder import checkpoint_path, steps_saved
from windtunnel.train.stage import Stage

RECIPE = """
name = "grove"
seed = 3

[corpus.plain]
source = "plain.jsonl"
heldout = 0.1

[corpus.exact]
source = "made:exact/200"
messages = "messages"
heldout = 0.1
minimum_characters = 8

[tokenizer]
vocab = 320
corpora = ["plain", "exact"]

[model]
family = "tiny"
size = "0.02M"
row = 96

[trunk]
tokens = "3840"
batch = "192"
warmup = "2 steps"
mixture = { plain = 1 }
checkpoint_every = "4 steps"

[branch.same]
tokens = "20%"

[branch.mean]
kind = "soup"
of = ["trunk"]
last = 2

[evaluate]
tokens = "1k"
corpora = ["plain"]
"""


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, write_made_up, tmp_path: Path, trained: list[str]) -> Path:
    """A copy of a home with a trunk, a decay and a soup of the trunk; made once."""
    made = tmp_path_factory.getbasetemp() / "grove"
    if not (made / "done").exists():
        made.mkdir(exist_ok=True)
        write_made_up(made / "plain.jsonl", 200)
        (made / "grove.toml").write_text(RECIPE, encoding="utf-8")
        run(load_recipe(made / "grove.toml"), made / "home", quiet=True)
        (made / "done").touch()
    shutil.copytree(made / "home", tmp_path / "home")
    trained.clear()
    return tmp_path / "home"


def nodes(home: Path) -> dict[str, dict]:
    return {node["name"]: node for node in tree(home).data["programs"]["grove"]}


def shown(view) -> str:
    out = io.StringIO()
    Console(file=out, width=300).print(view)
    return out.getvalue()


def test_the_tree_says_what_grew_from_what_with_tokens_scores_and_disk(home: Path) -> None:
    found = nodes(home)
    book = LabBook(Home(home).labbook, readonly=True)
    rows = {row["name"]: row for row in book.runs(program="grove")}
    assert found["trunk"]["parent"] is None
    assert found["same"]["parent"] == found["mean"]["parent"] == found["trunk"]["id"]
    assert found["same"]["tokens"] == rows["same"]["tokens"]
    assert found["same"]["bytes"] == disk(home / rows["same"]["folder"]) > 100_000
    assert found["same"]["checkpoints"] == steps_saved(home / rows["same"]["folder"])
    score = next(s for s in found["same"]["scores"] if s["name"] == "bits_per_byte")
    assert (score["corpus"], score["count"]) == ("plain", score["count"])
    assert len(found["mean"]["averages"]) == 2
    text = shown(tree(home, "grove"))
    assert "├─ same   decay · from step 16 · 3.84k tokens" in text
    assert "└─ mean   soup · mean of 2 checkpoints" in text
    assert f"plain {score['value']:.4f}" in text
    with pytest.raises(UserError, match="expected a program of this home, got 'grave'; did you mean 'grove'"):
        tree(home, "grave")


def test_one_line_grows_a_branch_from_any_checkpoint_and_retrains_nothing(home: Path, trained: list[str]) -> None:
    before = nodes(home)
    view = branch(home, "grove/trunk@12", "late", values=["tokens=10%", "floor=0.2"])
    assert trained == ["late"]
    late = nodes(home)["late"]
    assert (late["from_step"], late["kind"], late["status"]) == (12, "decay", "done")
    assert '[branch.late]\nkind = "decay"\nparent = "trunk"\nat = "12 steps"\n' in view.data["table"]
    trained.clear()
    view = branch(home, "same", "chat", values=["mixture={exact=1}", "epochs=1", "lr=0.002", "lora={rank=2}"])
    assert trained == ["chat"]
    chat = nodes(home)["chat"]
    assert (chat["kind"], chat["parent"]) == ("sft", before["same"]["id"])
    assert {"stop_rate", "accuracy"} <= {score["name"] for score in chat["scores"]}
    # What it prints is a table that the recipe takes, and with it everything is done.
    recipe = home.parent / "again.toml"
    recipe.write_text(RECIPE + "\n" + view.data["table"], encoding="utf-8")
    shutil.copy(Path(LabBook(Home(home).labbook).fact("grove", "recipe", "base")) / "plain.jsonl", recipe.parent)
    trained.clear()
    run(load_recipe(recipe), home, quiet=True, until="chat")
    assert trained == []


def test_a_branch_grows_from_the_midst_of_another_which_is_trained_again_up_to_there_if_it_has_to(
    home: Path, trained: list[str]
) -> None:
    values = ["mixture={exact=1}", "epochs=1", "lora={rank=2}"]
    whole = nodes(home)["same"]
    folder = home / "programs" / "grove" / "runs" / whole["id"].partition("/")[2]
    weights = (checkpoint_path(folder, 20) / "weights.safetensors").read_bytes()
    assert 18 not in steps_saved(folder)
    view = branch(home, "same@18", "early", values=values)
    assert trained == ["same", "early"]
    early, again = nodes(home)["early"], nodes(home)["same"]
    assert (early["from_step"], early["parent"], early["status"]) == (18, whole["id"], "done")
    assert 18 in steps_saved(folder)
    assert again["scores"] == whole["scores"]
    assert (checkpoint_path(folder, 20) / "weights.safetensors").read_bytes() == weights, "the same run to the bit"
    assert 'parent = "same"\nat = "2 steps"\n' in view.data["table"]
    # Without a rate it goes on with that of the step it grows from, not with the one the parent ended at.
    stages = {row["name"]: Stage.from_dict(row["config"]) for row in LabBook(Home(home).labbook).runs(program="grove")}
    rate = stages["same"].optimizer.learning_rate * stages["same"].schedule.factor(18)
    assert stages["early"].optimizer.learning_rate == pytest.approx(rate)
    trained.clear()
    branch(home, "same@18", "twin", values=values)
    assert trained == ["twin"], "the checkpoint stays"


def test_a_step_of_a_soup_is_refused_before_anything_is_trained(home: Path, trained: list[str]) -> None:
    with pytest.raises(UserError, match="expected no step for a soup, got 'same@18'; name its members with of"):
        branch(home, "same@18", "x", kind="soup", values=['of=["trunk"]', "last=2"])
    assert trained == []


def test_a_branch_that_was_interrupted_goes_on_by_the_same_call_and_no_other(
    home: Path, trained: list[str], monkeypatch
) -> None:
    def interrupted(*args, **options):
        raise Stopped("stopped at a step boundary; the same command continues")

    first = nodes(home)
    for where, so_far in (("_branches", []), ("_finish_model", ["late"])):  # before it is trained, and after
        with monkeypatch.context() as patched:
            patched.setattr(f"windtunnel.pipeline.{where}", interrupted)
            with pytest.raises(Stopped):
                branch(home, "grove/trunk@12", "late", values=["tokens=10%"])
        assert trained == so_far
        with pytest.raises(UserError, match="expected a new name, got 'late'"):
            branch(home, "grove/trunk@12", "late", values=["tokens=5%"])
    view = branch(home, "grove/trunk@12", "late", values=["tokens=10%"])
    assert trained == ["late"]
    assert nodes(home).keys() == {*first, "late"}
    assert "[branch.late]" in view.data["table"]
    assert LabBook(Home(home).labbook).facts("grove", "grown").keys() == {"late"}
    with pytest.raises(UserError, match="expected a new name, got 'late'"):
        branch(home, "grove/trunk@12", "late", values=["tokens=10%"])


@pytest.mark.parametrize(
    ("source", "name", "values", "words"),
    [
        ("grove/trunk", "same", [], "--name: expected a new name, got 'same', which 'grove' has"),
        ("grove/same@end", "x", [], "expected RUN or RUN@STEP, got 'grove/same@end'; write for example trunk@300"),
        ("grove/same@3", "x", ["mixture={exact=1}"], "model branch: expected a step of 'same', 17 to 20, got 3; leave it out for its end"),
        ("grove/same", "x", ["mixture={exact=1}", "at=5 steps"], "branch.x.at: expected 1 to 4 steps of 'same', got 5 steps; leave it out for its end"),
        ("grove/mean", "x", ["mixture={exact=1}", "at=1 steps"], "branch.x.at: expected none, since a soup has no steps, got 1 steps"),
        ("grove/same", "x", ["mixture={exact=1}", "at=2k"], "branch.x.at: expected a step of 'same', got 2k; write for example '300 steps'"),
        ("grove/none", "x", [], "expected a run of this home, got 'grove/none'"),
        ("grove/same", "x", ["mixture={exact=1}", "epoch=1"], "branch.x.epoch: expected a known key, got an unknown one; did you mean 'epochs'?"),
        ("grove/trunk", "x", ["lr=0.1"], "branch.x.lr: expected it beside kind = 'sft', 'dpo' or 'adapt', got kind = 'decay'"),
        ("grove/trunk", "a b", [], "expected a name of letters"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_grow_is_one_line_and_changes_nothing(
    home: Path, trained: list[str], source: str, name: str, values: list[str], words: str
) -> None:
    before = nodes(home)
    with pytest.raises((UserError, RecipeError)) as error:
        branch(home, source, name, values=values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert (trained, nodes(home)) == ([], before)


def test_a_run_is_deleted_whole_and_never_under_a_child(home: Path, trained: list[str], monkeypatch, capsys) -> None:
    with pytest.raises(
        UserError, match="expected a run that nothing grows from, but same, mean grow from 'trunk'; delete what grows"
    ):
        doomed(home, "grove/trunk")
    same = nodes(home)["same"]
    found = doomed(home, "grove/same")
    assert f"Delete {same['id']} (decay, " in found.question
    folder = home / "programs" / "grove" / "runs" / same["id"].partition("/")[2]
    # Asked and answered with no, nothing happens.
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert _run(["model", "delete", "grove/same", "--home", str(home)]) == 130
    # So it does where nobody answers; then it is said how to go on.
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert _run(["model", "delete", "grove/same", "--home", str(home)]) == 2
    assert "--yes deletes without asking" in capsys.readouterr().err
    assert folder.is_dir()
    delete(home, found)
    assert not folder.exists()
    assert "same" not in nodes(home)
    book = LabBook(Home(home).labbook, readonly=True)
    assert not book.scores(same["id"])
    assert same["id"].partition("/")[2] not in book.facts("grove", "model")
    book.close()
    rebuild(home)
    assert set(nodes(home)) == {"trunk", "mean"}
    assert _run(["model", "delete", "grove/mean", "--yes", "--home", str(home)]) == 0
    assert "deleted grove/mean-" in capsys.readouterr().out
    assert set(nodes(home)) == {"trunk"}


def test_a_name_is_free_again_after_its_run_is_deleted_and_nothing_deleted_comes_back(
    home: Path, trained: list[str]
) -> None:
    branch(home, "grove/trunk@12", "late", values=["tokens=10%"])
    branch(home, "grove/same", "pair", kind="soup", values=['of=["same", "late"]'])
    for name in ("pair", "same", "late"):
        delete(home, doomed(home, f"grove/{name}"))
    trained.clear()
    branch(home, "grove/trunk@12", "late", values=["tokens=20%"])
    assert trained == ["late"]
    assert set(nodes(home)) == {"trunk", "mean", "late"}


def test_a_grown_branch_is_known_after_the_recipe_without_it_has_run_again(home: Path, trained: list[str]) -> None:
    branch(home, "same", "chat", values=["mixture={exact=1}", "epochs=1", "lr=0.002"])
    file = home.parent / "grove.toml"
    file.write_text(RECIPE, encoding="utf-8")
    shutil.copy(Path(LabBook(Home(home).labbook).fact("grove", "recipe", "base")) / "plain.jsonl", file.parent)
    run(load_recipe(file), home, quiet=True)
    trained.clear()
    branch(home, "chat", "more", values=["mixture={exact=1}", "epochs=1", "lr=0.001"])
    assert trained == ["more"]
    with pytest.raises(UserError, match="expected a new name, got 'chat'"):
        branch(home, "same", "chat", values=["mixture={exact=1}"])


def test_tokens_of_a_longer_context_are_those_of_its_line(home: Path) -> None:
    before = nodes(home)
    values = ["context={row=192, items=0}", "batch=384", "stable=1152", "tokens=768", "mixture={plain=1}"]
    branch(home, "grove/trunk@12", "long", kind="long", values=values)
    assert before["trunk"]["tokens"] == 16 * 192
    assert nodes(home)["long"]["tokens"] == 12 * 192 + 1152 + 768


def test_a_model_is_not_deleted_while_another_program_goes_on_from_it(home: Path, write_made_up) -> None:
    write_made_up(home.parent / "plain.jsonl", 200)
    text = RECIPE.replace('name = "grove"', 'name = "graft"').replace("[trunk]", '[trunk]\nstart = "grove/same"')
    (home.parent / "graft.toml").write_text(text, encoding="utf-8")
    run(load_recipe(home.parent / "graft.toml"), home, until="trunk", quiet=True)
    with pytest.raises(UserError, match="expected a run that nothing grows from, but graft/trunk grow from 'same'"):
        doomed(home, "grove/same")
    delete(home, doomed(home, "graft/trunk"))
    assert doomed(home, "grove/same").row["program"] == "grove"
