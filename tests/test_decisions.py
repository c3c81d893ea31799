"""The verb ``law decide``: arms are runs that differ in seeds only, thresholds and looks are kept, a look is paid for once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windtunnel import cli
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.decisions import decide_between, seedless
from windtunnel.home import FACTS, Home
from windtunnel.train.stage import Stage

Add = Callable[[str, Mapping[int, float]], None]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    LabBook(tmp_path / "labbook.sqlite").close()
    return tmp_path


@pytest.fixture
def add(home: Path, make_trial: Callable[..., Stage]) -> Add:
    """Writes finished runs of an arm, whose learning rate follows from its name: seed to nats per byte."""

    def write(arm: str, losses: Mapping[int, float], corpora: tuple[str, ...] = ("tiny",)) -> None:
        base = make_trial(20)
        rate = 0.01 * (1 + ord(arm[0]) / 1000)
        with LabBook(home / "labbook.sqlite") as book:
            for seed, loss in losses.items():
                stage = replace(
                    base, name=f"{arm}-{seed}", seed=seed, plan=replace(base.plan, seed=seed),
                    optimizer=replace(base.optimizer, learning_rate=rate),
                )  # fmt: skip
                run = f"p/{stage.folder_name}"
                book.put_run(run, program="p", kind="trial", name=stage.name, study="", status="done",
                             folder=f"programs/p/runs/{stage.folder_name}", config=stage.to_dict(), steps=20)  # fmt: skip
                for corpus in corpora:
                    book.put_score(run, corpus, "nats_per_byte", loss, "nats per UTF-8 byte", 100)

    return write


def noisy(level: float, seeds: range, sd: float = 0.002) -> dict[int, float]:
    return {seed: level * math.exp(sd * np.random.default_rng([seed, round(1000 * level)]).normal()) for seed in seeds}


def test_a_clear_difference_is_picked_whichever_way_it_is_asked(home: Path, add: Add) -> None:
    add("a", noisy(1.50, range(4)))
    add("b", noisy(1.56, range(4)))
    found = decide_between(home, "a-0", "b-0").data
    assert (found["outcome"], found["pairs"], found["look"]) == ("A", 4, 1)
    assert decide_between(home, "b-2", "a-1").data["outcome"] == "B"
    assert found["mean"] == pytest.approx(math.log(1.56 / 1.50), abs=0.005)
    assert found["interval"][0] > 0


def test_a_look_counts_when_there_are_new_pairs_and_is_kept_for_a_rebuild(home: Path, add: Add) -> None:
    add("a", noisy(1.500, range(2), 0.004))
    add("b", noisy(1.507, range(2), 0.004))
    first = decide_between(home, "a-0", "b-0", least=0.002).data
    assert first["outcome"] == "more"
    assert first["more"] > 0
    assert decide_between(home, "a-0", "b-0").data == first, "the same runs are the same look"
    add("a", noisy(1.500, range(2, 9), 0.004))
    add("b", noisy(1.507, range(2, 8), 0.004))
    second = decide_between(home, "a-0", "b-0").data
    assert (second["look"], second["pairs"]) == (2, 8)
    kept = [row for row in read_json(Home(home).program("p") / FACTS) if row[0] == "decision"]
    assert len(kept) == 1
    assert '"looks": [{"seeds": [0, 1]' in kept[0][2]


def test_a_decision_that_is_made_is_not_opened_again(home: Path, add: Add) -> None:
    add("a", noisy(1.50, range(4)))
    add("b", noisy(1.56, range(4)))
    before = decide_between(home, "a-0", "b-0").data
    add("a", noisy(1.80, range(4, 12)))
    add("b", noisy(1.50, range(4, 12)))
    after = decide_between(home, "a-0", "b-0").data
    assert (after["outcome"], after["pairs"], after["look"]) == (before["outcome"], 4, 1)


def test_thresholds_are_fixed_by_the_first_look(home: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add("a", noisy(1.50, range(4)))
    add("b", noisy(1.5003, range(4)))
    options = ["--home", str(home), "--least", "3%"]
    assert cli._run(["law", "decide", "a-0", "b-0", *options]) == 0
    assert "too close: whatever the difference is, it is under 3 %" in " ".join(capsys.readouterr().out.split())
    assert cli._run(["law", "decide", "a-0", "b-0", "--home", str(home), "--least", "0.1%"]) == 2
    error = capsys.readouterr().err
    assert "3 % was fixed for this decision" in error
    assert len(error.splitlines()) == 1


def test_a_share_without_its_sign_and_an_arm_without_scores_are_refused(
    home: Path, add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    add("a", noisy(1.50, range(2)))
    add("b", noisy(1.53, range(2)))
    for bare in ("0.005", "0.5", "banana", "0%", "100%"):
        assert cli._run(["law", "decide", "a-0", "b-0", "--home", str(home), "--least", bare]) == 2
        assert f"--least: expected a share such as '0.5%', got '{bare}'" in capsys.readouterr().err
    with LabBook(home / "labbook.sqlite") as book:
        row = book.runs(status="done")[0]
        config = {**row["config"], "steps": 3}
        book.put_run(
            "p/trunk-0", program="p", kind="trunk", name="trunk", status="done", folder="x/trunk-0", config=config
        )
    with pytest.raises(UserError, match="p/trunk has none"):
        decide_between(home, "p/trunk", "b-0")


def test_the_noise_of_a_size_comes_from_all_repeated_runs_of_the_home(home: Path, add: Add) -> None:
    add("a", noisy(1.50, range(3)))
    add("b", noisy(1.53, range(3)))
    for letter in "cdef":
        add(letter, noisy(1.6, range(5)))
    found = decide_between(home, "a-0", "b-0").data
    ((_, entry),) = found["registry"].items()
    assert entry["freedom"] == 2 + 2 + 4 * 4
    assert found["freedom"] == 2 + 10, "two from the pairs, at most ten from the registry"


def test_arms_without_common_seeds_scores_or_differences_are_one_line(home: Path, add: Any) -> None:
    add("a", noisy(1.50, range(2)))
    add("b", noisy(1.50, range(2, 4)))
    add("c", noisy(1.50, range(2)), corpora=("other",))
    for pair, words in (
        (("a-0", "b-2"), "seeds that both arms have run"),
        (("a-0", "c-0"), "held-out scores"),
        (("a-0", "a-1"), "differ in their seeds only"),
        (("a-0", "zzz"), "expected a run of this home"),
    ):
        with pytest.raises(UserError, match=words):
            decide_between(home, *pair)
    with pytest.raises(UserError, match="--corpus: expected one of tiny"):
        decide_between(home, "a-0", "b-2", corpus="wiki")


def test_seeds_and_names_alone_make_no_other_recipe(make_trial: Callable[..., Stage]) -> None:
    one = make_trial(20)
    twin = replace(one, name="twin", seed=9, plan=replace(one.plan, seed=9), keep=(3,))
    assert seedless(one.to_dict()) == seedless(twin.to_dict())
    assert seedless(one.to_dict()) != seedless(replace(one, batch=8).to_dict())
    assert seedless(one.to_dict()) != seedless(replace(one, plan=replace(one.plan, row=64)).to_dict())
