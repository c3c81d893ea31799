"""From the fields of one record to a document: a field, a template, or the turns of a chat."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from windtunnel.base.errors import DataError
from windtunnel.corpus.chat import Message, check_messages
from windtunnel.corpus.cleaning import clean_text
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.templates import RecordError, compile_template, is_template

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text (for a chat the turns' contents, for cleaning and hashing), a name, and a chat's turns.

    ``part`` counts the documents that one very long record was cut into; ``group`` is the value of ``heldout_by``.
    """

    text: str
    id: str
    messages: list[Message] | None = None
    part: int = 0
    group: str | None = None
    """Documents of one group lie on the same side; pairs are grouped by their question."""


def record_reader(config: SourceConfig) -> Callable[[Fields, str], Document]:
    """The function from a record's fields (and where it stands) to a document that the configuration asks for.

    Raises:
        RecipeError: a template is none.
        RecordError: (when called) the record has no such field, an empty text, or turns that are no chat.
    """
    base = _base_reader(config)
    if config.heldout_by is None:
        return base
    by = config.heldout_by
    group = compile_template(by, "heldout_by") if is_template(by) else lambda fields: _field(fields, by)
    return lambda fields, where: replace(base(fields, where), group=group(fields))


def _base_reader(config: SourceConfig) -> Callable[[Fields, str], Document]:
    if config.pairs:
        return _pair_reader(config)
    if config.messages is not None:
        return lambda fields, where: _chat(_turns(fields, cast(str, config.messages)), _name(fields, where))
    if config.user is not None:
        return _templated_chat(config)
    if is_template(config.text):
        render = compile_template(config.text, "text")
        return lambda fields, where: Document(_filled(render(fields), "the template"), _name(fields, where))
    what = f"the field '{config.text}'"
    return lambda fields, where: Document(_filled(_field(fields, config.text), what), _name(fields, where))


def _pair_reader(config: SourceConfig) -> Callable[[Fields, str], Document]:
    sources = {"prompt": config.prompt or "prompt", "chosen": config.chosen or "", "rejected": config.rejected or ""}
    renders = {
        role: compile_template(source, role) if is_template(source) else None for role, source in sources.items()
    }

    def part(fields: Fields, role: str, last: str) -> list[Message]:
        render, name = renders[role], sources[role]
        if render is not None:
            return [{"role": last, "content": render(fields)}]
        if name not in fields:
            raise RecordError(
                f"expected the field '{name}' of a pair, found {_names(fields)}; name it with {role} = ..."
            )
        value = fields[name]
        if isinstance(value, str):
            return [{"role": last, "content": value}]
        if isinstance(value, list) and value:
            return cast(list[Message], value)
        raise RecordError(f"expected text or turns in the field '{name}', found a {type(value).__name__}")

    def pair(fields: Fields, where: str) -> Document:
        prompt = part(fields, "prompt", "user")
        answers = [part(fields, role, "assistant") for role in ("chosen", "rejected")]
        chats = [_chat([*prompt, *answer], _name(fields, where)).messages or [] for answer in answers]
        chosen, rejected = (chat[-1]["content"] for chat in chats)
        if len(chats[0]) != len(chats[1]) or chats[0][:-1] != chats[1][:-1]:
            raise RecordError("expected two answers to one question, found chats that differ before their last turn")
        if _as_read(chosen, config) == _as_read(rejected, config):
            raise RecordError("expected two different answers, found the same one twice")
        turns = [*chats[0], Message(role="rejected", content=rejected)]
        question = "\n".join(turn["content"] for turn in chats[0][:-1])
        return Document("\n".join(turn["content"] for turn in turns), _name(fields, where), turns, group=question)

    return pair


def _as_read(text: str, config: SourceConfig) -> str:
    """A turn as it reaches the corpus: letters written in two ways, or line ends of two systems, are one there."""
    return clean_text(text) if config.clean.unicode else text


def _templated_chat(config: SourceConfig) -> Callable[[Fields, str], Document]:
    renders = [
        (role, compile_template(source, role))
        for role, source in (("system", config.system), ("user", config.user), ("assistant", config.assistant))
        if source is not None
    ]

    def chat(fields: Fields, where: str) -> Document:
        return _chat([{"role": role, "content": render(fields)} for role, render in renders], _name(fields, where))

    return chat


def _name(fields: Fields, where: str) -> str:
    for key in ("id", "key"):
        if isinstance(fields.get(key), str | int):
            return str(fields[key])
    return where


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise RecordError(f"expected text in {what}, found none")
    return text


def _field(fields: Fields, name: str) -> str:
    if name not in fields:
        raise RecordError(f"expected the field '{name}', found {_names(fields)}; {_advice(fields, name)}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError(f"expected text in the field '{name}', found a {type(value).__name__}; write a template such as "
                          f"text = \"{{{{ {name} | join(' ') }}}}\"")  # fmt: skip
    return value


def _names(fields: Fields) -> str:
    names = [str(k) for k in list(fields)[:8]]
    return "the fields " + ", ".join(names) if names else "no fields"


def _advice(fields: Fields, name: str) -> str:
    if is_sharegpt(fields):
        return 'this is a ShareGPT record (conversations of from and value): set messages = "conversations"'
    if isinstance(fields.get("messages"), list):
        return 'these are chats: set messages = "messages"'
    if {"chosen", "rejected"} <= fields.keys():
        return 'these are pairs of answers: set chosen = "chosen" and rejected = "rejected"'
    if {"prompt", "completion"} <= fields.keys():
        return 'these are prompts with completions: set user = "{{ prompt }}" and assistant = "{{ completion }}"'
    texts = [str(k) for k, v in fields.items() if isinstance(v, str)]
    near = difflib.get_close_matches(name, texts, 1) or sorted(texts, key=lambda k: -len(fields[k]))[:1]
    return f'set text = "{near[0]}"' if near else "name the field that holds the text"


def is_sharegpt(fields: Fields) -> bool:
    """Whether a record has the ShareGPT form: a list ``conversations`` of ``{from, value}``."""
    turns = fields.get("conversations")
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns)
    )


_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _turns(fields: Fields, name: str) -> list[Message]:
    if name not in fields:
        raise RecordError(
            f"expected the field '{name}' with a list of turns, found {_names(fields)}; {_advice(fields, name)}"
        )
    turns = fields[name]
    if name == "conversations" and is_sharegpt(fields):
        if odd := next((t["from"] for t in turns if not isinstance(t["from"], str)), None):
            raise RecordError(f"expected text in 'from' of a turn, found a {type(odd).__name__}")
        return [Message(role=_SHAREGPT.get(t["from"], t["from"]), content=t["value"]) for t in turns]  # pyright: ignore
    return cast(list[Message], turns)


def _chat(messages: list[Message], name: str) -> Document:
    try:
        turns = check_messages(messages, complete=True)
    except DataError as error:
        raise RecordError(f"{error.where}: {error.problem}; {error.fix}") from None
    return Document("\n".join(turn["content"] for turn in turns), name, turns)
