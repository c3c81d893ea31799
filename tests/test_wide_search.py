"""A search over kinds and numbers at once, really trained: what it chooses is what the proxies and the target are trained with."""

from __future__ import annotations

import pytest

from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.pipeline import run
from windtunnel.recipe import load_recipe
from windtunnel.train.stage import Stage
from windtunnel.tunnel.space import REFERENCE_RATE

TUNNEL = """
trials = 14
trial_tokens = "2560"
per_round = 4

[tunnel.space]
qk_norm = [false, true]
optimizer = ["adamw", "muon"]
decay = ["plain", "independent"]
warmup = [0.02, 0.3]
beta2 = [0.9, 0.99]
"""


@pytest.mark.slow
def test_norms_optimizers_forms_of_decay_warmups_and_memories_compete_and_the_winner_is_the_targets(
    tmp_path, tiny_recipe, write_made_up, trained
):
    write_made_up(tmp_path / "plain.jsonl", 400)
    (tmp_path / "wide.toml").write_text(tiny_recipe(TUNNEL, name="wide"), encoding="utf-8")
    run(load_recipe(tmp_path / "wide.toml"), tmp_path / "home", quiet=True, until="trunk")
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    fact = book.fact("wide", "study", "search")
    stages = {row["name"]: Stage.from_dict(row["config"]) for row in book.runs(program="wide", status="done")}
    book.close()
    assert trained == list(stages)

    losses = [trial["loss"] for trial in fact["trials"]]
    assert len(set(losses)) == 14
    assert all(0 < loss < 6 for loss in losses)
    for trial in fact["trials"]:
        stage = stages[f"trial-{trial['number']:03d}"]
        assert as_trained(stage) == {name: trial[name] for name in ("qk_norm", "optimizer", "decay", "beta2")}
        assert stage.schedule.warmup == max(1, round(trial["warmup"] * stage.steps))
    for name in ("qk_norm", "optimizer", "decay"):
        assert len({trial[name] for trial in fact["trials"]}) == 2

    choices = fact["choices"]
    best = min(fact["trials"], key=lambda trial: trial["loss"])
    assert choices == {name: best[name] for name in choices}
    kept = [stage for name, stage in stages.items() if not name.startswith("trial")]
    assert {stage.name.partition("-")[0] for stage in kept} == {"proxy", "trunk"}
    for stage in kept:
        assert as_trained(stage) == {name: choices[name] for name in ("qk_norm", "optimizer", "decay", "beta2")}
    # A finished model has 60 steps, of which the searched share warms up.
    assert stages["trunk"].schedule.warmup == max(1, round(choices["warmup"] * 60))


def as_trained(stage: Stage) -> dict[str, object]:
    """The searched values as a stage has them; its weight decay is as strong as the recipe's at the reference rate."""
    optimizer = stage.optimizer
    assert optimizer.weight_decay == pytest.approx(0.1 * (REFERENCE_RATE if optimizer.decay == "independent" else 1))
    return {
        "qk_norm": stage.shape.qk_norm, "optimizer": optimizer.kind, "decay": optimizer.decay, "beta2": optimizer.beta2
    }  # fmt: skip
