"""Chat templates of one's own: marks are the template's, contents are text, and what is asked begins as it was trained."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windtunnel.base.errors import DataError, RecipeError
from windtunnel.corpus import templates
from windtunnel.corpus.build import build_corpus, corpus_key
from windtunnel.corpus.chat import CHATML_JINJA, MINICPM_JINJA, render, render_batch, stop_ids
from windtunnel.corpus.chat_template import answer_ends, check_template
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from windtunnel.recipe import load_recipe

LINES = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'user' %}
Question: {{ message.content }}
    {% elif message.role == 'assistant' %}
Answer: {{ message.content ~ ' ' ~ eos_token }}
    {% else %}
({{ message.content }})
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
Answer: {% endif %}"""
"""Plain marks, a blank before the end of an answer, blocks on lines of their own."""

SAME_AS_CHATML = {
    "keys": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "attributes": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "joined by ~": "{% for m in messages %}{{ (bos_token if loop.first else '') ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content.strip() "
    "~ '<|im_end|>\n' }}{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor %}",
    "by role": "{{- bos_token -}} {%- for message in messages -%} {%- if message['role'] == 'user' -%}"
    " {{- '<|im_start|>user\n' + message['content'] -}} {%- elif message['role'] == 'system' and loop.index0 == 0 -%}"
    " {{- '<|im_start|>system\n' + message['content'] -}} {%- else -%} {{- '<|im_start|>assistant\n' ~ message['content'] -}}"
    " {%- endif -%} {{- '<|im_end|>' + '\n' -}} {%- endfor -%}"
    " {%- if add_generation_prompt -%} {{- '<|im_start|>' ~ 'assistant' ~ '\n' -}} {%- endif -%}",
    "sliced": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% for m in (messages[1:] if messages[0]['role'] == 'system' else messages) %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
}
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(str.strip)
HOSTILE = st.lists(
    st.one_of(st.sampled_from([*SPECIAL_TOKENS, "assistant\n", "{{ 1 }}", "{% for %}", "\ue0000\ue001", "\ue000", "\ue001"]), TEXT),
    min_size=1, max_size=5,
).map("".join).filter(str.strip)  # fmt: skip
CHATS = st.tuples(st.one_of(st.none(), HOSTILE), st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=4)).map(
    lambda parts: chat_of(*parts)
)


def chat_of(system: str | None, rounds: list[tuple[str, str]]) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in rounds:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


@given(messages=CHATS, prompt=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_text_of_chatml_gives_the_ids_and_masks_of_chatml(tokenizer, messages, prompt):
    assert render(messages, tokenizer, CHATML_JINJA, prompt) == render(messages, tokenizer, "chatml", prompt)


@given(messages=CHATS, prompt=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_text_of_the_papers_template_gives_its_ids_and_masks(tokenizer, messages, prompt):
    marks = ("<用户>", "<AI>")
    plain = [
        {**turn, "content": turn["content"].replace(marks[0], "").replace(marks[1], "") + "."} for turn in messages
    ]
    assert render(plain, tokenizer, MINICPM_JINJA, prompt) == render(plain, tokenizer, "minicpm", prompt)


@pytest.mark.parametrize("way", SAME_AS_CHATML)
def test_the_usual_ways_to_write_a_template_are_one(tokenizer, way):
    check_template(SAME_AS_CHATML[way])
    for system in (None, "Be brief."):
        for rounds in (1, 2, 5):
            chat = chat_of(system, [(f"q {n}?", f"a {n}\n!") for n in range(rounds)])
            for turns, prompt in ((chat, False), (chat[:-1], True)):
                assert render(turns, tokenizer, SAME_AS_CHATML[way], prompt) == render(
                    turns, tokenizer, "chatml", prompt
                )


@pytest.mark.parametrize(("template", "own"), [(CHATML_JINJA, 5), (LINES, 2)])
def test_ten_thousand_hostile_contents_give_no_control_id(tokenizer, template, own):
    draw = random.Random(0)
    pieces = [*SPECIAL_TOKENS, "<|im_", "start|>", "<", "|>", "assistant\n", "Answer: ", "\n", "</", "s>", "\ue000", "\ue001", "\ue0000\ue001",
              "\ue0001\ue001", "0", "1", "{{ eos_token }}", "{%", "%}", "bos_token", "\u200b", "é", "世", "🙂", "\x00"]  # fmt: skip
    texts = ["x" + "".join(draw.choice(pieces) for _ in range(draw.randint(1, 8))) for _ in range(10_000)]
    chats = [chat_of(None, [(text, text)]) for text in texts]
    ids = np.concatenate([ids for ids, _ in render_batch(chats, tokenizer, template)])
    assert (ids < len(SPECIAL_TOKENS)).sum() == own * len(texts)


@given(messages=CHATS)
@settings(max_examples=100, deadline=None)
def test_contents_are_encoded_apart_and_scored_with_all_that_ends_them(tokenizer, messages):
    ids, mask = render(messages, tokenizer, LINES)
    marks = {"system": "({})\n", "user": "Question: {}\n", "assistant": "Answer: {} </s>\n"}
    text = "".join(marks[turn["role"]].format(turn["content"].strip()) for turn in messages)
    assert tokenizer.decode(ids, control=True) == "<s>\n" + text
    answers = [turn["content"].strip() for turn in messages if turn["role"] == "assistant"]
    scored = [[*tokenizer.encode(answer), *tokenizer.encode(" "), tokenizer.eos_id] for answer in answers]
    assert len(ids) == len(mask)
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [i for answer in scored for i in answer]


@pytest.mark.parametrize("template", [CHATML_JINJA, LINES, MINICPM_JINJA])
@given(messages=CHATS)
@settings(max_examples=60, deadline=None)
def test_what_is_asked_begins_as_in_training(tokenizer, template, messages):
    whole, _ = render(messages, tokenizer, template)
    for number, turn in enumerate(messages):
        if turn["role"] == "assistant":
            asked, mask = render(messages[:number], tokenizer, template, add_generation_prompt=True)
            assert whole[: len(asked)] == asked
            assert mask[-1] == 0


def test_a_content_cannot_forge_a_place_of_another(tokenizer):
    forged = "\ue0001\ue001 and \ue0000\ue001"
    ids, mask = render(chat_of(None, [(forged, "no")]), tokenizer, LINES)
    assert tokenizer.decode(ids) == f"\nQuestion: {forged}\nAnswer: no \n"
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "no "


def test_a_batch_is_one_call_of_the_tokenizer(tokenizer, monkeypatch):
    calls, inner = [], Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(len(texts)) or inner(self, texts))
    batch = [chat_of(None, [(f"q{n}", f"a{n}")]) for n in range(7)]
    rendered = render_batch(batch, tokenizer, LINES)
    assert len(calls) == 1
    for chat, (ids, mask) in zip(batch, rendered, strict=True):
        assert (ids.tolist(), mask.tolist()) == render(chat, tokenizer, LINES)


def test_answers_end_where_the_template_ends_them(tokenizer):
    assert stop_ids(tokenizer, CHATML_JINJA) == stop_ids(tokenizer, "chatml") == {tokenizer.eos_id, tokenizer.im_end_id}
    assert stop_ids(tokenizer, LINES) == stop_ids(tokenizer, "minicpm") == {tokenizer.eos_id}
    assert answer_ends(CHATML_JINJA) == ("<|im_end|>",)
    asks = "<|im_start|>{{ m.content }}<|im_end|>"  # a turn of the user ends with another token than an answer
    assert answer_ends(TURNS % (asks, "{{ m.content }}\n{{ eos_token }}")) == ("</s>",)


TURNS = "{{ bos_token }}{%% for m in messages %%}{%% if m.role != 'assistant' %%}%s{%% else %%}%s{%% endif %%}{%% endfor %%}"
USER, ANSWER = "[{{ m.content }}]", "{{ m.content }}{{ eos_token }}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TURNS % (USER, "{{ m.content }}\n"), r"expected each answer to end with a control token such as <\|im_end\|> or </s>, got '\\n"),
        (TURNS % (USER, "{{ m.content }}") + "{{ eos_token }}", "expected each answer to end with a control token"),
        (TURNS % (USER, "{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"), "expected each answer to end"),
        (TURNS % (USER, ANSWER) + "{% if add_generation_prompt %}Yes, {% endif %}",
         r"expected a question to begin as in training, got .*Yes, ' before an answer, not"),
        (TURNS % (USER, "Answer: " + ANSWER), "expected a question to begin as in training, .* let add_generation_prompt write"),
        (TURNS % (USER, " " + ANSWER), "expected a question to begin as in training"),
        (TURNS % ("{% if loop.first or loop.last %}" + USER + "{% endif %}", ANSWER), r"once and in order, got that of turn 2 \(user\) 0 times"),
        (TURNS % (USER, "{{ eos_token }}"), r"expected the content of each user and assistant turn once and in order, got that of turn 2 \(assistant\) 0"),
        (TURNS % ("[{{ m.content }}|{{ m.content }}]", ANSWER), r"got that of turn 1 \(user\) 2 times"),
        ("{{ bos_token }}{{ messages[1].content }}{{ messages[0].content }}{{ eos_token }}", "got another order"),
        (TURNS % ("[{{ m.content | upper }}]", ANSWER), "expected contents as they are, but the template changes them"),
        (TURNS % ("[{{ m.content | replace('\\n', ' ') }}]", ANSWER), "expected contents as they are"),
        (TURNS % ("{% if 'YES' in m.content %}!{% endif %}[{{ m.content }}]", ANSWER), "or looks into them"),
        (TURNS % ("[{{ m.content[:2] }}]", ANSWER), "expected the content of each user"),
        (TURNS % ("\ue0000\ue001", ANSWER), "the template changes them"),
        ("\ue000999999\ue001" + TURNS % (USER, ANSWER), "got another order"),
        (TURNS % (USER, ANSWER + "{{ bos_token }}"), r"hold it once, got it 2 times"),
        ((TURNS % (USER, ANSWER)).replace("{{ bos_token }}", ""), "expected a chat to begin with <s> and hold it once, got none"),
        ("Chat: " + TURNS % (USER, ANSWER), "got it elsewhere; write {{- bos_token }} before the loop"),
        (TURNS % ("{{ raise_exception('only\nusers') if m.role == 'system' else '[' + m.content + ']' }}", ANSWER),
         r"marks the turns system, user, assistant, but the template .* fails: it says 'only\\nusers'"),
        (TURNS % ("{{ m.name }}", ANSWER), "but the template .* fails: .* no attribute 'name'"),
        (TURNS % ("{{ tools }}", ANSWER), "'tools' is undefined; it knows messages"),
        (TURNS % ("{{ m.content.__class__ }}", ANSWER), "fails: access to attribute '__class__'"),
        (TURNS % ("{{ raise_exception.__globals__ }}", ANSWER), "fails: access to attribute '__globals__'"),
        ("{% set x %}1{% endset %}{{ x }}", "expected a Jinja template: .*not 'assignblock'.*; a chat template loops over"),
        ("{{ messages", "expected a Jinja template"),
        ("x{{ 1 }}" * 2000, "expected a template of at most 10000 characters"),
        ("chatlm", "expected 'chatml', 'minicpm' or a Jinja template, got 'chatlm'; did you mean 'chatml'?"),
        ("", "expected 'chatml', 'minicpm' or a Jinja template, got ''"),
        ("x" * 9000, "got 'xxx.*…'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_with_is_refused_in_one_line(template, problem):
    with pytest.raises((DataError, RecipeError), match=f"^template: .*{problem}") as caught:
        check_template(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["{{ bos_token }}", "Be kind.", ""])
def test_a_system_turn_may_be_left_out_or_repeated(tokenizer, text):
    dropped = TURNS % ("{% if m.role == 'user' %}" + USER + "{% endif %}", ANSWER)
    repeated = TURNS % (
        "{% if m.role == 'user' %}{{ messages[0].content if messages[0].role == 'system' }}" + USER + "{% endif %}",
        ANSWER,
    )
    check_template(dropped)
    check_template(repeated)
    chat = chat_of(text, [("q", "a"), ("r", "b")])
    assert tokenizer.decode(render(chat, tokenizer, dropped)[0]) == "[q]a[r]b"
    assert tokenizer.decode(render(chat, tokenizer, repeated)[0]) == f"{text}[q]a{text}[r]b"


LOOPS = "{% for a in messages | string %}" * 6 + "%s" + "{% endfor %}" * 6


@pytest.mark.parametrize("inner", ["", "{{ messages }}", "{{ messages[0].content }}"])
def test_a_template_that_loops_or_grows_is_stopped_in_one_line(monkeypatch, inner):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    with pytest.raises(DataError, match=r"^template: .* but the template exceeds its limits") as caught:
        check_template(LOOPS.replace("%s", inner))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^template: expected at most 1,048,576 characters of marks around 2 turns"):
        check_template(
            TURNS
            % (
                ("x" * 100).join(["{% for a in messages | string %}"] * 2) + "x" * 200 + "{% endfor %}" * 2 + USER,
                ANSWER,
            )
        )


def test_a_chat_that_the_template_looks_into_is_refused_when_it_comes(tokenizer):
    looks = TURNS % (USER, "{{ m.content.split('</think>')[-1] }}{{ eos_token }}")
    check_template(looks)
    assert render(chat_of(None, [("q", "a")]), tokenizer, looks)
    with pytest.raises(DataError, match="^template: expected contents as they are"):
        render(chat_of(None, [("q", "why</think>a")]), tokenizer, looks)


def test_a_corpus_is_another_one_under_another_template(tmp_path: Path, tokenizer, write_jsonl):
    write_jsonl(
        tmp_path / "chats.jsonl",
        [{"messages": chat_of(None, [(f"Where is {n}?", f"In town {n}, up the hill.")])} for n in range(40)],
    )
    configs = [
        SourceConfig.model_validate({"source": ["chats.jsonl"], "messages": "messages", "template": template, "clean": {"near": False}})
        for template in ("chatml", "minicpm", CHATML_JINJA, LINES)
    ]  # fmt: skip
    assert len({corpus_key(config, tokenizer.hash, "x") for config in configs}) == 4
    built = build_corpus(configs[-1], tokenizer, tmp_path / "built", name="chats", downloads=tmp_path, base=tmp_path)
    ids, mask = built.train.tokens, built.train.mask
    text = tokenizer.decode([int(i) for i, m in zip(ids, mask, strict=True) if m], control=True)
    assert text.count(", up the hill. </s>") == text.count("</s>") == len(built.train.documents) - 1


RECIPE = """
name = "r"
[corpus.a]
source = "."
messages = "messages"
template = '''
%s'''
[corpus.b]
source = "."
messages = "messages"
[model]
family = "tiny"
size = "0.02M"
[trunk]
tokens = "1M"
mixture = { a = 1 }
[branch.decay]
tokens = "10%%"
[branch.chat]
kind = "sft"
parent = "decay"
mixture = { a = 1, b = 1 }
"""


def test_a_recipe_names_the_line_of_its_template_and_two_templates_in_short(tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE % (TURNS % (USER, "{{ m.content }}")), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"r\.toml:\d+: corpus\.a\.template: expected each answer to end with a control token"
    ):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text(RECIPE % LINES, encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"expected chats of one template, got chatml and \{\{ bos_token \}\} .{10,30}…; give"
    ) as caught:
        load_recipe(tmp_path / "r.toml")
    assert "\n" not in str(caught.value)
    recipe = load_recipe(tmp_path / "r.toml", ["branch.chat.mixture={ a = 1 }"])
    assert recipe.corpus["a"].template == LINES
