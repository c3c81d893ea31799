"""What an earlier version derived or searched is found again, and a changed optimizer is another search."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from windtunnel import preparation
from windtunnel.base.artefact import write_json
from windtunnel.base.errors import UserError
from windtunnel.base.units import bytes_size
from windtunnel.home import Home
from windtunnel.pipeline import run
from windtunnel.planning import known_pins, plan
from windtunnel.preparation import check_supply
from windtunnel.prepared import Prepared
from windtunnel.program import Program
from windtunnel.recipe import load_recipe, parse_recipe, shipped_path
from windtunnel.study import search_stages, with_known_choices
from windtunnel.train.stage import Start

TOTAL = 2_442_057_984 + 122_753 * 2304
SEARCH = "d06154f2b79167b8ab88d2a335441aabf3dff456cbc48a9daf7b3f695e14a580"
TRUNK = "5f1c2cead5f891c12fe0532db2849da207e6a37b74dc416f03eb1b6f70546cc3"
"""Of the quickstart's search and trunk before any data is prepared, in version e349dfa."""


def test_the_quickstart_has_the_keys_that_it_had_before_its_tables_gained_fields() -> None:
    program = Program(load_recipe("quickstart"))
    assert (program.search_key, program.trunk().key) == (SEARCH, TRUNK)


@pytest.mark.parametrize(
    "override",
    [
        "model.parametrization=completep",
        "model.qk_norm=true",
        "optimizer.beta2=0.99",
        "optimizer.weight_decay=0.2",
        "optimizer.lr=0.02",
    ],
)
def test_a_search_with_other_constants_is_another_search(override: str) -> None:
    assert Program(load_recipe("quickstart", [override])).search_key != SEARCH


@pytest.mark.parametrize(
    "override",
    [
        "model.base_width=64", "model.tied=false", "model.row=64", "model.parametrization=standard", "model.vocabulary_regime=large",
        "model.scale_depth=1", "optimizer.kind=muon", "tokenizer.vocab=512", "trunk.batch=4096",
        "trunk.warmup=3 steps", "trunk.mixture.wiki=1", "seed=2", "tunnel.trial_tokens=200k",
        "tunnel.search_size=0.05M",
    ],
)  # fmt: skip
def test_a_search_whose_trials_differ_is_another_search(override: str) -> None:
    """A record that was taken for another recipe's would choose its learning rate without a word."""
    one, other = (Program(load_recipe("quickstart", part)) for part in ([], [override]))
    values = {"learning_rate": 0.01}
    first, second = (search_stages(program, [(0, values)])[0].key for program in (one, other))
    assert first != second
    assert one.search_key != other.search_key


def test_the_choice_of_a_warmup_leaves_the_search_what_it_was_and_that_of_another_model_is_another() -> None:
    tables = tomllib.loads(shipped_path("quickstart").read_text("utf-8"))
    del tables["trunk"]["warmup"]
    space = "tunnel.space={learning_rate=[0.002, 0.08], warmup=[0.01, 0.3]}"
    program = Program(parse_recipe(tables, [space]))
    chosen = program.with_choices({"learning_rate": 0.01, "warmup": 0.25})
    assert chosen.warmup == round(0.25 * program.steps) != program.warmup
    assert chosen.search_key == program.search_key
    larger = Program(parse_recipe(tables, [space, "model.size=0.5M", "trunk.tokens=20N"]))
    assert larger.search_key != program.search_key, "its warmup, in steps, would outlast this one's trunk"


@pytest.mark.parametrize("record", [{}, [], {"choices": {}, "runs": {}}, {"choices": 1, "runs": {}}])
def test_a_record_of_a_search_that_is_none_is_not_read_as_one(tmp_path: Path, record: object) -> None:
    program, home = Program(load_recipe("quickstart")), Home(tmp_path)
    write_json(home.search("quickstart", program.search_key), record)
    assert with_known_choices(home, program) == program


def test_pins_of_a_version_that_knew_fewer_keys_still_hold(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart")
    model = {
        "family": "tiny", "size": "0.3M", "shape": None, "tied": True, "row": 128, "parametrization": "mup",
        "base_width": None, "init_std": None, "scale_emb": None, "scale_depth": None,
    }  # fmt: skip
    pinned = {"model": {"model": model, "tokenizer": "t", "warmup": "2%", "batch": 1024, "budget": None}}
    folder = Home(tmp_path).program("quickstart")
    folder.mkdir(parents=True)
    (folder / "pinned.json").write_text(json.dumps({**pinned, "batch": 8, "warmup": 125}), encoding="utf-8")
    assert known_pins(Home(tmp_path), recipe, "t") == {"batch": 8, "warmup": 125}
    for other in ("model.parametrization=completep", "model.row=64", "model.qk_norm=true"):
        assert known_pins(Home(tmp_path), load_recipe("quickstart", [other]), "t") is None


def test_muon_needs_one_moment_less_for_each_hidden_matrix(tmp_path: Path) -> None:
    said, tables = {}, load_recipe("minicpm-2.4b").resolved()
    tables = {**tables, "branch": {"same": tables["branch"]["same"]}, "export": {}}  # experts would need more
    for kind in ("adamw", "muon"):
        view = plan(parse_recipe(tables, [f"optimizer.kind={kind}"]), tmp_path, measure=False)
        said[kind] = next(str(part) for part in view.parts if str(part).startswith("memory"))
    assert said["adamw"].startswith(f"memory   {bytes_size(16 * TOTAL)} for")
    assert said["muon"].startswith(f"memory   {bytes_size(16 * TOTAL - 4 * (2_442_057_984 - 81 * 2304))} for")


def test_muon_on_several_gpus_is_one_line_before_any_work(tmp_path: Path) -> None:
    recipe = load_recipe("minicpm-1.2b", ["optimizer.kind=muon"])
    with pytest.raises(UserError, match=r"optimizer\.kind: expected one process for Muon, .* got 2"):
        run(recipe, tmp_path, devices="0,1", quiet=True)
    assert not list(tmp_path.rglob("prepared.json"))


RAMP = [{"after": "100M", "batch": 4_194_304}, {"after": "2000 steps", "batch": 8_388_608}]


def test_a_batch_schedule_is_planned_in_steps_and_its_tokens_are_counted_exactly(tmp_path: Path) -> None:
    tables = {
        "name": "ramp", "corpus": {"text": {"source": "text.txt"}}, "model": {"family": "minicpm", "size": "0.1B", "row": 4096},
        "trunk": {"tokens": "20B", "batch": 2_097_152, "warmup": "20 steps", "batch_schedule": RAMP},
        "branch": {"same": {"tokens": "10%"}, "early": {"at": "1B", "tokens": "100M"}},
    }  # fmt: skip
    program = Program(parse_recipe(tables))
    trunk, same, early = program.trunk(), program.branch("same"), program.branch("early")
    assert trunk.batch_changes == ((48, 1024), (2000, 2048))  # 100M / 2,097,152 = 47.7 steps
    assert same.tokens == pytest.approx(20e9, rel=1e-3)
    assert same.own_tokens == pytest.approx(2e9, rel=3e-3)
    assert same.step_tokens == 8_388_608
    assert early.batch_changes == ((48, 1024),)
    assert early.first_step == 48 + round((1e9 - 48 * 2_097_152) / 4_194_304)
    assert early.own_tokens == 24 * 4_194_304
    assert program.decay().share == pytest.approx(0.1, rel=3e-3)
    shown = plan(program.recipe, tmp_path, measure=False).to_dict()
    assert shown["batch_changes"] == [[48, 1024], [2000, 2048]]
    without = Program(parse_recipe({**tables, "trunk": {**tables["trunk"], "batch_schedule": []}}))
    assert without.trunk().key != trunk.key


def test_what_grows_from_a_trunk_with_a_batch_schedule_has_the_batch_of_where_it_begins_and_counts_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {
        "name": "ramp", "corpus": {"text": {"source": "text.txt"}}, "model": {"family": "minicpm", "size": "0.1B", "row": 4096},
        "trunk": {"tokens": "20B", "batch": 2_097_152, "warmup": "20 steps", "batch_schedule": RAMP, "checkpoint_every": "5%"},
        "branch": {
            "same": {"tokens": "10%"},
            "soup": {"kind": "soup", "of": ["trunk"], "last": 3},
            "experts": {"kind": "moe", "at": "1B", "tokens": "100M", "experts": {"count": 4}},
            "longer": {"kind": "long", "at": "1B", "tokens": "100M", "stable": "100M", "context": {"row": 16384}},
        },
    }  # fmt: skip
    text = {"tokens": 30_000_000_000, "hash": "h", "folder": "f"}
    prepared = Prepared("t", "h", 122_753, {"text": text}, {"stage": "a" * 64, "step": 7})
    program = Program(parse_recipe(tables), prepared)
    trunk, soup, experts, longer = (program.trunk(), *map(program.branch, ("soup", "experts", "longer")))
    assert trunk.start == Start("a" * 64, 7, fresh=True)
    assert trunk.batch_changes == ((48, 1024), (2000, 2048))
    assert program.checkpoint_steps == round(0.05 * program.steps)
    members = [member.step for member in soup.average]
    assert members == [trunk.steps - i * program.checkpoint_steps for i in range(3)]
    assert set(members) <= set(trunk.keep)
    assert (soup.step_tokens, soup.batch_changes) == (trunk.step_tokens, ())
    at = 48 + round((1e9 - 48 * 2_097_152) / 4_194_304)
    for stage in (experts, longer):
        assert (stage.first_step, stage.own_steps, stage.batch_changes) == (at, 48, ())
        assert stage.step_tokens == 4_194_304
        assert stage.own_tokens == 48 * 4_194_304
    read: dict[int, list[int]] = {}
    monkeypatch.setattr(
        preparation, "check_epochs", lambda plan, rows, sequences: read.setdefault(plan.row, []).append(sequences) or []
    )
    check_supply(program, print)
    assert read[4096] == [
        trunk.tokens // 4096,
        program.branch("same").tokens // 4096,
        0,
        trunk.batches.sequences(at) + 48 * 1024,
    ]
    assert read[16384] == [48 * 256]


def test_a_soup_of_more_checkpoints_than_the_trunk_will_have_is_refused_and_one_of_an_ended_trunk_takes_what_there_is() -> (
    None
):
    mean = "branch.mean={kind='soup', of=['trunk'], last=%d}"
    program = Program(load_recipe("quickstart", [mean % 4, "trunk.checkpoint_every=100 steps"]))
    assert len(program.branch("mean").average) == 4
    assert [member.step for member in program.branch("mean", 250).average] == [250, 150, 50]
    few = Program(load_recipe("quickstart", [mean % 4, "trunk.checkpoint_every=400 steps"]))
    with pytest.raises(
        UserError, match=r"branch.mean.last: expected 4 checkpoints of the trunk or more, found 3; lower trunk"
    ):
        few.branch("mean")
