"""Laws of the data plan: order is a pure function of (seed, plan, index)."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.corpus.mixture import DataPlan, Segment, check_epochs, locate
from windtunnel.corpus.permutation import name_key, permuted

NAMES = ("wiki", "code", "chat", "books", "web")


@st.composite
def plans(draw: st.DrawFn) -> DataPlan:
    count = draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 400), min_size=count - 1, max_size=count - 1)))]
    segments = []
    for start in starts:
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
        weights = draw(st.lists(st.floats(0, 10), min_size=len(names), max_size=len(names)))
        weights[draw(st.integers(0, len(names) - 1))] = draw(st.floats(0.1, 10))
        segments.append(Segment(start, tuple(zip(names, weights, strict=True))))
    return DataPlan(draw(st.integers(0, 2**64)), 8, tuple(segments))


ROWS = st.fixed_dictionaries({name: st.integers(1, 60) for name in NAMES})


def stream(plan: DataPlan, rows: dict[str, int], count: int, start: int = 0) -> list[tuple[str, int]]:
    corpus, row = locate(plan, rows, start, count)
    return [(plan.corpora[c], r) for c, r in zip(corpus.tolist(), row.tolist(), strict=True)]


@given(plan=plans(), rows=ROWS)
@settings(max_examples=80, deadline=None)
def test_no_row_is_read_twice_before_its_epoch_is_full_even_across_segments(plan, rows):
    read: dict[str, list[int]] = {name: [] for name in NAMES}
    for name, row in stream(plan, rows, 600):
        read[name].append(row)
    for name, order in read.items():
        for begin in range(0, len(order), rows[name]):
            epoch = order[begin : begin + rows[name]]
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == rows[name]:
                assert set(epoch) == set(range(rows[name]))


@given(plan=plans(), rows=ROWS, cuts=st.lists(st.integers(0, 600), max_size=8))
@settings(max_examples=80, deadline=None)
def test_any_division_into_calls_gives_the_same_stream(plan, rows, cuts):
    whole = stream(plan, rows, 600)
    edges = [0, *sorted(cuts), 600]
    assert [item for a, b in itertools.pairwise(edges) for item in stream(plan, rows, b - a, a)] == whole


@given(plan=plans(), rows=ROWS, ranks=st.sampled_from([1, 2, 4]), batch=st.sampled_from([4, 8, 20]))
@settings(max_examples=30, deadline=None)
def test_ranks_that_share_each_batch_read_what_one_rank_reads(plan, rows, ranks, batch):
    share = batch // ranks
    read = [stream(plan, rows, share, step * batch + rank * share) for step in range(5) for rank in range(ranks)]
    assert [item for part in read for item in part] == stream(plan, rows, 5 * batch)


@given(plan=plans(), until=st.integers(0, 700))
@settings(max_examples=80, deadline=None)
def test_counts_agree_with_the_stream(plan, until):
    rows = dict.fromkeys(NAMES, 1000)
    found = Counter(name for name, _ in stream(plan, rows, until))
    assert {name: found[name] for name in plan.corpora} == plan.counts(until)
    assert plan.epochs(rows, until) == {name: found[name] / 1000 for name in plan.corpora}


@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=12),
    start=st.integers(0, 10**9),
    length=st.integers(1, 3000),
)
@settings(max_examples=100, deadline=None)
def test_every_stretch_of_sequences_follows_the_weights_within_a_few_sequences(weights, start, length):
    names = [f"c{i}" for i in range(len(weights))]
    plan = DataPlan(0, 8, (Segment(0, tuple(zip(names, weights, strict=True))),))
    corpus, _ = locate(plan, dict.fromkeys(names, 10), start, length)
    depth = max(1, int(np.ceil(np.log2(max(2, len(weights))))))
    counts = np.bincount(corpus, minlength=len(weights))
    expected = length * np.array(weights) / sum(weights)
    assert np.abs(counts - expected).max() <= 1.5 * depth + length * depth * 2.0**-23


def test_share_of_the_prefix_is_exact_to_a_sequence_for_simple_weights():
    plan = DataPlan(0, 8, (Segment(0, (("wiki", 0.75), ("code", 0.25))),))
    corpus, _ = locate(plan, {"wiki": 9, "code": 9}, 0, 4000)
    for block in corpus.reshape(-1, 4):
        assert (block == 1).sum() == 1


def test_a_branch_reads_what_its_trunk_read_and_goes_on_without_rereading():
    trunk = DataPlan(3, 8, (Segment(0, (("wiki", 0.5), ("code", 0.5))),))
    branch = trunk.extended(100, {"wiki": 1.0, "chat": 1.0})
    rows = {"wiki": 200, "code": 200, "chat": 70}
    assert stream(branch, rows, 100) == stream(trunk, rows, 100)
    wiki = [row for name, row in stream(branch, rows, 400) if name == "wiki"]
    assert len(wiki) == 200
    assert len(set(wiki)) == 200


def test_an_extension_at_the_same_mixture_changes_nothing_and_a_later_one_is_forgotten():
    mixture = (("wiki", 1.0),)
    trunk = DataPlan(3, 8, (Segment(0, mixture),))
    assert trunk.extended(50, mixture) == trunk
    assert trunk.extended(50, {"code": 1.0}).extended(20, {"chat": 1.0}).segments == (
        Segment(0, mixture), Segment(20, (("chat", 1.0),)),
    )  # fmt: skip


def test_adding_another_corpus_leaves_the_order_within_a_corpus_alone():
    alone = DataPlan(5, 8, (Segment(0, (("wiki", 1.0),)),))
    mixed = DataPlan(5, 8, (Segment(0, (("code", 2.0), ("wiki", 1.0))),))
    rows = {"wiki": 50, "code": 50}
    assert [r for n, r in stream(mixed, rows, 150) if n == "wiki"] == [r for _, r in stream(alone, rows, 50)]


def test_position_a_billion_costs_what_position_zero_costs():
    plan = DataPlan(1, 8, (Segment(0, (("wiki", 0.9), ("code", 0.1))), Segment(500, (("wiki", 0.3), ("chat", 0.7)))))
    rows = {"wiki": 10**7, "code": 1000, "chat": 3}
    calls = []
    for start in (0, 10**9, 2**37):
        corpus, row = locate(plan, rows, start, 256)
        calls.append(len(corpus))
        assert all(r < rows[plan.corpora[c]] for c, r in zip(corpus.tolist(), row.tolist(), strict=True))
    assert calls == [256, 256, 256]


def test_another_seed_and_another_epoch_give_another_order():
    rows = {"wiki": 500}
    orders = [[r for _, r in stream(DataPlan(seed, 8, (Segment(0, (("wiki", 1.0),)),)), rows, 1000)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0][:500] != orders[0][500:]
    assert sorted(orders[0][:500]) == sorted(orders[0][500:])


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_each_permutation_is_a_bijection(size, seed, epoch):
    index = np.arange(size)
    image = permuted(index, size, seed, name_key("wiki"), np.full(size, epoch))
    assert sorted(image.tolist()) == index.tolist()


def test_permutations_look_random():
    size, draws = 1000, 200
    images = np.stack(
        [permuted(np.arange(size), size, seed, name_key("x"), np.zeros(size, int)) for seed in range(draws)]
    )
    # mean displacement of a random permutation is about n/3; correlation with the identity about 0
    assert abs(np.abs(images - np.arange(size)).mean() - size / 3) < 0.02 * size
    assert abs(np.mean([np.corrcoef(image, np.arange(size))[0, 1] for image in images])) < 0.01
    first = np.bincount(images[:, 0] // 100, minlength=10)  # where element 0 goes
    assert ((first - draws / 10) ** 2 / (draws / 10)).sum() < 27.9  # chi-square, 9 degrees, p = .001


def test_golden_stream():
    """Changes only with a deliberate change of the order, which invalidates every run."""
    plan = DataPlan(7, 128, (Segment(0, (("wiki", 0.7), ("code", 0.3))), Segment(6, (("chat", 1.0),))))
    assert stream(plan, {"wiki": 100, "code": 30, "chat": 5}, 12) == GOLDEN


GOLDEN = [
    ("wiki", 50), ("code", 3), ("wiki", 96), ("wiki", 66), ("code", 19), ("wiki", 36),
    ("chat", 1), ("chat", 4), ("chat", 2), ("chat", 0), ("chat", 3), ("chat", 1),
]  # fmt: skip


def test_a_plan_survives_json():
    plan = DataPlan(7, 128, (Segment(0, (("wiki", 0.7), ("code", 0.3))), Segment(6, (("chat", 1.0),))))
    assert DataPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    "build",
    [
        lambda: DataPlan(0, 8, ()),
        lambda: DataPlan(0, 8, (Segment(1, (("wiki", 1.0),)),)),
        lambda: DataPlan(0, 8, (Segment(0, (("wiki", 1.0),)), Segment(0, (("wiki", 1.0),)))),
        lambda: DataPlan(0, 8, (Segment(0, (("wiki", 0.0),)),)),
        lambda: DataPlan(0, 8, (Segment(0, (("wiki", -1.0), ("code", 1.0))),)),
        lambda: DataPlan(0, 8, (Segment(0, (("wiki", float("nan")),)),)),
        lambda: DataPlan(0, 8, (Segment(0, (("wiki", 1.0), ("wiki", 1.0))),)),
        lambda: DataPlan(0, 0, (Segment(0, (("wiki", 1.0),)),)),
    ],
)
def test_a_plan_that_means_nothing_is_refused(build):
    with pytest.raises(RecipeError, match="expected"):
        build()


def test_a_corpus_that_is_read_too_often_is_warned_about_and_one_without_a_row_is_refused():
    plan = DataPlan(0, 8, (Segment(0, (("wiki", 0.5), ("code", 0.5))),))
    assert check_epochs(plan, {"wiki": 100, "code": 100}, 400) == []
    (warning,) = check_epochs(plan, {"wiki": 100, "code": 20}, 400)
    assert "'code' is read 10.0 times" in warning
    with pytest.raises(DataError, match=r"corpus.code: the corpus is too small: 32 tokens .* for the 1,600 asked"):
        check_epochs(plan, {"wiki": 100, "code": 4}, 400)
    with pytest.raises(DataError, match="too small"):
        check_epochs(plan, {"wiki": 100, "code": 0}, 400)
    with pytest.raises(DataError, match=r"corpus.code: the corpus is too small for one row"):
        locate(plan, {"wiki": 100, "code": 0}, 0, 4)
