"""The verb ``law scale``: a law for each corpus from one study, in each convention, with what the design cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windtunnel import cli, scale_study
from windtunnel.base.artefact import read_json
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.home import Home
from windtunnel.laws.corpora import averaged, best_use, cost_between, law_of
from windtunnel.laws.fit import LawError
from windtunnel.laws.loss import LossLaw
from windtunnel.laws.optimum import optimum
from windtunnel.laws.points import Point
from windtunnel.model.family import FAMILIES
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.report.page import render
from windtunnel.scale_study import scale, study_points
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Stage, Start

RECIPE = """
name = "p"
[corpus.wiki]
source = "plain.jsonl"
[corpus.code]
source = "plain.jsonl"
[corpus.extra]
source = "plain.jsonl"
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.2M"
row = 32
[tunnel]
proxies = ["0.02M", "0.05M", "0.1M"]
tokens = ["2560", "3840", "5120"]
trials = 0
[trunk]
tokens = "7680"
batch = "128"
mixture = { wiki = 0.75, code = 0.25 }
[branch.same]
tokens = "20%"
"""
CORPORA = {"wiki": (1.2, 0.30), "code": (0.8, 0.40), "extra": (1.0, 0.35)}
"""Level and alpha of each planted corpus."""
SIZES = ("0.02M", "0.05M", "0.1M", "0.2M")
LENGTHS = (2_000, 4_000, 8_000)


def loss(corpus: str, n: float, d: float) -> float:
    level, alpha = CORPORA[corpus]
    return level * (0.4 + 5.0 * n**-alpha + 9.0 * d**-0.3)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "p.toml").write_text(RECIPE)
    (tmp_path / "plain.jsonl").write_text('{"text": "some words"}')
    return load_recipe(str(tmp_path / "p.toml"))


@pytest.fixture
def fill(tmp_path: Path, make_trunk: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A home with the finished scaling study of a planted world; nothing is trained."""
    monkeypatch.setattr(scale_study, "run", lambda *_, **__: None)

    def write(sizes: Sequence[str] = SIZES, seeds: Sequence[int] = (1,), diverged: str = "") -> Path:
        home = tmp_path / "home"
        used = []
        with LabBook(home / "labbook.sqlite") as book:
            for size in sizes:
                for seed in seeds:
                    shape = FAMILIES["tiny"].shape(size, 320)
                    trunk = replace(make_trunk(LENGTHS[-1]), name=f"proxy-{size}-{seed}", shape=shape, seed=seed)
                    used += [put(book, trunk, "", size == diverged), *(branch(book, trunk, at) for at in LENGTHS)]
            book.put_fact("p", "used", "scaling", used)
        return home

    def put(book: LabBook, stage: Stage, parent: str, failed: bool = False) -> str:
        book.put_run(
            f"p/{stage.folder_name}", program="p", kind=stage.kind, name=stage.name, study="scaling", parent=parent,
            status="failed" if failed else "done", reason="not finite" if failed else "", steps=stage.steps, flops=stage.flops,
            folder=f"programs/p/runs/{stage.folder_name}", config=stage.to_dict(), tokens=stage.tokens,
        )  # fmt: skip
        return stage.folder_name

    def branch(book: LabBook, trunk: Stage, at: int) -> str:
        stage = replace(
            trunk, name=f"{trunk.name}-{at}", kind="decay", start=Start(trunk.key, at), steps=at + at // 4, open_ended=False,
            schedule=Schedule(2, at, at // 4),
        )  # fmt: skip
        put(book, stage, f"p/{trunk.folder_name}")
        for corpus in CORPORA:
            value = loss(corpus, stage.shape.body, stage.tokens) * (
                1 + 1e-4 * math.sin(at + stage.shape.body + stage.seed)
            )
            book.put_score(f"p/{stage.folder_name}", corpus, "nats_per_byte", value, "nats per UTF-8 byte", 100)
        return stage.folder_name

    return write


def test_every_corpus_and_the_averages_get_their_law_and_their_map(fill: Callable[..., Path], recipe: Recipe) -> None:
    home = fill(seeds=(1, 2))
    data = scale(recipe, home, budget="1e13").data
    laws = {one["corpus"]: one for one in data["laws"]}
    assert set(laws) == {"wiki", "code", "extra", "average", "all held-out"}
    for corpus, (level, alpha) in CORPORA.items():
        constants = laws[corpus]["law"]["constants"]
        assert constants["alpha"] == pytest.approx(alpha, abs=0.05)
        assert constants["L0"] == pytest.approx(0.4 * level, rel=0.1)
        assert abs(laws[corpus]["held_out"]["additive"]) < 0.005
        low, high = laws[corpus]["tokens_per_parameter"][1:]
        truth = LossLaw("additive", {"C_N": 5.0, "alpha": alpha, "C_D": 9.0, "beta": 0.3, "L0": 0.4}, (1, 1), (1, 1))
        assert low / 1.3 < truth.tokens_per_parameter(1e13) < high * 1.3
        assert "8 trunks resampled" in laws[corpus]["interval"]
    assert laws["code"]["tokens_per_parameter"][0] > laws["wiki"]["tokens_per_parameter"][0]
    folder = Home(home).program("p") / "laws"
    assert len(list(folder.glob("scale-*.svg"))) == 5
    assert LossLaw.from_dict(read_json(folder / "scale-wiki.json")).name == "wiki"
    weighted = [0.75 * p["loss"] for p in laws["wiki"]["points"]]
    assert laws["average"]["points"][0]["loss"] == pytest.approx(weighted[0] + 0.25 * laws["code"]["points"][0]["loss"])


def test_trunks_with_branches_cost_less_than_independent_runs(fill: Callable[..., Path], recipe: Recipe) -> None:
    data = scale(recipe, fill()).data
    trunk, decays, whole = LENGTHS[-1], sum(at // 4 for at in LENGTHS), sum(at + at // 4 for at in LENGTHS)
    assert data["spent"] / data["independent"] == pytest.approx((trunk + decays) / whole)
    assert len(data["laws"][0]["points"]) == 12


def test_conventions_change_n_and_the_price_of_a_token(fill: Callable[..., Path], recipe: Recipe) -> None:
    home = fill()
    plain, head, exact = (
        scale(recipe, home, counts=counts, flops=flops, budget="1e13").data["laws"][0]
        for counts, flops in (("body", "6ND"), ("body+head", "6ND"), ("body", "exact"))
    )
    shape = FAMILIES["tiny"].shape("0.02M", 320)
    assert plain["points"][0]["parameters"] == shape.body
    assert head["points"][0]["parameters"] == shape.body + 320 * shape.width
    assert head["law"]["counts"] == "body+head"
    assert 6 * plain["parameters"] * plain["tokens"] == pytest.approx(1e13)
    assert 6 * exact["parameters"] * exact["tokens"] < 0.9e13, "head and attention take their share of the budget"
    assert plain["law"] == exact["law"]
    facts = LabBook(home / "labbook.sqlite", readonly=True).facts("p", "scale")
    assert set(facts) == {"body, 6ND", "body+head, 6ND", "body, exact"}


def test_what_a_design_cannot_tell_is_said(
    fill: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    home = fill(sizes=SIZES[:2])
    view = scale(recipe, home)
    assert any("2 sizes: the floor and the exponents lean on a weak prior" in text for text in view.data["warnings"])
    assert any("the sizes span a factor of" in text for text in view.data["warnings"])
    assert "2 trunks are too few to resample" in view.data["laws"][0]["interval"]
    assert cli._run(["law", "scale", str(recipe.base / "p.toml"), "--home", str(home), "--flops", "6NP"]) == 2
    assert "law.flops: expected one of 6ND, exact" in capsys.readouterr().err


def test_one_size_or_no_scores_are_one_line(fill: Callable[..., Path], recipe: Recipe) -> None:
    home = fill(sizes=SIZES[:1])
    with pytest.raises(LawError, match="expected at least 2 sizes, got 1"):
        scale(recipe, home)
    with LabBook(home / "labbook.sqlite") as book:
        book.put_fact("p", "used", "scaling", [])
    with pytest.raises(UserError, match="expected scored branches of 'p', found none"):
        scale(recipe, home)


def test_a_failed_run_is_named_and_left_out(fill: Callable[..., Path], recipe: Recipe) -> None:
    home = fill(diverged="0.1M")
    book = LabBook(home / "labbook.sqlite", readonly=True)
    _, _, left = study_points(book, "p", "body")
    assert left == ["proxy-0.1M-1: not finite"]


def test_below_six_trunks_the_optimum_has_intervals_that_cover_planted_worlds() -> None:
    """Three trunks of one seed each; noise of .2 %, half of it shared by the branches of a trunk."""
    truth = LossLaw("additive", {"C_N": 5.0, "alpha": 0.3, "C_D": 9.0, "beta": 0.3, "L0": 0.4}, (1, 1), (1, 1))
    sizes, lengths, budget = (2.4e4, 5.3e4, 9.5e4), (4e5, 8e5, 1.6e6), 1e13
    n, d = truth.optimum(budget)
    inside, widths = [], []
    for draw in range(20):
        rng = np.random.default_rng(draw)
        points: list[Point] = []
        for size in sizes:
            level = 0.0014 * rng.normal()
            points += [
                Point(size, length, truth.predict(size, length) * math.exp(level + 0.0014 * rng.normal()), f"{size}")
                for length in lengths
            ]
        one = law_of("wiki", points, budget)
        assert sum(one.weights.values()) == pytest.approx(1)
        assert one.use.sizes90[0] < one.best[0] < one.use.sizes90[1]
        assert one.use.ratio[1] < one.use.ratio[0] < one.use.ratio[2]
        inside.append(
            one.use.sizes90[0] <= n <= one.use.sizes90[1] and one.use.lengths90[0] <= d <= one.use.lengths90[1]
        )
        widths.append(math.log(one.use.sizes90[1] / one.use.sizes90[0]) / 2)
    assert 15 <= sum(inside) <= 20
    assert np.mean(widths) < 1.0


def test_the_interval_grows_with_the_budget_and_forms_are_weighed_by_sizes_left_out() -> None:
    truth = LossLaw("coupled", {"N_c": 5e5, "D_c": 1.2e7, "alpha_N": 0.2, "alpha_D": 0.22}, (1, 1), (1, 1))
    points = [
        Point(n, d, truth.predict(n, d, force=True), f"{n}")
        for n in (2.4e4, 5.3e4, 9.5e4, 2e5)
        for d in (4e5, 8e5, 1.6e6)
    ]
    near, far = law_of("wiki", points, 1e13), law_of("wiki", points, 1e16)
    assert max(near.weights, key=near.weights.__getitem__) == "coupled"
    assert near.weights["additive"] < 0.2
    assert near.best[0] == pytest.approx(truth.optimum(1e13)[0], rel=0.15)
    assert near.loss(1e5, 1e6) == pytest.approx(truth.predict(1e5, 1e6, force=True), rel=0.005)
    assert far.use.sizes90[1] / far.use.sizes90[0] > near.use.sizes90[1] / near.use.sizes90[0]


def test_the_law_says_which_batch_and_base_learning_rate_it_is_for(
    fill: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    home = fill()
    data = scale(recipe, home).data
    assert {(one["law"]["batch"], one["law"]["base_lr"]) for one in data["laws"]} == {(128, 0.01)}
    words = "for batches of 128 tokens at a base learning rate of 0.01"
    assert cli._run(["law", "scale", str(recipe.base / "p.toml"), "--home", str(home)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    path = Home(home).program("p") / "laws" / "scale-wiki.json"
    assert cli._run(["law", "predict", "--law", str(path), "--flops", "1e13"]) == 0
    assert words in capsys.readouterr().out
    assert cli._run(["law", "predict", "--law", "minicpm-average", "--flops", "1e21"]) == 0
    assert "base learning rate" not in capsys.readouterr().out, "the paper's fits are for no one setting"


def test_exact_costs_pass_through_the_known_shapes() -> None:
    cost = cost_between({1e4: 1e5, 1e5: 8e5})
    assert (cost(1e4), cost(1e5)) == pytest.approx((1e5, 8e5))
    assert cost(1e6) == pytest.approx(6.4e6)
    law = LossLaw("additive", {"C_N": 5.0, "alpha": 0.3, "C_D": 9.0, "beta": 0.3, "L0": 0.4}, (1, 1), (1, 1))
    n, d = best_use(law, 1e13, lambda size: 6 * size)
    assert (n, d) == pytest.approx(law.optimum(1e13), rel=0.03)
    with pytest.raises(LawError, match="expected at least two sizes"):
        cost_between({1e4: 1.0})


def test_a_budget_that_pays_for_use_too_goes_to_a_smaller_model_trained_longer_as_by_brute_force() -> None:
    truth = LossLaw("additive", {"C_N": 5.0, "alpha": 0.3, "C_D": 9.0, "beta": 0.25, "L0": 0.4}, (1, 1), (1, 1))
    budget, previous = 1e13, truth.optimum(1e13)
    for served in (1e6, 1e7, 1e8):
        n, d = best_use(truth, budget, served=served)
        assert 6 * n * d + 2 * n * served == pytest.approx(budget), "all of the budget is spent"
        known = optimum(truth, budget, inference_tokens=served)
        assert (n, d) == pytest.approx((known.parameters, known.tokens)), "law predict says the same"
        sizes = np.geomspace(n / 50, n * 50, 20001)
        tokens = budget / 6 / sizes - served / 3
        assert truth.predict(n, d, force=True) <= truth.losses(sizes[tokens > 0], tokens[tokens > 0]).min() * (1 + 1e-4)
        assert n < previous[0]
        assert d / n > previous[1] / previous[0]
        previous = n, d
    exact = best_use(truth, budget, lambda size: 8 * size, served=1e7)
    assert 8 * exact[0] * exact[1] + 8 / 3 * exact[0] * 1e7 == pytest.approx(budget)
    with pytest.raises(LawError, match="expected tokens in use that"):
        best_use(truth, budget, served=1e15)
    with pytest.raises(LawError, match="expected tokens in use that"):
        best_use(truth, budget, lambda size: 8 * size, served=1e15)
    for served in np.geomspace(1e9, 1e13, 30):  # near what a budget can pay for nothing becomes negative
        for cost in (None, lambda size: 8 * size):
            try:
                n, d = best_use(truth, budget, served=served) if cost is None else best_use(truth, budget, cost, served)
            except LawError:
                continue
            assert min(n, d) > 0


def test_law_scale_gives_the_best_use_with_inference_beside_that_without(
    fill: Callable[..., Path], recipe: Recipe
) -> None:
    home = fill()
    plain, paid = (scale(recipe, home, budget="1e13", inference_tokens=use) for use in (None, "20M"))
    assert "with_use" not in plain.data["laws"][0]
    assert len(paid.parts) == len(plain.parts) + 1
    for alone, one in zip(plain.data["laws"], paid.data["laws"], strict=True):
        found = one["with_use"]
        assert {key: one[key] for key in ("parameters", "tokens")} == {
            key: alone[key] for key in ("parameters", "tokens")
        }
        assert found["inference_tokens"] == 2e7
        assert found["parameters"] < one["parameters"]
        assert 6 * found["parameters"] * found["tokens"] + 4e7 * found["parameters"] == pytest.approx(1e13)
        for key in ("parameters", "tokens"):
            low, high = found[f"{key}90"]
            assert low < found[key] < high
    maps = Home(home).program("p") / "laws"
    assert "with 20M tokens in use" in (maps / "scale-wiki.svg").read_text(encoding="utf-8")


def test_the_band_of_the_map_is_the_interval_of_each_budget_and_not_of_one() -> None:
    points = [Point(n, d, loss("wiki", n, d), f"t{n}") for n in (1e4, 3e4, 1e5) for d in (1e5, 3e5, 9e5)]
    spent = [6 * p.parameters * p.tokens for p in points]
    one = law_of("wiki", points, 1e12)
    assert [n for n, _, _ in one.band] == [n for n, _ in one.line]
    for index, budget in ((0, min(spent) / 30), (-1, max(spent) * 30)):
        _, low, high = one.band[index]
        ratio, least, most = law_of("wiki", points, budget).use.ratio
        d = one.line[index][1]
        assert d / one.line[index][0] == pytest.approx(ratio)
        assert (low, high) == pytest.approx((d * least / ratio, d * most / ratio))
    widths = [math.log(high / low) for _, low, high in one.band]
    assert widths[-1] > 1.2 * min(widths), "it opens with the distance from the points"


def test_points_of_other_runs_are_not_averaged() -> None:
    one, other = Point(1e4, 1e5, 2.0, "a"), Point(1e4, 2e5, 2.0, "a")
    with pytest.raises(LawError, match="the same runs in the same order"):
        averaged({"x": [one], "y": [other]}, {"x": 1.0, "y": 1.0})
    with pytest.raises(LawError, match="expected the same runs"):
        averaged({"x": [one], "y": []}, {"x": 1.0, "y": 1.0})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"budget": "abc"}, "--budget"),
        ({"counts": "foo"}, "body"),
        ({"flops": "7ND"}, "6ND"),
        ({"inference_tokens": "-3"}, "--inference-tokens"),
    ],
)
def test_a_wrong_budget_or_convention_is_refused_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path, wrong: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        scale(recipe, tmp_path / "fresh", **wrong)
    assert not (tmp_path / "fresh").exists()


def test_a_diverged_point_among_the_proxies_is_refused() -> None:
    points: list[Any] = [Point(n, d, loss("wiki", n, d), f"t{n}") for n in (1e4, 3e4, 1e5) for d in (1e5, 3e5)]
    with pytest.raises(LawError, match="leave diverged runs out"):
        law_of("wiki", [*points, Point(2e5, 1e5, math.inf, "bad")], 1e12)
    twice = Point(1e4, 1e5, 3 * loss("wiki", 1e4, 1e5), "other", 2)
    with pytest.raises(LawError, match="leave the diverged run out"):
        law_of("wiki", [*points, twice], 1e12)


def test_the_report_shows_the_laws_by_corpus_with_their_map(fill: Callable[..., Path], recipe: Recipe) -> None:
    home = fill()
    scale(recipe, home)
    page = render(LabBook(home / "labbook.sqlite", readonly=True), "p")
    section = page[page.index('id="scale"') :]
    assert "The law corpus by corpus" in page
    assert "4 trunks gave 12 points at" in section
    assert section.count("best use of compute") >= 1
    for corpus in CORPORA:
        assert f"<td>{corpus}</td>" in section
