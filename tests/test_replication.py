"""The replication as a command: verdicts in planted worlds, one claim alone, a second call, the page and the Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windtunnel import desk as desk_module
from windtunnel import replication, replication_data, replication_design, replication_sft
from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.finishing import VERBS
from windtunnel.home import Home
from windtunnel.laws.curve_law import Curve
from windtunnel.laws.design import rates_of
from windtunnel.model.family import FAMILIES
from windtunnel.recipe import Recipe, load_recipe
from windtunnel.replication import replicate
from windtunnel.replication_claims import CLAIMS
from windtunnel.report.replication import lines_figure
from windtunnel.train.stage import Stage
from windtunnel.tunnel.claims import ELSEWHERE
from windtunnel.tunnel.replica import Scale

RECIPE = """
name = "again"
seed = 3
[corpus.plain]
source = "plain.jsonl"
heldout = 0.1
[corpus.chats]
source = "plain.jsonl"
user = "Go on."
assistant = "{{ text[:80] }}"
heldout = 0.1
[corpus.exact]
source = "made:exact/400"
messages = "messages"
heldout = 0.1
heldout_by = "key"
minimum_characters = 8
clean = { near = false }
[tokenizer]
vocab = 320
[model]
family = "tiny"
size = "0.02M"
row = 64
[optimizer]
lr = 0.01
[trunk]
tokens = "7680"
batch = "128"
mixture = { plain = 1 }
[branch.same]
tokens = "10%"
[branch.better]
tokens = "10%"
mixture = { plain = 0.7, chats = 0.2, exact = 0.1 }
[branch.chat]
kind = "sft"
parent = "better"
mixture = { chats = 0.5, exact = 0.5 }
"""
CORPORA = ("plain", "chats", "exact")
World = Callable[[Stage], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_made_up) -> Path:
    made = tmp_path_factory.mktemp("replicate")
    write_made_up(made / "plain.jsonl", 300)
    (made / "again.toml").write_text(RECIPE, encoding="utf-8")
    return made


def summed(stage: Stage) -> tuple[float, float]:
    """The sum of the rate's factors, and their mean over about the last fiftieth of a 40N run."""
    whole, recent = 0.0, 0.0
    for step in range(1, stage.steps + 1):
        factor = stage.schedule.factor(step)
        whole += factor
        recent += (factor - recent) / 5
    return whole, recent


def papers_world(stage: Stage) -> float:
    """Loss falls as a power of the summed rate and of size; a high rate at the end costs; optimum at η = .0125 for all sizes."""
    whole, recent = summed(stage)
    rate = stage.optimizer.learning_rate / 0.0125
    loss = 0.6 + 1.2 * whole**-0.4 + 6.0 * stage.shape.body**-0.4 + 0.12 * recent + 0.01 * math.log2(rate) ** 2
    return loss * (1 + 2e-4 * ((stage.seed // 1000) % 3))


def flat_world(stage: Stage) -> float:
    """Neither data nor schedule matter, and the best rate falls with size."""
    rate = stage.optimizer.learning_rate / (0.0125 * 24000 / stage.shape.body)
    return 1.0 + 0.01 * math.log2(rate) ** 2 + 1e-6 * ((stage.seed // 1000) % 3)


def additive_world(times: float) -> World:
    """L(N, D) = A·N^−.4 + B·D^−.4 + .6 whatever the schedule, with A such that the smaller model meets the larger one at 40N
    (tiny's is 10 tokens a parameter) for that many times its compute."""
    small, large = (float(FAMILIES["tiny"].shape(size, 320).body) for size in ("0.02M", "0.05M"))
    enough = times * 10 * large * large / small
    slope = 12.0 * ((10 * large) ** -0.4 - enough**-0.4) / (small**-0.4 - large**-0.4)

    def world(stage: Stage) -> float:
        rate = stage.optimizer.learning_rate / 0.0125
        loss = 0.6 + slope * stage.shape.body**-0.4 + 12.0 * stage.tokens**-0.4 + 0.01 * math.log2(rate) ** 2
        return loss * (1 + 2e-4 * ((stage.seed // 1000) % 3))

    return world


def exponential_world(stage: Stage) -> float:
    """Data teach at an exponential pace, and soon nothing."""
    rate = stage.optimizer.learning_rate / 0.0125
    loss = 1.0 + math.exp(-stage.tokens / (6.0 * stage.shape.body)) + 0.01 * math.log2(rate) ** 2
    return loss * (1 + 2e-4 * ((stage.seed // 1000) % 3))


def worn_out_world(stage: Stage) -> float:
    """A trunk that goes on past the paper's 60N has lost a tenth by it; a cosine has not."""
    worn = stage.schedule.kind == "wsd" and stage.tokens > 15 * stage.shape.body
    return papers_world(stage) * (1.1 if worn else 1.0)


@pytest.fixture
def planted(monkeypatch) -> Callable[..., list[Stage]]:
    """Puts a world in place of training and returns the list of the stages that are then asked for.

    ``unread``: how many times higher the loss is on a corpus that the last data did not hold.
    """

    def plant(world: World, unread: float = 1.05) -> list[Stage]:
        asked: list[Stage] = []
        taught: dict[str, float] = {}

        def train(self, title, study, stages, prepared, **_: Any):
            asked.extend(stages)
            self.use(study, [stage.folder_name for stage in stages])
            results = {}
            for stage in stages:
                known = {name for name, weight in stage.plan.segments[-1].mixture if weight}
                if stage.kind == "sft":  # chats read in the decay go on to help; how long SFT lasts does not matter
                    assert stage.start is not None
                    level = dict.fromkeys(CORPORA, 0.9 * taught[stage.start.stage])
                else:
                    level = {name: world(stage) * (1.0 if name in known else unread) for name in CORPORA}
                    taught[stage.key] = level["chats"]
                scores = {name: {"nats": 1000 * value, "bytes": 1000} for name, value in level.items()}
                results[stage.key] = {"scores": scores, "flops": stage.flops, "seconds": {"step": 1.0}}
            return results

        def answer(verb, checkpoints, **job):
            assert verb == "exact"
            return {key: {"all": {"accuracy": known_share(Path(path))}} for key, path in checkpoints.items()}

        def known_share(checkpoint: Path) -> float:
            better = any(f"-sft-{arm}-" in checkpoint.parents[1].name for arm in ("a-2", "b-3"))
            return (0.5 if better and world is papers_world else 0.3) + 0.001 * (len(checkpoint.parents[1].name) % 2)

        monkeypatch.setattr(replication_sft, "finishing", answer)
        monkeypatch.setattr(desk_module.Desk, "train", train)
        monkeypatch.setattr(replication_design, "recorded", lambda lab, stage, stretch: recorded(stage, world))
        monkeypatch.setattr(
            replication_data, "watch", lambda home, program, stage: watched(stage, world is papers_world)
        )
        return asked

    return plant


def recorded(stage: Stage, world: World) -> Curve:
    """The loss along a run of a planted world, with a little noise."""
    first = stage.start.step if stage.start else stage.steps // 10
    at = np.unique(np.linspace(first + 1, stage.steps, 16).round().astype(np.int64))
    noise = 1 + 2e-4 * np.sin(7.0 * at + stage.steps)
    losses = np.array([world(replace(stage, steps=int(step))) for step in at]) * noise
    return Curve(stage.name, rates_of(stage.schedule, stage.optimizer.learning_rate, stage.steps), at, losses)


def watched(stage: Stage, papers: bool) -> dict[str, Any]:
    """A second pass in which the decay changes what the paper says, or nothing."""
    begins = stage.schedule.stable_end
    assert begins is not None
    first, steps, rates, moves, losses = 2 * begins - stage.steps, [], [], [], []
    for step in range(first + 1, stage.steps + 1):
        rate = stage.schedule.factor(step)
        size = rate if papers else 1.0
        numbers = {"norm": 0.5 + size, "max": 1.0, "cosine": 0.2 - 0.3 * size if papers else -0.1, "d1": -0.1 * size,
                   "d2": 0.12 - 0.02 * size, "curvature": 0.1 / size, "sharpness": 1.0}  # fmt: skip
        steps.append({"step": step, **numbers, "roles": {"hidden": numbers}})
        rates.append([step, rate])
        losses.append([step, 4.0 + 0.2 * size - 1e-5 * (step - first)])
        moves.append(
            {"step": step, "largest": {f"layers.0.{m}.weight": 0.01 * size for m in ("mlp.up", "mlp.gate", "attn.q")}}
        )
    return {"first": first, "last": stage.steps, "steps": steps, "rates": rates, "moves": moves, "losses": losses,
            "sampling": {"window": 1}}  # fmt: skip


def again(folder: Path) -> Recipe:
    return load_recipe(folder / "again.toml")


def verdicts(view) -> dict[str, str]:
    return {fact["name"]: fact["verdict"] for fact in view.data["claims"]}


def test_in_the_papers_world_the_claims_hold_and_in_a_flat_one_they_do_not(folder, tmp_path, planted):
    planted(papers_world)
    found = verdicts(replicate(again(folder), tmp_path / "a", size="tiny", quiet=True))
    assert list(found) == list(CLAIMS), found
    # The planted world says nothing of what more compute buys on one axis alone, so that claim may come out either way.
    assert {name for name, verdict in found.items() if verdict == "holds"} >= set(CLAIMS) - {"more-data"}
    planted(flat_world)
    flat = verdicts(replicate(again(folder), tmp_path / "b", size="tiny", quiet=True))
    assert {flat[name] for name in ("rate", "decay", "dynamics")} == {"does not hold"}
    assert flat["cosine"] != "holds"


@pytest.mark.parametrize(
    ("claim", "world", "unread", "verdict"),
    [
        ("more-data", additive_world(4.0), 1.05, "holds"),
        ("more-data", additive_world(16.0), 1.05, "does not hold"),
        ("more-data", additive_world(math.inf), 1.05, "does not hold"),
        ("continue", worn_out_world, 1.05, "does not hold"),
        ("data-law", exponential_world, 1.05, "does not hold"),
        ("two-stage", papers_world, 1.0, "does not hold"),
    ],
)
def test_a_world_with_a_known_answer_gets_that_answer(folder, tmp_path, planted, claim, world, unread, verdict):
    planted(world, unread)
    (fact,) = replicate(again(folder), tmp_path, size="tiny", claims=[claim], quiet=True).data["claims"]
    assert fact["verdict"] == verdict, fact["parts"]
    if world is exponential_world:
        assert all(value < 0 for value in fact["parts"][0]["values"])


def test_a_claim_alone_trains_its_own_runs_and_a_second_call_asks_for_the_same_and_decides_the_same(
    folder, tmp_path, planted
):
    asked = planted(papers_world)
    first = replicate(again(folder), tmp_path, size="tiny", claims=["wsd"], seeds=4, quiet=True)
    keys = [stage.key for stage in asked]
    assert {stage.seed for stage in asked} == {3, 1003, 2003, 3003, 4003}
    asked.clear()
    second = replicate(again(folder), tmp_path, size="tiny", claims=["wsd"], seeds=4, quiet=True)
    assert [stage.key for stage in asked] == keys
    assert first.data["claims"] == second.data["claims"]
    asked.clear()
    both = replicate(again(folder), tmp_path, size="tiny", claims=["two-stage"], quiet=True)
    assert [fact["name"] for fact in both.data["claims"]] == ["wsd", "two-stage"], (
        "what was decided before stays in the table"
    )
    assert {stage.schedule.kind for stage in asked} == {"wsd"}


def test_rates_are_tuned_on_a_seed_that_decides_nothing(folder, tmp_path, planted):
    asked = planted(papers_world)
    view = replicate(again(folder), tmp_path, size="tiny", claims=["wsd"], quiet=True)
    fact = view.data["claims"][0]
    assert 3 not in fact["seeds"]
    assert fact["rates"]["wsd"] == pytest.approx(0.0125, rel=0.2)
    tuning = [stage for stage in asked if stage.seed == 3]
    assert {stage.schedule.kind for stage in tuning} == {"wsd", "cosine"}
    assert len({stage.optimizer.learning_rate for stage in tuning}) >= 5


def test_at_equal_rates_wsd_meets_a_cosine_of_every_seed_and_loses_where_the_cosine_is_better(
    folder, tmp_path, planted
):
    def steeper_cosine(
        stage: Stage,
    ) -> float:  # it likes half the rate, and is the better one wherever both are compared
        if stage.schedule.kind != "cosine":
            return papers_world(stage)
        slower = replace(stage.optimizer, learning_rate=2 * stage.optimizer.learning_rate)
        return 0.95 * papers_world(replace(stage, optimizer=slower))

    options: dict[str, Any] = {"size": "tiny", "claims": ["wsd"], "quiet": True}
    for home, world, verdict in (("a", papers_world, "holds"), ("b", steeper_cosine, "does not hold")):
        asked = planted(world)
        (fact,) = replicate(again(folder), tmp_path / home, **options).data["claims"]
        assert [part["verdict"] for part in fact["parts"]] == [verdict, verdict]
        own = [stage for stage in asked if stage.seed in fact["seeds"]]
        rates = {
            kind: {s.optimizer.learning_rate for s in own if s.schedule.kind == kind} for kind in ("wsd", "cosine")
        }
        assert rates["wsd"] == {fact["rates"]["wsd"]}
        assert rates["cosine"] == {fact["rates"]["wsd"], fact["rates"]["cosine"]}
        ends = [s for s in own if s.schedule.kind == "cosine" and s.optimizer.learning_rate in rates["wsd"]]
        assert {s.seed for s in ends} == set(fact["seeds"]), "a cosine a seed at WSD's rate"
        assert len({s.key for s in own if s.kind == "decay"}) == len(fact["seeds"])
    assert fact["rates"]["cosine"] < fact["rates"]["wsd"]


def test_a_diverged_run_or_a_single_seed_leaves_the_claim_open(folder, tmp_path, planted, monkeypatch):
    planted(papers_world)
    one = replicate(again(folder), tmp_path / "one", size="tiny", claims=["decay"], seeds=1, quiet=True)
    assert verdicts(one) == {"decay": "cannot tell"}
    before = desk_module.Desk.train

    def train(self, title, study, stages, prepared, **more: Any):
        results = before(self, title, study, stages, prepared, **more)
        for stage in stages:
            if stage.seed == 1003 and stage.kind == "decay":
                results[stage.key] = {"failed": "not finite", "diverged": True}
        return results

    monkeypatch.setattr(desk_module.Desk, "train", train)
    for claim in ("decay", "data-law", "more-data", "two-stage"):
        found = replicate(again(folder), tmp_path / claim, size="tiny", claims=[claim], quiet=True)
        assert verdicts(found) == {claim: "cannot tell"}


def test_table_1_has_five_models_a_seed_each_tuned_on_chats_alone_from_the_end_of_its_decay(folder, tmp_path, planted):
    asked = planted(papers_world)
    view = replicate(again(folder), tmp_path, size="tiny", claims=["two-stage-sft"], quiet=True)
    (fact,) = view.data["claims"]
    tuned = [stage for stage in asked if stage.kind == "sft"]
    assert len({stage.key for stage in tuned}) == 5 * len(fact["seeds"])
    by_key = {stage.key: stage for stage in asked}
    for stage in tuned:
        assert stage.start is not None
        parent = by_key[stage.start.stage]
        assert (parent.kind, stage.start.step, stage.start.fresh) == ("decay", parent.steps, True)
        assert (
            {name for name, _ in stage.plan.segments[0].mixture} == {"chats", "exact"} == set(dict(stage.plan.packed))
        )
        end = parent.optimizer.learning_rate * parent.schedule.factor(parent.steps)
        assert stage.optimizer.learning_rate == pytest.approx(end)
        better = "chats" in dict(parent.plan.segments[-1].mixture)
        assert better == stage.name.endswith(("a-2", "b-3"))
    one = {stage.name[-3:]: stage for stage in tuned if stage.seed == 1003}
    assert one["b-1"].steps == one["b-3"].steps == pytest.approx(one["b-2"].steps / 2, abs=1)
    assert one["a-1"].start != one["a-2"].start
    assert one["a-1"].shape.body > one["b-1"].shape.body
    assert one["b-1"].start == one["b-2"].start != one["b-3"].start
    assert len(fact["parts"]) == 7
    assert all(len(part["values"]) == len(fact["seeds"]) for part in fact["parts"])
    assert [note[:3] for note in fact["notes"][:5]] == ["A-1", "A-2", "B-1", "B-2", "B-3"]


def test_table_1_asks_a_model_once_and_says_what_the_recipe_lacks(folder, tmp_path, planted, monkeypatch):
    planted(papers_world)
    first = replicate(again(folder), tmp_path, size="tiny", claims=["two-stage-sft"], quiet=True)
    monkeypatch.setattr(replication_sft, "finishing", lambda *_, **__: pytest.fail("asked again"))
    assert replicate(again(folder), tmp_path, size="tiny", claims=["two-stage-sft"], quiet=True).data == first.data
    plain = RECIPE.partition("[branch.chat]")[0].replace("again", "plain")
    (folder / "plain.toml").write_text(plain, encoding="utf-8")
    view = replicate(load_recipe(folder / "plain.toml"), tmp_path, size="tiny", claims=["two-stage-sft"], quiet=True)
    (fact,) = view.data["claims"]
    assert (fact["verdict"], fact["notes"]) == ("cannot tell", ["the recipe has no sft branch"])


@pytest.mark.slow
def test_the_designed_decay_is_fitted_on_the_tuning_seed_and_meets_rivals_with_rates_of_their_own(
    folder, tmp_path, planted
):
    asked = planted(papers_world)
    (fact,) = replicate(again(folder), tmp_path, size="tiny", claims=["designed"], quiet=True).data["claims"]
    assert fact["verdict"] == "holds"
    assert {"wsd", "cosine", "designed", "linear"} <= set(fact["rates"])
    own = {stage.key: stage for stage in asked if stage.seed in fact["seeds"]}.values()
    kinds = {word: [s for s in own if f"-{word}-" in s.name] for word in ("designed", "linear", "cosine")}
    assert len(kinds["designed"]) == len(kinds["linear"]) == 3
    assert {s.tokens for s in kinds["designed"]} == {s.tokens for s in kinds["linear"]} == {kinds["cosine"][-1].tokens}
    assert {(s.schedule.form, s.schedule.floor) for s in kinds["linear"]} == {("linear", 0.1)}
    behind = [s for s in asked if s.seed == 3 and s.kind == "decay"]
    assert {s.own_steps for s in behind} == {round(share * behind[0].steps) for share in (0.1, 0.3)}
    assert not {s.key for s in behind} & {s.key for s in own}, "the law has seen no judged run"
    assert "the law promised" in fact["notes"][0]
    planted(flat_world)
    (flat,) = replicate(again(folder), tmp_path / "b", size="tiny", claims=["designed"], quiet=True).data["claims"]
    assert flat["verdict"] == "cannot tell"


def test_figures_7_and_8_show_what_the_pass_saw_and_a_loss_that_falls_before_the_decay_too_does_not_hold(
    folder, tmp_path, planted, monkeypatch
):
    planted(papers_world)
    options: dict[str, Any] = {"size": "tiny", "claims": ["dynamics"], "quiet": True}
    (fact,) = replicate(again(folder), tmp_path / "a", **options).data["claims"]
    assert {part["verdict"] for part in fact["parts"]} == {"holds"}
    figures = {figure["y"]: figure for figure in fact["figures"]}
    assert list(figures) == [
        "max |ΔW|",
        "nats per token",
        "‖g‖",
        "cos(g(t), g(t+1))",
        "D1",
        "D2",
        "K",
        "base learning rate",
    ]
    assert [s["name"] for s in figures["max |ΔW|"]["series"]] == ["up", "gate", "q"]
    spans = {(s["points"][0][0], s["points"][-1][0]) for figure in fact["figures"] for s in figure["series"]}
    assert len(spans) == 1, "the learning rate lies beneath the same steps"

    def steady(home, program, stage):
        seen = watched(stage, papers=True)
        return {**seen, "losses": [[step, 4.0 - 1e-3 * (step - seen["first"])] for step, _ in seen["losses"]]}

    monkeypatch.setattr(replication_data, "watch", steady)
    (fact,) = replicate(again(folder), tmp_path / "b", **options).data["claims"]
    found = {part["says"]: part["verdict"] for part in fact["parts"]}
    assert found.pop("The loss barely moves before the decay") == "does not hold"
    assert set(found.values()) == {"holds"}


@pytest.mark.slow
def test_table_1_is_trained_and_answers_its_questions(folder, tmp_path, trained, monkeypatch):
    scale = Scale("tiny", "seconds", "tiny", ("0.02M",), "0.02M", "0.05M", 0.6, 512, 2)
    monkeypatch.setattr(replication, "scale_of", lambda name: scale)
    monkeypatch.setattr(replication_sft, "QUESTIONS", 2)
    monkeypatch.setattr(replication_sft, "finishing", lambda verb, **job: VERBS[verb](job))
    (fact,) = replicate(again(folder), tmp_path, claims=["two-stage-sft"], quiet=True).data["claims"]
    assert sum("-sft-" in name for name in trained) == 10
    assert all(part["estimate"] is not None for part in fact["parts"])
    trained.clear()
    replicate(again(folder), tmp_path, claims=["two-stage-sft"], quiet=True)
    assert not trained, "a second call trains nothing"


def test_the_page_stands_alone_and_every_number_is_the_lab_books(folder, tmp_path, planted):
    planted(papers_world)
    page, text = tmp_path / "page.html", tmp_path / "docs" / "replicate.md"
    view = replicate(again(folder), tmp_path / "home", size="tiny", out=page, markdown=text, quiet=True)
    html, markdown = page.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert html.count("of the target run") == len(view.data["claims"]) + 1
    assert markdown.count("of the target run") == len(view.data["claims"])
    assert "<script" not in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).replace("finance", "")
    book = LabBook(Home(tmp_path / "home").labbook, readonly=True)
    facts = book.facts("again", "replicate")
    book.close()
    assert {f"tiny/{fact['name']}": fact for fact in json.loads(json.dumps(view.data["claims"]))} == facts
    for fact in facts.values():
        assert f"| {fact['says']} | {fact['where']} | **{fact['verdict']}** |" in markdown
        for part in fact["parts"]:
            assert f"{part['estimate']['value']:+.2f}".replace("-", "−") in html
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown)
    assert len(shown) == len({*shown}) == sum(len(fact["figures"]) for fact in facts.values())
    assert all((text.parent / name).read_text(encoding="utf-8").startswith("<svg xmlns") for name in shown)


def test_what_is_a_fit_and_no_claim_names_the_verb_that_answers_it_wherever_the_table_stands(folder, tmp_path, planted):
    planted(papers_world)
    page, text = tmp_path / "page.html", tmp_path / "replicate.md"
    options: dict[str, Any] = {"size": "tiny", "claims": ["two-stage"], "quiet": True}
    view = replicate(again(folder), tmp_path / "home", out=page, markdown=text, **options)
    shown = [part for part in map(str, view.parts) if "answers it" in part]
    assert [where for where, _, _ in ELSEWHERE] == ["section 3.2", "section 4.5"]
    assert len(shown) == len(ELSEWHERE)
    verbs = {" ".join(command.split()[1:3]) for _, _, command in ELSEWHERE}
    assert verbs == {"tunnel batch", "law scale"}
    for where, _, command in ELSEWHERE:
        for told in (page.read_text(encoding="utf-8"), text.read_text(encoding="utf-8"), "".join(shown)):
            assert where in told
            assert command in told


@pytest.mark.parametrize("width", [720, 340])
def test_a_figure_draws_dots_and_lines_as_asked_and_survives_nothing_to_draw(width):
    figure = {
        "caption": "c", "x": "x", "y": "y", "log_x": True, "log_y": False,
        "series": [
            {"name": "runs", "points": [[1, 2], [10, 1]], "dots": True, "line": False},
            {"name": "law", "points": [[1, 2.1], [10, 0.9], [20, 0.8]], "dots": False, "line": True},
            {"name": "empty", "points": [], "dots": True, "line": True},
        ],
    }  # fmt: skip
    svg = lines_figure(figure, width)
    assert len(re.findall(r'<path d="[^"]*" class="l1 dash"', svg)) == 1
    assert 'class="l0' not in svg
    assert "empty" not in svg
    assert "nothing was measured" in lines_figure({**figure, "series": []}, width)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "huge"}, "--size: expected one of tiny, small"),
        ({"claims": ["speed"]}, "--claim: expected some of rate, cosine"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_read(folder, tmp_path, options, words):
    with pytest.raises(UserError) as error:
        replicate(again(folder), tmp_path, quiet=True, **options)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())
