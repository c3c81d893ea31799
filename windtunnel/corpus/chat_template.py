"""Chat templates of one's own: a Jinja text in the sandbox of records, its marks and the turns' contents kept apart.

The template is rendered with a placeholder for each content; what stands around the placeholders is its markup. Control tokens
are looked for in the markup and nowhere else, so that none can come from what somebody typed. The markup follows from the order
of the roles alone: each chat is also rendered as it is, and refused where that reads otherwise.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

from jinja2 import TemplateError

from windtunnel.base.errors import DataError
from windtunnel.corpus.templates import RecordError, compile_template, is_template
from windtunnel.corpus.tokenizer_config import SPECIAL_TOKENS

NAMED = ("chatml", "minicpm")
"""Templates that have a name; every other one is a Jinja text."""
BOS, EOS = SPECIAL_TOKENS[1:3]
_BEGIN, _END = "\ue000", "\ue001"
_PLACE = re.compile(f"{_BEGIN}([0-9]{{1,6}}){_END}")
"""Private-use characters around the number of a turn. Contents are never searched for them."""
_CONTROL = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
_ROUNDS = 3
"""Questions with answers of the longest chat that a template is tried on: a first, a middle and a last one."""
_MARKUP = 1 << 20
_SHOWN = 24
_SAID = 80


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Part:
    """A run of ids in the making: text to encode or a control id, and whether it is scored."""

    text: str | None
    control: int
    scored: bool


Plan = tuple[Part | int, ...]
"""The markup of a chat, with the numbers of the turns whose contents stand between."""


def shortened(template: str, limit: int = 40) -> str:
    """A template as one line of a message has room for it."""
    text = " ".join(template.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@lru_cache(64)
def check_template(template: str) -> None:
    """Tries a template on chats with and without a system turn, of one question with its answer and of several.

    Raises:
        DataError: no known name and no Jinja text; one that fails or exceeds the limits; that leaves out or changes what users
            and assistants say; that does not begin with ``<s>``; whose answers end with no control token; or that asks in
            another way than it trains.
        RecipeError: no Jinja text of the sandbox.
    """
    if template in NAMED:
        return
    if not is_template(template):
        close = difflib.get_close_matches(template, NAMED, 1, 0.5)
        fix = f"did you mean '{close[0]}'?" if close else "a Jinja template loops over messages: {% for message in …"
        raise DataError(
            "template", f"expected 'chatml', 'minicpm' or a Jinja template, got {shortened(template)!r}", fix
        )
    samples = _samples()
    for chat in samples:
        parts_of(template, chat)
    for chat in samples:
        roles = tuple(turn["role"] for turn in chat)
        for number in (n for n, role in enumerate(roles) if role == "assistant"):
            parts_of(template, chat[:number], prompt=True)
            trained = _plan(template, roles, False)
            asked, before = _plan(template, roles[:number], True), trained[: trained.index(number)]
            if asked != before:
                got, wanted = (_text(plan, chat)[-_SHOWN:] for plan in (asked, before))
                problem = f"expected a question to begin as in training, got {got!r} before an answer, not {wanted!r}"
                raise DataError("template", problem, "let add_generation_prompt write what stands before an answer")


def answer_ends(template: str) -> tuple[str, ...]:
    """The control tokens at which the answers of a Jinja template end, in the order of the vocabulary."""
    plans = [_plan(template, tuple(turn["role"] for turn in chat), False) for chat in _samples()]
    found = {part.control for plan in plans for part in plan if isinstance(part, Part) and _ends_an_answer(part)}
    return tuple(SPECIAL_TOKENS[i] for i in sorted(found))


def parts_of(template: str, turns: Sequence[Message], *, prompt: bool = False) -> list[Part]:
    """The parts of a chat under a Jinja template. Scored are the answers, and the markup up to the control token that ends each.

    Args:
        turns: as ``check_messages`` returns them.
        prompt: what ``add_generation_prompt`` says to the template.

    Raises:
        DataError: the template fails or exceeds its limits, leaves a turn out, changes a content or does not end an answer.
    """
    plan = _plan(template, tuple(turn["role"] for turn in turns), prompt)
    if _text(plan, turns) != rendered(template, turns, prompt):
        raise DataError(
            "template", "expected contents as they are, but the template changes them or looks into them",
            "write message['content'], with trim at most",
        )  # fmt: skip
    return [_filled(slot, turns) for slot in plan]


@lru_cache(128)
def _plan(template: str, roles: tuple[str, ...], prompt: bool) -> Plan:
    places = [Message(role=role, content=f"{_BEGIN}{number}{_END}") for number, role in enumerate(roles)]
    pieces = _PLACE.split(rendered(template, places, prompt))
    if sum(map(len, pieces)) > _MARKUP:
        raise DataError(
            "template", f"expected at most {_MARKUP:,} characters of marks around {len(roles)} turns, got more"
        )
    _check_order([int(number) for number in pieces[1::2]], roles)
    plan: list[Part | int] = []
    answering = False
    for at, piece in enumerate(pieces):
        if at % 2:
            _check_end(answering, plan)
            plan.append(int(piece))
            answering = roles[int(piece)] == "assistant"
            continue
        for text in filter(None, _CONTROL.split(piece)):
            control = text in SPECIAL_TOKENS
            plan.append(Part(None, SPECIAL_TOKENS.index(text), answering) if control else Part(text, 0, answering))
            answering = answering and not control
    _check_end(answering, plan)
    # Rows that are slices of a stream know by this token, and by no other, where a document begins.
    begins = [
        at for at, slot in enumerate(plan) if isinstance(slot, Part) and slot.control == SPECIAL_TOKENS.index(BOS)
    ]
    if begins != [0]:
        where = "none" if not begins else "it elsewhere" if len(begins) == 1 else f"it {len(begins)} times"
        raise DataError("template", f"expected a chat to begin with {BOS} and hold it once, got {where}",
                        "write {{- bos_token }} before the loop, and nowhere else")  # fmt: skip
    return tuple(plan)


def _check_order(found: list[int], roles: tuple[str, ...]) -> None:
    """What users and assistants say stands there once and in order; a system turn may be left out or repeated."""
    said = [number for number in found if number >= len(roles) or roles[number] != "system"]
    wanted = [number for number, role in enumerate(roles) if role != "system"]
    if said == wanted:
        return
    wrong = next((number for number in wanted if said.count(number) != 1), None)
    got = "another order" if wrong is None else f"that of turn {wrong + 1} ({roles[wrong]}) {said.count(wrong)} times"
    raise DataError(
        "template", f"expected the content of each user and assistant turn once and in order, got {got}",
        "write message['content'] once for each message",
    )  # fmt: skip


def _check_end(answering: bool, plan: list[Part | int]) -> None:
    if answering:
        last = plan[-1]
        got = repr(last.text[:_SHOWN]) if isinstance(last, Part) and last.text else "nothing"
        raise DataError(
            "template", f"expected each answer to end with a control token such as <|im_end|> or </s>, got {got} after one",
            "a model that learns no end does not stop: write eos_token after an assistant's content",
        )  # fmt: skip


def rendered(template: str, turns: Sequence[Message], prompt: bool) -> str:
    """A chat as one text under a Jinja template, as other libraries tokenise it.

    Raises:
        DataError: the template fails, refuses the chat or exceeds its limits.
    """
    fields: dict[str, Any] = {
        "messages": [dict(turn) for turn in turns], "add_generation_prompt": prompt, "bos_token": BOS, "eos_token": EOS,
        "raise_exception": _refuse,
    }  # fmt: skip
    try:
        return _compiled(template)(fields)
    except RecordError as error:
        roles = ", ".join(turn["role"] for turn in turns[:3]) + (", …" if len(turns) > 3 else "")
        fix = "it knows messages (role and content), add_generation_prompt, bos_token and eos_token"
        raise DataError("template", f"expected a template that marks the turns {roles}, but {error}", fix) from None


@lru_cache(16)
def _compiled(template: str) -> Any:
    return compile_template(template, "template", chat=True)


def _refuse(message: object) -> str:
    """What templates call to refuse a chat."""
    raise TemplateError(f"it says {str(message)[:_SAID]!r}")


def _filled(slot: Part | int, turns: Sequence[Message]) -> Part:
    return slot if isinstance(slot, Part) else Part(turns[slot]["content"], 0, turns[slot]["role"] == "assistant")


def _text(plan: Sequence[Part | int], turns: Sequence[Message]) -> str:
    parts = (_filled(slot, turns) for slot in plan)
    return "".join(SPECIAL_TOKENS[part.control] if part.text is None else part.text for part in parts)


def _ends_an_answer(part: Part) -> bool:
    return part.text is None and part.scored


def _samples() -> list[list[Message]]:
    """Chats whose contents a filter would change: letters of both cases, several lines, marks that HTML escapes."""
    out: list[list[Message]] = []
    for rounds in range(1, _ROUNDS + 1):
        chat: list[Message] = []
        for number in range(1, rounds + 1):
            chat.append({"role": "user", "content": f"Is {number} < 2?\n\nSay  YES or no."})
            chat.append({"role": "assistant", "content": f"The ANSWER to <{number}>\nis “yes” & that's it."})
        out += [chat, [{"role": "system", "content": "Be BRIEF.\nUse <tags>, “quotes”  & so on."}, *chat]]
    return out
