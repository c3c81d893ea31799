"""The report: complete in itself, true to the lab book, safe against the text in it, readable when half of it is missing."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from windtunnel.base.errors import UserError
from windtunnel.base.labbook import LabBook
from windtunnel.report.cost import cost_line, read_cost
from windtunnel.report.curve_forecast import CurvePicture
from windtunnel.report.figures import compare_figure, lower_edge, thin
from windtunnel.report.page import render, write_report
from windtunnel.report.story import without_paths
from windtunnel.report.svg import Axis, linear_ticks, spread
from windtunnel.report.words import WORDS, Words, words_in

LN2 = 0.6931471805599453
NAME = "harbour"
PARTS = (
    "recipe",
    "corpus",
    "search",
    "scaling",
    "forecast",
    "trunk",
    "branches",
    "outcome",
    "model",
    "export",
    "session",
)
Make = Callable[..., LabBook]


class Page(HTMLParser):
    """Elements, attributes and the visible text of each section; fails on tags that do not match."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.defined: dict[str, list[str]] = {}
        self.where = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.where = dict(attrs)["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "nav" in self.open or "style" in self.open or "title" in self.open:
            return
        if "dfn" in self.open:
            self.defined.setdefault(self.where, []).append(data)
        elif "pre" not in self.open and "aside" not in self.open:
            self.text[self.where] = f"{self.text.get(self.where, '')} {data}"


def figures_of(html: str, caption: str) -> str:
    """The first figure whose hidden title starts with the caption."""
    found = re.search(rf"<svg[^>]*><title>{re.escape(caption)}.*?</svg>", html, re.DOTALL)
    assert found, caption
    return found[0]


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d{4}(?!\d)", text))


def test_the_report_is_one_file_that_asks_the_network_for_nothing(make_book: Make, tmp_path: Path) -> None:
    out = write_report(make_book(), NAME, tmp_path / "report.html")
    html = out.read_text(encoding="utf-8")
    assert out.stat().st_size <= 3_000_000
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
        "use",
        "image",
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data", "action", "style"), (tag, name)
            assert not name.startswith("on"), (tag, name)
            assert name != "href" or (value or "").startswith("#"), value
    assert "url(" not in html
    assert "@import" not in html


def test_the_policy_allows_exactly_the_style_that_is_there(make_book: Make) -> None:
    html = render(make_book(), NAME)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert html.count("<style>") == 1
    hashed = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a)
    assert policy == f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"


def test_every_number_of_the_hero_is_a_row_of_the_lab_book(make_book: Make) -> None:
    book = make_book()
    said = next(iter(book.facts(NAME, "forecast").values()))["forecast"]
    outcome = next(iter(book.facts(NAME, "outcome").values()))
    html = render(book, NAME)
    hero = html[html.index('<div class="hero">') : html.index("Corpus by corpus")]
    rows = {f"{value / LN2:.4f}" for value in (*said["expected"].values(), outcome["outcome"])}
    rows |= {f"{naive['value'] / LN2:.4f}" for naive in said["naive"].values()}
    assert numbers_in(hero) <= rows
    for value in (said["expected"]["value"], said["expected"]["low90"], said["expected"]["high90"], outcome["outcome"]):
        assert f"{value / LN2:.4f}" in hero
    assert f"{100 * outcome['relative_error']:+.2f}" in hero
    assert ("inside" if outcome["inside_90"] else "outside") + " the 90" in hero
    for key, value in said["naive"].items():
        assert f"{100 * abs(value['value'] / outcome['outcome'] - 1):.2f}" in hero, key


def test_marks_of_the_hero_lie_where_the_numbers_say(make_book: Make) -> None:
    book = make_book()
    said = next(iter(book.facts(NAME, "forecast").values()))["forecast"]
    outcome = next(iter(book.facts(NAME, "outcome").values()))["outcome"]
    svg = figures_of(render(book, NAME), "The sealed forecast")
    bars = {
        m[3]: (float(m[1]), float(m[2]))
        for m in re.finditer(r'<rect x="([\d.]+)"[^>]*? width="([\d.]+)".*?class="(\w+)"', svg)
    }
    dot = float(re.search(r'<circle cx="([\d.]+)"[^>]*class="dot"', svg)[1])  # type: ignore[index]
    scale = bars["band"][1] / (said["expected"]["high90"] - said["expected"]["low90"])
    assert bars["core"][1] == pytest.approx(scale * (said["expected"]["high50"] - said["expected"]["low50"]), abs=0.1)
    assert dot - bars["band"][0] == pytest.approx(scale * (outcome - said["expected"]["low90"]), abs=0.1)


def test_losses_of_the_branches_are_those_of_the_lab_book(make_book: Make) -> None:
    book = make_book()
    text = Page(render(book, NAME)).text["decay"]
    runs = [run for run in book.runs(program=NAME, study="") if run["kind"] == "decay"]
    found = {f"{row['value']:.4f}" for run in runs for row in book.scores(run["id"])}
    assert len(found) >= 9
    assert numbers_in(text) == found


def test_hostile_text_stays_text(make_book: Make) -> None:
    book = make_book()
    with book:
        evil = "</title><script>x()</script>"
        trunk = next(run for run in book.runs(program=NAME, kind="trunk", study=""))
        book.put_run(trunk["id"], name=evil, reason=evil, status=evil)
        book.put_fact(NAME, "corpus", evil, {"hash": evil, "tokens": 5, "heldout_bytes": 7, "licence": evil})
        book.put_fact(
            NAME,
            "recipe",
            "resolved",
            {"name": evil, "corpus": {evil: {"source": evil}}, "model": {"size": evil, "family": evil}},
        )
        for name, sealed in book.facts(NAME, "forecast").items():
            sealed["facts"] |= {"branch": evil, "made": evil}
            book.put_fact(NAME, "forecast", name, sealed)
    html = render(book, NAME)
    names = {tag for tag, _ in Page(html).tags}
    assert "script" not in names
    assert "img" not in names
    assert "&lt;script&gt;" in html
    assert "<script" not in html


def test_a_report_to_share_holds_no_text_of_a_model(make_book: Make) -> None:
    book = make_book()
    whole, shared = render(book, NAME), render(book, NAME, share=True)
    for text in ("quartz lighthouse marmalade", "zephyr-coloured", "village in the north", "What is a ferry?"):
        assert text in whole
        assert text not in shared
    assert "samples and answers are left out" in shared
    assert "31.5" in shared


def test_no_path_and_no_user_is_named(make_book: Make) -> None:
    book = make_book()
    with book:
        run = book.runs(program=NAME)[0]["id"]
        book.put_run(run, status="failed", reason="no space left at /home/somebody/runs/x.bin")
    html = render(book, NAME)
    assert "somebody" not in html
    assert "/home" not in html
    assert str(book.path.parent) not in html


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/home/ann/data/a.txt", "…/a.txt"),
        ("~/data/a.txt", "…/a.txt"),
        ("full disk at '/var/x/y.bin' (5)", "full disk at '…/y.bin' (5)"),
        (r"C:\Users\ann\data\a.txt", "…/a.txt"),
        (r"\\server\ann\a.txt", "…/a.txt"),
        ("file:///home/ann/a.txt", "…/a.txt"),
        ("pypi:pack==0.1/inner/a.json", "pypi:pack==0.1/inner/a.json"),
        ("data/a.txt and 3/4", "data/a.txt and 3/4"),
        ("{{ title }}\n\n{{ text }}", "{{ title }}\n\n{{ text }}"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, short: str) -> None:
    assert without_paths({"a": [text]}) == {"a": [short]}


@pytest.mark.parametrize("missing", [(part,) for part in PARTS] + [PARTS[i:] for i in range(1, len(PARTS))])
def test_a_program_that_stopped_halfway_still_gets_a_report(make_book: Make, missing: tuple[str, ...]) -> None:
    html = render(make_book([part for part in PARTS if part not in missing]), NAME)
    page = Page(html)
    assert "provenance" in page.text
    wanted = {"forecast", "trunk", "outcome", "model"} & set(missing)
    assert ("This report is not complete yet" in html) or not wanted


def test_what_is_missing_is_said(make_book: Make) -> None:
    html = render(make_book(["recipe", "corpus", "search", "scaling", "forecast"]), NAME)
    assert "the trunk has not begun" in html
    assert "the forecast has no outcome yet" in html
    assert "not yet known" in figures_of(html, "The sealed forecast")
    assert "This report is not complete" not in render(make_book(), NAME)


def test_a_recipe_without_a_tunnel_misses_no_search_and_no_forecast(make_book: Make) -> None:
    book = make_book(["recipe", "corpus", "trunk", "model", "outcome"])
    assert "no search has finished in the tunnel" in render(book, NAME)
    with book:
        book.put_fact(NAME, "recipe", "resolved", {**book.fact(NAME, "recipe", "resolved"), "tunnel": None})
    html = render(book, NAME)
    assert "no search has finished" not in html
    assert "no forecast has been sealed" not in html


def test_the_outcome_of_another_forecast_is_not_shown(make_book: Make) -> None:
    book = make_book()
    with book:
        for name, outcome in book.facts(NAME, "outcome").items():
            book.put_fact(NAME, "outcome", name, {**outcome, "forecast": "b" * 64})
    assert "the forecast has no outcome yet" in render(book, NAME)


def test_misses_are_printed(make_book: Make) -> None:
    book = make_book()
    with book:
        for name, outcome in book.facts(NAME, "outcome").items():
            book.put_fact(NAME, "outcome", name, {**outcome, "inside_90": False, "inside_50": False})
        for sealed in list(book.facts(NAME, "forecast").values()):
            old = {**sealed, "hash": "c" * 64, "facts": {**sealed["facts"], "made": "2025-01-01T00:00:00Z"}}
            book.put_fact(NAME, "forecast", "same-older", old)
    text = Page(render(book, NAME)).text["forecast"]
    assert "a miss" in text
    assert "Other forecasts" in text
    assert "2025-01-01" in text


def test_the_ledger_names_every_forecast_of_the_home_and_one_to_share_no_other_program(make_book: Make) -> None:
    said = {"value": 1.9, "low50": 1.88, "high50": 1.92, "low90": 1.85, "high90": 1.95}
    row = {
        "program": NAME, "branch": "same", "corpus": "average", "kind": "blind", "time": "2026-03-01T10:20:30Z",
        "parameters": 3e5, "tokens": 6.4e6, "expected": said, "outcome": 1.97, "relative_error": 1.9 / 1.97 - 1,
        "inside_90": False, "before": None, "curve": {"mean_error": 0.011, "inside_90": 0.93},
    }  # fmt: skip
    other = {**row, "program": "secret", "outcome": None, "curve": None}
    changed = {**row, "branch": "old", "kind": "changed", "expected": None}
    data = {
        "forecasts": [row, other, changed, {**row, "corpus": "wiki", "branch": "part"}], "blind": 4, "inside_90": 3,
        "blind_trunks": 1, "adaptations": {"scored": 0, "inside_90": 0, "trunks": 0},
    }  # fmt: skip
    text = Page(render(make_book(), NAME, ledger=data)).text["ledger"]
    for words in (
        "harbour/same",
        "secret/same",
        "harbour/old",
        "changed",
        "−3.55 %",
        "open",
        "miss; whole curve 1.1 % off",
    ):
        assert words in text
    assert "harbour/part" not in text, "corpora stand with the forecast"
    assert "Of 4 blind forecasts with an outcome, 3 lie inside their 90 % interval; they are about 1 trunk" in text
    shared = Page(render(make_book(), NAME, ledger=data, share=True)).text["ledger"]
    assert "secret" not in shared
    assert "left out of this table" in shared
    nothing = {**data, "forecasts": [other], "blind": 0}
    assert "nothing is known about the intervals" in Page(render(make_book(), NAME, ledger=nothing)).text["ledger"]


@pytest.mark.parametrize("width", [340, 720])
def test_a_forecast_curve_is_drawn_with_and_without_its_run_and_learning_rate(width: int) -> None:
    line = [(1000.0 * i, 6.0 - i / 20) for i in range(1, 40)]
    high, low = ([(d, v + off) for d, v in line] for off in (0.2, -0.2))
    proxies = {"N = 24k": [[(d, v + 0.5) for d, v in line]], "N = 95k": [[(d, v + 0.3) for d, v in line]]}
    bare = CurvePicture("curve", "N = 300k", line, low, high, (), proxies)
    whole = replace(bare, rate=[(d, 0.01) for d, _ in line], outcome=line[4:])
    assert "as trained" in whole.draw(width)
    assert "as trained" not in bare.draw(width)
    assert whole.draw(width).count("learning rate") == 1
    assert "learning rate" not in bare.draw(width)
    assert whole.draw(width, alone=True).startswith("<svg xmlns=")


def test_each_word_is_explained_where_it_first_appears(make_book: Make) -> None:
    for parts in (PARTS, ["corpus", "search", "scaling"]):
        page = Page(render(make_book(parts), NAME))
        said: set[str] = set()
        sections = [key for key in page.text if key]
        page.text[sections[0]] = page.text.get("", "") * (parts is PARTS) + page.text[sections[0]]
        for key in sections:
            said |= set(page.defined.get(key, []))
            assert set(words_in(page.text[key])) - {"provenance"} <= said | {"provenance"}, key
        every = [word for words in page.defined.values() for word in words]
        assert len(every) == len(set(every))


def test_explanations_use_no_word_that_they_do_not_explain() -> None:
    words = Words()
    said = [name for name, _ in words.first_in("branch, trunk, law, mixture")]
    for name in list(said):
        assert set(words_in(WORDS[name])) <= set(said)
    assert words.first_in("branch and trunk") == []


def test_an_unknown_program_is_a_clear_error(make_book: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a program of this lab book \(harbour\), got 'x'"):
        write_report(make_book(), "x", tmp_path / "r.html")


def test_the_same_book_gives_the_same_page(make_book: Make) -> None:
    book = make_book()
    assert render(book, NAME) == render(book, NAME)


def test_a_comparison_is_a_file_of_its_own_and_survives_odd_values() -> None:
    nan = float("nan")
    svg = compare_figure(
        {"a<b>": ([1, 2, 3], [3, nan, 1]), "one": ([2], [2]), "none": ([], [])}, "tokens", "loss & more"
    )
    assert svg.startswith("<svg xmlns=")
    assert "a&lt;b&gt;" in svg
    assert "loss &amp; more" in svg
    assert "nan" not in svg
    Page(svg)
    assert "no values recorded" in compare_figure({"x": ([], [])}, "a", "b")
    assert "<path" not in compare_figure({"flat": ([1], [1])}, "a", "b")


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(1.42, 1.68, 5) == [1.45, 1.5, 1.55, 1.6, 1.65]
    for low, high in ((1e-3, 8e-2), (1.3, 2.1), (3, 9e6), (0.999, 1.001)):
        for log in (False, True):
            ticks = Axis(low, high, 0, 100, log).ticks(5)
            assert 1 <= len(ticks) <= 12, (low, high, ticks)
            assert all(low <= t <= high for t in ticks)


def test_labels_never_collide() -> None:
    placed = spread([10, 11, 11.5, 90, 91], 14, 0, 100)
    order = sorted(placed)
    assert all(b - a >= 14 - 1e-3 for a, b in itertools.pairwise(order))
    assert placed == order


def test_the_lower_edge_lies_under_all_points_and_thinning_keeps_the_level() -> None:
    points = [(0.001 * 2**i, (i - 4) ** 2 + (i % 3)) for i in range(9)]
    edge = lower_edge(points)
    assert edge[0] == points[0]
    assert edge[-1] == points[-1]
    assert set(edge) <= set(points)
    assert min(points, key=lambda p: p[1]) in edge
    pairs = [(float(i), float(i % 7)) for i in range(1000)]
    assert sum(v for _, v in thin(pairs, 100)) / 100 == pytest.approx(sum(v for _, v in pairs) / 1000)


def test_loss_is_drawn_against_each_parameter_whether_it_is_a_number_or_a_word(make_book: Make) -> None:
    book = make_book()
    fact = book.fact(NAME, "study", "search")
    for trial in fact["trials"]:
        trial |= {"beta2": 0.9 + 0.006 * trial["number"], "optimizer": ("adamw", "muon")[trial["number"] % 2]}
        trial["qk_norm"] = trial["number"] % 4 == 1
    fact["choices"] |= {"beta2": 0.978, "optimizer": "muon", "qk_norm": True}
    with book:
        book.put_fact(NAME, "study", "search", fact)
    html = render(book, NAME)
    names = ("learning rate", "initial spread of weights", "embedding multiplier", "depth multiplier", "optimizer",
             "memory of the second moment, β₂, distance to 1", "norm of queries and keys")  # fmt: skip
    for name in names:
        svg = figures_of(html, f"Held-out loss over {name}")
        words = {"optimizer": ("adamw", "muon"), "norm of queries and keys": ("no", "yes")}.get(name, ())
        assert all(f">{word}<" in svg for word in words)
        assert ('class="edge"' in svg) != bool(words)  # nothing lies between two words
        assert svg.count("<circle") + svg.count('class="hollow"') >= 15
    row = re.search(r"<td>optimizer</td>.*?</tr>", html)
    assert row
    assert ">adamw<" in row[0]
    assert ">muon<" in row[0]


def test_the_report_says_what_the_search_may_have_left_to_gain(make_book: Make) -> None:
    book = make_book()
    assert "Was that enough?" not in render(book, NAME)
    fact = book.fact(NAME, "study", "search")
    best = min(t["loss"] for t in fact["trials"] if t["loss"] is not None)
    fact["gap"] = {"value": 0.01 * best, "low": 0.0, "high": 0.034 * best, "noise": 0.002 * best, "more": 1200}
    with book:
        book.put_fact(NAME, "study", "search", fact)
    text = re.sub(r"\s+", " ", render(book, NAME).replace("\u202f", " "))
    assert (
        "the best of them 1.00 % above the lowest loss in this space, and at most 3.40 % with a probability of 90 %"
        in text
    )
    assert "varies by about 0.20 %. About 1,200 more trials" in text


def test_the_ledger_holds_every_study_against_the_target_run(make_book: Make) -> None:
    book = make_book()
    target = sum(run["flops"] for run in book.runs(program=NAME, study=""))
    with book:
        book.put_fact(NAME, "target", "cost", {"flops": target, "tokens": 1})
    cost = read_cost(book, NAME)
    assert cost is not None
    assert cost.tunnel is not None
    studies = [run for run in book.runs(program=NAME) if run["study"]]
    assert cost.tunnel.runs == len(studies) > 0
    assert cost.tunnel.flops == pytest.approx(sum(run["flops"] for run in studies))
    assert cost.share(cost.tunnel) == pytest.approx(cost.tunnel.flops / target)
    assert sum(part.flops for part in cost.parts if not part.tunnel) == pytest.approx(target)
    html = render(book, NAME)
    assert "of the target run" in html
    assert f"{100 * cost.tunnel.flops / target:.3g}" in html


def test_a_cost_is_one_line_with_what_was_recorded() -> None:
    cost = {"runs": 12, "failed": 1, "tokens": 3_000_000, "flops": 2e12, "seconds": 90.0, "target": 8e13}
    assert (
        cost_line(cost)
        == "12 runs (1 diverged or failed), 3M tokens, 2T FLOPs, 1 min 30 s of training, 2.5 % of the target run"
    )
    assert cost_line({"trials": 1, "failed": 0, "seconds": 90.0}) == "1 run, 1 min 30 s of training"
