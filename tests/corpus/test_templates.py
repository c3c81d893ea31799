"""A template reads fields and nothing else, within limits of size and time."""

from __future__ import annotations

import pytest

from windtunnel.base.errors import RecipeError
from windtunnel.corpus import templates
from windtunnel.corpus.templates import RecordError, compile_template, is_template

FIELDS = {"title": "Tea", "steps": ["Boil.", "Pour."], "none": None, "deep": {"items_": [1, 2]}, "long": "x" * 1000}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ title }}", "Tea"), ("{{ steps | join(' ') }}", "Boil. Pour."), ("{{ none }}!", "!"), ("{{ deep.items_[1] }}", "2"),
        ("{% for s in steps %}{{ loop.index }}{{ s }}{% if not loop.last %}, {% endif %}{% endfor %}", "1Boil., 2Pour."),
        ("{{ title.upper() }} {{ missing | default('none') }}", "TEA none"),
        ("{% if missing is defined %}a{% else %}b{% endif %}", "b"),
        ("{{ title == 'Tea' }}", "True"), ("{{ 3 * 4 }}", "12"), ("{% set x = title ~ '!' %}{{ x + x }}", "Tea!Tea!"),
        ("{% set n = namespace(s='') %}{% for s in steps %}{% set n.s = n.s ~ s %}{% endfor %}{{ n.s }}", "Boil.Pour."),
        ("{{ 2.346 | round(2) }}", "2.35"), ("{{ none ~ 1 ~ title }}", "None1Tea"),
    ],
)  # fmt: skip
def test_what_a_template_may_do(template, text):
    assert compile_template(template, "text")(FIELDS) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}", "{{ title.__class__ }}", "{{ title.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}", "{{ title.format(1) }}", "{{ steps.append('x') }}", "{{ title * 1000000000 }}",
        "{{ [0] * 1000000000 }}", "{{ 9 ** 999999999 }}", "{{ '%1000000000d' % 1 }}", "{{ range(3) }}", "{{ title.ljust(10) }}",
        "{{ namespace().__class__ }}", "{{ namespace.__init__ }}", "{{ lipsum() }}", "{{ joiner() }}", "{{ steps.sort() }}", "{{ title.encode() }}", "{{ loop }}",
        "{{ 1 / 0 }}", "{{ 1 | round(3000000, 'ceil') }}", "{% set n = namespace() %}{{ n._Namespace__attrs }}",
        "{{ title + 1 }}",
    ],
)  # fmt: skip
def test_what_a_template_may_not_do(template):
    with pytest.raises(RecordError, match="the template"):
        compile_template(template, "text")(FIELDS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ title",
        "{% for %}",
        "{{ title | center(100000000) }}",
        "{{ title | attr('x') }}",
        "{{ title | format }}",
        "x{{ 1 }}" * 9999,
    ],
)
def test_what_is_no_template_here(template):
    with pytest.raises(RecipeError, match=r"^text: expected a"):
        compile_template(template, "text")


@pytest.mark.parametrize(("limit", "value"), [("MAXIMUM_OUTPUT", 5000), ("SECONDS", 0.0)])
def test_a_template_bomb_is_stopped_by_its_size_and_by_its_time(monkeypatch, limit, value):
    monkeypatch.setattr(templates, "MAXIMUM_OUTPUT", 1 << 24)
    monkeypatch.setattr(templates, "SECONDS", 3600.0)
    monkeypatch.setattr(templates, limit, value)
    bomb = compile_template("{% for a in long %}{{ long }}{% endfor %}", "text")  # a million characters
    with pytest.raises(RecordError, match=r"exceeds its limits of 16 MB"):
        bomb(FIELDS)
    monkeypatch.setattr(templates, limit, 1 << 24)
    assert len(bomb(FIELDS)) == 1_000_000


LONG = "{% for a in long %}{% for b in long %}{% for c in long %}{% endfor %}{% endfor %}{% endfor %}"


def nested(made: str) -> str:
    """Loops over one item each, whose variable takes the place of one that is set."""
    return "{% for v in [long] %}" + f"{{% for v in [{made}] %}}" * 12 + "{{ v | length }}" + "{% endfor %}" * 13


@pytest.mark.parametrize(
    "template",
    [
        LONG,
        LONG.replace("in long", "in long if a"),
        "{{ long | replace('x', long) | replace('x', long) }}",
        "{{ long | list | join(long) | list | join(long) }}",
        "{{ long.join(long.join(long)) }}",
        "{{ long | replace('', long) | replace('', long) }}",
        nested("v + v + v + v + v"),
        nested("v ~ v ~ v ~ v ~ v"),
        nested("v | upper ~ v | lower ~ v | title"),
        "{% set n = namespace(s=long) %}{% for a in long %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
        "{% set n = namespace(k=9) %}{% for a in long %}{% set n.k = n.k * n.k %}{% endfor %}{{ n.k }}",
        "{{ long | replace('x', long) | replace('x', 'y z ') | list | length }}",
        "{% if " + " or ".join(["long | replace('x', long) | sort | first == 'y'"] * 150) + " %}{% endif %}",
    ],
)
def test_a_template_that_loops_or_grows_is_stopped_even_if_it_writes_nothing(monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    with pytest.raises(RecordError, match=r"exceeds its limits of 16 MB"):
        compile_template(template, "text")(FIELDS)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "not 'macro'"),
        ("{% set x %}{{ long }}{% endset %}{{ x }}", "not 'assignblock'"),
        ("{% for a in steps recursive %}{{ loop(steps) }}{% endfor %}", "not 'recursive'"),
        ("{% include 'x' %}", "not 'include'"),
        ("{% with a = 1 %}{{ a }}{% endwith %}", "not 'with'"),
        ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "nested too deeply"),
        ("{{ " + "1" * 5000 + " }}", "a number too large"),
    ],
)
def test_a_template_cannot_call_itself_or_keep_variables(template, words):
    with pytest.raises(RecipeError, match=f"^text: expected a Jinja template: .*{words}") as caught:
        compile_template(template, "text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("join", [" + ", " ~ "])
def test_a_template_of_many_joins_is_refused_and_one_of_some_is_not(join):
    assert compile_template("{{ " + join.join(["a"] * 51) + " }}", "text")({"a": "x"}) == "x" * 51
    for terms in (52, 230):
        with pytest.raises(RecipeError, match=f"at most 50 joins with . or ~ are allowed, not {terms - 1}") as caught:
            compile_template("{{ " + join.join(["a"] * terms) + " }}", "text")
        assert "\n" not in str(caught.value)


def test_what_the_compiler_of_templates_cannot_take_is_one_line():
    for inner in ("a" + ".get('a')" * 1100, "[" * 300 + "]" * 300, "-" * 3000 + "1", "a" + " if a else a" * 900):
        with pytest.raises(RecipeError) as caught:
            compile_template("{{ " + inner[:9000] + " }}", "text")
        assert "\n" not in str(caught.value)


def test_the_limits_are_what_the_message_says():
    assert (templates.MAXIMUM_OUTPUT, templates.SECONDS) == (1 << 24, 2.0)


def test_fields_and_templates_are_told_apart():
    assert is_template("{{ a }}")
    assert is_template("{% if a %}b{% endif %}")
    assert not is_template("text")
