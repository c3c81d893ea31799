"""Counts, lengths and times mean one thing, are shown in a form that reads back, and refuse what they are not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windtunnel.base.config import exact
from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.units import Length, bytes_size, duration, parse_count, parse_seconds, si

UNITS = st.sampled_from(["tokens", "steps", "sequences", "flops"])


@given(st.integers(1, 10**15))
def test_a_count_reads_back_from_its_own_digits(count):
    assert parse_count(count) == parse_count(str(count)) == parse_count(f"{count:_}") == count


@given(st.integers(1, 999), st.sampled_from([("k", 3), ("M", 6), ("B", 9), ("G", 9), ("T", 12)]), st.booleans())
def test_a_suffix_is_a_power_of_ten(count, suffix, lower):
    letter, power = suffix
    assert parse_count(f"{count}{letter.lower() if lower else letter}") == count * 10**power
    assert parse_count(f"{count} {letter}") == parse_count(f"{count}e{power}") == count * 10**power


@given(st.floats(1, 1e15))
def test_what_people_see_is_within_the_digits_shown(value):
    assert math.isclose(parse_count(si(round(value))), round(value), rel_tol=5.1e-3)


@given(st.integers(1, 10**15), UNITS)
def test_a_length_as_recipes_write_it_reads_back_exactly(value, unit):
    length = Length(value, unit)
    assert Length.parse(exact(length)) == length
    assert Length.parse(length) is length


@given(st.floats(1e-6, 1))
def test_a_share_reads_back_and_is_taken_of_the_whole(share):
    length = Length(share, "fraction")
    again = Length.parse(exact(length))
    assert again.unit == "fraction"
    assert math.isclose(again.value, share, rel_tol=1e-13)
    assert length.tokens(whole=10**6) == max(1, round(share * 10**6))


@given(st.floats(1e-3, 1e4))
def test_tokens_for_each_parameter_read_back_and_scale_with_the_model(ratio):
    length = Length.parse(exact(Length(ratio, "per_parameter")))
    assert math.isclose(length.value, ratio, rel_tol=1e-13)
    assert abs(length.tokens(parameters=10**6) - ratio * 10**6) <= 0.5 + 1e-6 * ratio


def test_each_unit_converts_with_what_it_refers_to_and_says_so_without_it():
    assert Length.parse("500 steps").tokens(batch=4096) == 2_048_000
    assert Length.parse("64 sequences").tokens(row=128) == 8192
    assert Length.parse("1e18 flops").tokens(flops_per_token=1e9) == 10**9
    assert Length.parse("6.4M").tokens() == Length.parse("6400000 tokens").tokens() == 6_400_000
    assert Length.parse("20N").tokens(parameters=1_000_000) == 20_000_000
    for text in ("500 steps", "64 sequences", "10%", "20N", "1e18 flops"):
        with pytest.raises(ValueError, match="cannot be turned into tokens"):
            Length.parse(text).tokens()


NO_LENGTH = ["", "x", "12 apples", "0%", "101%", "-5%", "x%", "0", "-3", "1.5", "nan", "inf", "1e400", "N", "-2N", "xN", True, None, [], {}]  # fmt: skip


@pytest.mark.parametrize("bad", NO_LENGTH, ids=repr)
def test_what_is_no_length_is_one_line_that_names_the_place_and_the_value(bad):
    with pytest.raises(RecipeError) as error:
        Length.parse(bad, "trunk.tokens")
    assert str(error.value).startswith("trunk.tokens: expected")
    assert "\n" not in str(error.value)


@given(st.text(max_size=12))
def test_any_text_is_a_length_or_one_line(text):
    for read in (Length.parse, parse_count, parse_seconds):
        try:
            read(text)
        except RecipeError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1e3s", 1000), (45.5, 45.5), ("30s", 30), ("20m", 1200), ("1.5h", 5400), ("2d", 172_800)])  # fmt: skip
def test_a_time_is_in_seconds(text, seconds):
    assert parse_seconds(text) == seconds


def test_times_and_sizes_for_people():
    shown = [duration(s) for s in (0.04, 8.24, 42, 400, 3599, 7500, 11 * 86400)]
    assert shown == ["0.0 s", "8.2 s", "42 s", "6 min 40 s", "1 h 00 min", "2 h 05 min", "11 days"]
    assert duration(math.nan) == duration(math.inf) == "an unknown time"
    assert [bytes_size(b) for b in (12, 37_400_000, 2e12)] == ["12 B", "37.4 MB", "2 TB"]


def test_an_error_is_one_line_whatever_it_was_given():
    error = UserError("a\nb", "expected\n  c", "do\td")
    assert str(error) == "a b: expected c; do d"
    assert error.exit_code == 2
