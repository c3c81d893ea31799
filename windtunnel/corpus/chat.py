"""Chats to ids and masks, built from ids: a control token never comes from what somebody typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from windtunnel.base.errors import DataError
from windtunnel.corpus.chat_template import Message, Part, answer_ends, check_template, parts_of
from windtunnel.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer

ROLES = ("system", "user", "assistant")
_FORM = 'a turn is for example {"role": "user", "content": "Hi"}'
USER_MARK, ASSISTANT_MARK = "<用户>", "<AI>"

CHATML_JINJA = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The same rendering as a Hugging Face chat template, to be tokenised without added special tokens."""
MINICPM_JINJA = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '<用户>' }}{%- elif message['role'] == 'assistant' %}{{- '<AI>' }}{%- endif %}"
    "{{- message['content'] | trim }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<AI>' }}{%- endif %}"
)
"""The text of ``minicpm``; as one string its marks may share a token with what stands beside them."""
_ENDS = {"chatml": "<|im_end|>", "minicpm": "</s>"}


def check_messages(messages: object, *, complete: bool = False) -> list[Message]:
    """The turns, contents stripped of surrounding white space.

    Args:
        messages: a list of ``{role, content}``: at most one system turn first, then user and assistant in turn.
        complete: also require an answer at the end, as training does.

    Raises:
        DataError: another form, an unknown role, an empty turn, turns out of order, no answer at the end.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("messages", "expected a list of turns {role, content}", _FORM)
    turns: list[Message] = []
    for number, message in enumerate(cast(Sequence[Any], messages), 1):
        turns.append(_turn(message, f"turn {number}", turns))
    if turns[-1]["role"] == "system" or (complete and turns[-1]["role"] != "assistant"):
        raise DataError(
            f"turn {len(turns)}", f"expected an answer at the end, found {turns[-1]['role']}", "add the answer"
        )
    return turns


def _turn(message: Any, where: str, before: list[Message]) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= cast(dict[str, Any], message).keys():
        raise DataError(where, "expected an object with role and content", _FORM)
    role, content = cast(dict[str, Any], message)["role"], cast(dict[str, Any], message)["content"]
    if role not in ROLES:
        raise DataError(
            where, f"expected the role system, user or assistant, got {role!r}", "rename or remove the turn"
        )
    if isinstance(content, list):
        raise DataError(
            where, f"expected text in the {role} turn, found a list of parts", "join their texts into one string"
        )
    if not isinstance(content, str) or not content.strip():
        raise DataError(where, f"expected text in the {role} turn, found none", "remove the chat or fill the turn")
    last = before[-1]["role"] if before else None
    expected = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[last]
    if role not in expected:
        raise DataError(
            where, f"expected the role {' or '.join(expected)}, got {role}", "let user and assistant take turns"
        )
    return {"role": role, "content": content.strip()}


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: str = "chatml",
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids of a chat and a mask of equal length: 1 where a token is the assistant's, end of turn included.

    ``chatml``: ``<s>``, then for each turn ``<|im_start|>role\\ncontent<|im_end|>\\n``. ``minicpm`` (arXiv 2404.06395, released
    code): ``<s>``, then ``<用户>question<AI>answer</s>``, marks and contents encoded apart. Or a Jinja text, see
    ``corpus/chat_template.py``.

    Raises:
        DataError: turns that are no chat, see ``check_messages``; a template that cannot mark them, see ``check_template``.
    """
    ((ids, mask),) = render_batch([messages], tokenizer, template, add_generation_prompt)
    return ids.tolist(), mask.tolist()


def render_batch(
    chats: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    template: str = "chatml",
    add_generation_prompt: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``render`` for many chats with one call of the tokenizer: ids int64 [n] and mask uint8 [n] for each."""
    check_template(template)
    plans = [_parts(check_messages(list(chat)), tokenizer, template, add_generation_prompt) for chat in chats]
    texts = [part.text for plan in plans for part in plan if part.text is not None]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered: list[tuple[np.ndarray, np.ndarray]] = []
    for plan in plans:
        ids: list[int] = []
        mask: list[int] = []
        for part in plan:
            run = next(encoded) if part.text is not None else [part.control]
            ids.extend(run)
            mask.extend([int(part.scored)] * len(run))
        rendered.append((np.array(ids, np.int64), np.array(mask, np.uint8)))
    return rendered


def _parts(turns: list[Message], tokenizer: Tokenizer, template: str, prompt: bool) -> list[Part]:
    if template == "chatml":
        return _chatml(turns, tokenizer, prompt)
    if template == "minicpm":
        return _minicpm(turns, tokenizer, prompt)
    return parts_of(template, turns, prompt=prompt)


def _chatml(turns: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[Part]:
    # Role and content are encoded apart. As contents are stripped, the pattern always ends a token at the line end between
    # them, so the ids equal those of the whole string.
    parts = [Part(None, tokenizer.bos_id, False)]
    for turn in turns:
        scored = turn["role"] == "assistant"
        parts += [Part(None, tokenizer.im_start_id, False), Part(turn["role"] + "\n", 0, False)]
        parts += [Part(turn["content"], 0, scored), Part(None, tokenizer.im_end_id, scored), Part("\n", 0, False)]
    if prompt:
        parts += [Part(None, tokenizer.im_start_id, False), Part("assistant\n", 0, False)]
    return parts


def _minicpm(turns: list[Message], tokenizer: Tokenizer, prompt: bool) -> list[Part]:
    parts = [Part(None, tokenizer.bos_id, False)]
    for number, turn in enumerate(turns, 1):
        for mark in (USER_MARK, ASSISTANT_MARK):
            if mark in turn["content"]:  # the marks are plain text, so a content that holds one would forge a turn
                problem = f"expected no {mark} inside a turn of the template 'minicpm'"
                raise DataError(f"turn {number}", problem, 'use template = "chatml"')
        scored = turn["role"] == "assistant"
        if turn["role"] != "system":
            parts.append(Part(ASSISTANT_MARK if scored else USER_MARK, 0, False))
        parts.append(Part(turn["content"], 0, scored))
        if scored:
            parts.append(Part(None, tokenizer.eos_id, True))
    if prompt:
        parts.append(Part(ASSISTANT_MARK, 0, False))
    return parts


def pair_of(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The two chats of a stored pair, whose last turn is the worse answer: the better answer's, the worse answer's."""
    *prompt, chosen, rejected = turns
    return [*prompt, chosen], [*prompt, Message(role="assistant", content=rejected["content"])]


def last_answer(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A rendered chat whose mask covers its last answer only: the earlier ones belong to the question."""
    scored = np.flatnonzero(mask)
    gaps = np.flatnonzero(np.diff(scored) > 1)
    kept = scored[gaps[-1] + 1 :] if len(gaps) else scored
    only = np.zeros_like(mask)
    only[kept] = 1
    return ids, only


def stop_ids(tokenizer: Tokenizer, template: str = "chatml") -> set[int]:
    """The ids at which an answer ends: that of ``</s>``, and of what ends the answers in the data."""
    return {tokenizer.eos_id, *(SPECIAL_TOKENS.index(token) for token in ends_of(template))}


def ends_of(template: str) -> tuple[str, ...]:
    """The control tokens that end the answers of a template."""
    if template in _ENDS:
        return (_ENDS[template],)
    return answer_ends(template)


def jinja_of(template: str) -> str:
    """A template as Hugging Face reads it."""
    return {"chatml": CHATML_JINJA, "minicpm": MINICPM_JINJA}.get(template, template)
