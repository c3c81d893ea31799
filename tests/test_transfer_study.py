"""The transfer study as a command: what it trains, what it finds in a planted world, what it records and repeats."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from windtunnel import desk as desk_module
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.page import render
from windtunnel.report.studies import ValleyCurve, read_transfer, transfer_figure
from windtunnel.train.stage import Stage
from windtunnel.transfer_study import transfer
from windtunnel.transfer_tables import sentence

STUDIES = Path(__file__).parents[1] / "docs" / "studies"
TUNNEL = """
trials = 0
[tunnel.transfer]
factors = [1, 2, 4]
tokens = "25600"
seeds = 2
centre = { mup = 0.01, standard = 0.01 }
parametrizations = ["mup", "standard"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up, tiny_recipe) -> Path:
    made = tmp_path_factory.mktemp("transfer")
    write_made_up(made / "plain.jsonl", 300)
    (made / "tiny.toml").write_text(tiny_recipe(TUNNEL), encoding="utf-8")
    return made


def planted_loss(stage: Stage) -> float:
    """A world in which µP's best rate stays, the standard one's falls as 1/width, and loss falls with tokens and width."""
    best = 0.0117 if stage.parametrization.name == "mup" else 0.0117 * 32 / stage.shape.width
    octaves = math.log2(stage.optimizer.learning_rate / best)
    return (
        1.2
        + 0.02 * octaves**2
        + 0.05 * (32 / stage.shape.width)
        + 0.1 * math.log(1e6 / stage.tokens)
        + 1e-4 * (stage.seed % 7)
    )


@pytest.fixture
def trained(monkeypatch) -> list[Stage]:
    """The stages that are asked for; their results come from the planted world."""
    asked: list[Stage] = []

    def train(self, title, study, stages, prepared, **_: Any):
        asked.extend(stages)
        self.use(study, [stage.folder_name for stage in stages])
        return {
            stage.key: {
                "scores": {"plain": {"nats": planted_loss(stage) * 1000, "bytes": 1000}}, "tokens": stage.tokens,
                "flops": stage.flops, "seconds": {"step": 1.0},
            }
            for stage in stages
        }  # fmt: skip

    monkeypatch.setattr(desk_module.Desk, "train", train)
    return asked


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "tiny.toml", overrides)


def test_a_planted_world_is_read_off_and_recorded(folder, tmp_path, trained):
    view = transfer(recipe(folder), tmp_path, quiet=True)
    fact = view.data["axes"]["width"]
    mup, standard = (fact["parametrizations"][name] for name in ("mup", "standard"))
    assert mup["verdict"] == "carries over"
    assert mup["drift"]["value"] == pytest.approx(0, abs=0.01)
    assert standard["verdict"] == "does not carry over"
    assert standard["drift"]["value"] == pytest.approx(-4, abs=0.01)
    assert standard["regret"]["value"] == pytest.approx(0.02 * 4, abs=2e-3)
    assert standard["slope"]["value"] == pytest.approx(0.1, rel=1e-3)
    assert standard["compute"]["value"] == pytest.approx(math.expm1(0.8), rel=0.05)
    assert [v["label"] for v in mup["values"]] == ["width 32", "width 64", "width 128"]
    assert fact["cost"]["runs"] == len({stage.key for stage in trained})
    assert fact["cost"]["flops"] == pytest.approx(sum(one.flops for one in {s.key: s for s in trained}.values()))
    share = f"{100 * fact['cost']['flops'] / fact['cost']['target']:.3g} % of the target run; windtunnel report tiny"
    assert share in str(view.parts[-1])
    book = LabBook(Home(tmp_path).labbook, readonly=True)
    assert book.fact("tiny", "transfer", "width") == json.loads(json.dumps(fact))
    book.close()
    (file,) = (Home(tmp_path).program("tiny") / "studies").glob("transfer-width-*.json")
    assert read_json(file) == json.loads(json.dumps(fact))


def test_every_trial_is_asked_for_once_and_a_second_call_asks_for_the_same(folder, tmp_path, trained):
    transfer(recipe(folder), tmp_path, quiet=True, axes=["width", "depth", "batch", "horizon"])
    first = [stage.key for stage in trained]
    assert len(first) == len(set(first))
    trained.clear()
    transfer(recipe(folder), tmp_path, quiet=True, axes=["width", "depth", "batch", "horizon"])
    assert [stage.key for stage in trained] == first


def test_rules_and_the_horizons_own_slope(folder, tmp_path, trained):
    view = transfer(
        recipe(folder, "tunnel.transfer.horizon_exponent=0.25", 'tunnel.transfer.parametrizations=["mup"]'),
        tmp_path, quiet=True, axes=["horizon", "batch"],
    )  # fmt: skip
    batch, horizon = view.data["axes"]["batch"], view.data["axes"]["horizon"]
    # The planted best rate follows neither batch nor tokens, so the rules' factors show as drift against them.
    assert batch["parametrizations"]["mup"]["drift"]["value"] == pytest.approx(-2, abs=0.01)
    assert horizon["parametrizations"]["mup"]["drift"]["value"] == pytest.approx(1, abs=0.01)
    assert batch["rule"] == "base rate × √factor"
    assert horizon["rule"] == "base rate / factor^0.25"
    assert "after 51.2k and 102k tokens" in horizon["parametrizations"]["mup"]["slope"]["source"]
    assert horizon["parametrizations"]["mup"]["slope"]["value"] == pytest.approx(0.1, rel=1e-2)


def test_each_parametrization_takes_its_own_tables_rules_and_the_record_says_which(folder, tmp_path, trained):
    asked = recipe(folder, 'tunnel.transfer.parametrizations=["mup", "completep"]')
    axes = transfer(asked, tmp_path, quiet=True, axes=["batch", "horizon"]).data["axes"]
    assert axes["horizon"]["parametrizations"]["mup"]["rule"] == "base rate × 1"
    assert (
        axes["horizon"]["parametrizations"]["completep"]["rule"] == "base rate / factor^0.3, weight decay / factor^0.7"
    )
    assert axes["batch"]["rule"] == (
        "mup: base rate × √factor; completep: base rate × √factor, weight decay × √factor, epsilon / factor^0.5, "
        "the moments' half-life / factor^1"
    )
    assert axes["batch"]["parametrizations"]["completep"]["values"][1]["factors"]["half_life"] == 0.5
    largest = {s.parametrization.name: s.optimizer for s in trained if s.batch == 4 * trained[0].batch}
    assert largest["mup"].beta2 == 0.95
    assert largest["completep"].beta2 == pytest.approx(0.95**4, abs=1e-4)
    assert transfer(asked, tmp_path, quiet=True, axes=["batch"]).data["axes"]["batch"]["key"] == axes["batch"]["key"]
    stated = recipe(
        folder, 'tunnel.transfer.parametrizations=["mup", "completep"]', 'tunnel.transfer.batch_rule="none"'
    )
    other = transfer(stated, tmp_path, quiet=True, axes=["batch"]).data["axes"]["batch"]
    assert other["key"] != axes["batch"]["key"]
    assert other["rule"] == "base rate × 1"


def test_rules_for_weight_decay_are_told_apart_in_a_world_where_the_timescale_is_kept(folder, tmp_path, monkeypatch):
    """Planted: a step shrinks a matrix best by one share at any width, by twice that at twice the batch."""

    def train(self, title, study, stages, prepared, **_: Any):
        self.use(study, [stage.folder_name for stage in stages])
        out = {}
        for stage in stages:
            rate = stage.optimizer.learning_rate * (
                32 / stage.shape.width if stage.parametrization.name == "mup" else 1
            )
            best = 0.001 * stage.batch / 4
            loss = 1.5 + 0.01 * math.log2(rate * stage.optimizer.weight_decay / best) ** 2 - 1e-8 * stage.tokens
            scores = {"plain": {"nats": loss * 1000, "bytes": 1000}}
            out[stage.key] = {"scores": scores, "tokens": stage.tokens, "flops": stage.flops, "seconds": {"step": 1.0}}
        return out

    monkeypatch.setattr(desk_module.Desk, "train", train)
    asked = recipe(
        folder, "optimizer.lr=0.01", 'tunnel.transfer.over="weight_decay"', 'tunnel.transfer.spacing="2"',
        "tunnel.transfer.centre={ mup = 0.1, standard = 0.1 }",
    )  # fmt: skip
    found = transfer(asked, tmp_path, quiet=True, axes=["width", "batch"]).data["axes"]
    rules = {
        (axis, name): {r["name"]: (r["exponent"], r["regret_share"]["value"]) for r in part["rules"]}
        for axis, fact in found.items() for name, part in fact["parametrizations"].items()
    }  # fmt: skip
    wide = rules["width", "mup"]
    assert {name: exponent for name, (exponent, _) in wide.items()} == {
        "one weight decay": 0, "timescale τ kept": pytest.approx(1), "1/√width a step": pytest.approx(0.5),
    }  # fmt: skip
    assert wide["timescale τ kept"][1] == pytest.approx(0, abs=1e-6)
    assert wide["one weight decay"][1] * 1.5 == pytest.approx(0.04, rel=0.02)  # two octaves off, 0.01 each squared
    assert rules["width", "standard"]["one weight decay"][1] == pytest.approx(0, abs=1e-6)
    assert rules["batch", "mup"]["timescale τ kept"] == (pytest.approx(0.5), pytest.approx(0, abs=1e-6))
    book = LabBook(Home(tmp_path).labbook, readonly=True)
    page = render(book, "tiny")
    book.close()
    assert "rule for weight decay" in page
    assert "arXiv 2405.13698" in page


def test_a_world_in_which_no_weight_decay_is_best_ends_the_grid_and_is_not_called_undecided(
    folder, tmp_path, monkeypatch
):
    """Planted: every weight decay costs in proportion to itself, so that the best of any grid is its lowest."""
    asked_of: list[Stage] = []

    def train(self, title, study, stages, prepared, **_: Any):
        self.use(study, [stage.folder_name for stage in stages])
        asked_of.extend(stages)
        return {
            stage.key: {
                "scores": {"plain": {"nats": 1500 + 10 * stage.optimizer.weight_decay, "bytes": 1000}},
                "tokens": stage.tokens, "flops": stage.flops, "seconds": {"step": 1.0},
            }
            for stage in stages
        }  # fmt: skip

    monkeypatch.setattr(desk_module.Desk, "train", train)
    asked = recipe(
        folder, "optimizer.lr=0.01", 'tunnel.transfer.over="weight_decay"', 'tunnel.transfer.spacing="2"',
        'tunnel.transfer.parametrizations=["mup"]', "tunnel.transfer.centre={ mup = 0.1 }",
    )  # fmt: skip
    view = transfer(asked, tmp_path, quiet=True, axes=["width"])
    part = view.data["axes"]["width"]["parametrizations"]["mup"]
    assert part["verdict"] == "carries over"
    assert {v["edge"] for value in part["values"] for v in value["valleys"]} == {"none"}
    assert all("does nothing in a run of that length" in note for note in part["notes"])
    share = min(s.optimizer.weight_decay * s.optimizer.learning_rate * s.steps for s in asked_of)
    assert 0.0025 < share <= 0.0101, "the grid ends where a weight loses less than 1 % over the run, and not far below"
    assert all(rule["regret_share"]["value"] < 1e-3 for rule in part["rules"])
    assert "drift" not in sentence(part)


def test_the_axis_of_sizes_takes_the_proxies(folder, tmp_path, trained):
    view = transfer(recipe(folder, 'tunnel.transfer.parametrizations=["mup"]'), tmp_path, quiet=True, axes=["size"])
    values = view.data["axes"]["size"]["parametrizations"]["mup"]["values"]
    assert [(v["label"], v["width"]) for v in values] == [("0.02M", 32), ("0.05M", 48), ("0.1M", 64)]


@pytest.mark.parametrize(
    ("overrides", "axes", "words"),
    [
        ((), ["length"], "--axes: expected some of width, depth, batch, horizon, size, got 'length'"),
        (("tunnel.transfer.factors=[2, 4]",), [], "expected rising factors from 1, got 2, 4"),
        (('tunnel.transfer.parametrizations=["mup", "mup"]',), [], "expected each value once, got mup, mup"),
        (("tunnel.transfer.width=40",), [], "--set tunnel.transfer.width: expected a multiple of the head dimension 16"),
        (('tunnel.transfer.centre={ mop = 0.1 }',), [], "expected 'mup'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(folder, tmp_path, trained, overrides, axes, words):
    with pytest.raises((UserError, RecipeError)) as error:
        transfer(recipe(folder, *overrides), tmp_path, quiet=True, axes=axes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("transfer-*.toml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_valid_and_say_command_time_and_expectation_first(path):
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert head[0] == f"# windtunnel tunnel transfer docs/studies/{path.name}"
    assert "minutes" in head[1]
    assert "Expect" in head[1]
    found = load_recipe(path)
    assert found.tunnel is not None
    assert found.tunnel.transfer is not None
    assert found.tunnel.transfer.seeds >= 3


def test_the_report_draws_one_curve_a_size_and_marks_each_best_rate(folder, tmp_path, trained):
    transfer(recipe(folder), tmp_path, quiet=True)
    book = LabBook(Home(tmp_path).labbook, readonly=True)
    html = render(book, "tiny")
    (axis,) = read_transfer(book, "tiny")
    book.close()
    section = html.split('<section id="transfer">')[1].split("</section>")[0]
    figures = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert len(figures) == 4  # two parametrizations, each for a page and for a phone
    for part, figure in zip(axis.parts, figures[::2], strict=True):
        assert len(re.findall(r'<path d="[^"]*" class="ql', figure)) == 3
        assert [curve.name for curve in part.curves] == ["width 32", "width 64", "width 128"]
        feet = [float(x) for x in re.findall(r'<line x1="([\d.]+)"[^>]*class="ql\d"', figure)]
        assert len(feet) == 3
        if part.parametrization == "mup":
            assert max(feet) - min(feet) < 2
        else:
            assert feet == sorted(feet, reverse=True)
            assert max(feet) - min(feet) > 50
    assert "carries over" in section
    assert "does not carry over" in section
    assert "<dfn>regret</dfn>" in section
    assert "<dfn>parametrization</dfn>" in section


def test_a_figure_survives_what_diverged_and_what_lies_far_above():
    curves = [
        ValleyCurve("one", ((0.01, 0.0), (0.02, 0.5), (0.04, 900.0)), (0.08,), 0.01, edge=True),
        ValleyCurve("none", (), (0.01,), None),
    ]
    for width in (720, 340):
        figure = transfer_figure(curves, "width", width)
        assert figure.count('class="cross"') == 4
        assert figure.count('class="hollow"') == 1
        assert "nan" not in figure
