"""A chat in the terminal: answers stream as they are sampled and end at the end of the turn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TextIO

from windtunnel.base.errors import UserError
from windtunnel.corpus.chat import Message, render, stop_ids
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.model.sample import generate
from windtunnel.model.transformer import Transformer

_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?)?$|\ufffd{1,3}$")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Escape sequences; what may become one, or a character, with the next token; control characters and marks that reorder
text. Tab and line feed may pass."""


def chat(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_new: int = 256,
    seed: int = 0,
    template: str = "chatml",
    stream: TextIO | None = None,
    source: TextIO | None = None,
) -> None:
    """Reads a line, answers it, and so on. Lines that come from a file or pipe get one line of answer each.

    An empty line, Ctrl-D or Ctrl-C at the prompt ends the chat; Ctrl-C during an answer ends that answer. When the chat no
    longer fits the model's positions, its oldest turns are forgotten, which is said once.

    Args:
        prompt: answer this one line and end.
        system: an instruction that stands before all turns and is never forgotten.
        temperature, top_p, max_new, seed: see ``generate``; each answer draws from a seed of its own.
        template: how turns are marked, as in the chats that the model has read.
        stream: where answers go; standard output by default.
        source: where lines come from; standard input by default.
    """
    out, lines = stream or sys.stdout, source or sys.stdin
    turns: list[Message] = [{"role": "system", "content": system}] if system and system.strip() else []
    options = {"temperature": temperature, "top_p": top_p}
    talk = Conversation(model, tokenizer, turns, template, max_new)
    if prompt is not None:
        if not clean(prompt).strip():
            raise UserError("prompt", "expected a text, got none", "write a question")
        _answer(talk, clean(prompt).strip(), out, seed, options, one_line=False)
        return
    person = lines.isatty() and out.isatty()
    if person:
        print("An empty line or Ctrl-D ends.", file=out)
    try:
        for number, line in enumerate(_lines(lines, out, person)):
            text = clean(line).strip()
            if not text:
                if person:
                    break
                print(file=out)  # one line in, one answer out, even if it is empty
                continue
            if person:
                _answer_person(talk, text, out, seed + number, options)
            else:
                _answer(talk, text, out, seed + number, options, one_line=True)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    if person:
        print(file=out)


class Conversation:
    """The turns so far, and the ids that the model sees of them."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        turns: list[Message],
        template: str = "chatml",
        max_new: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.turns = model, tokenizer, turns
        self.template = template
        self.max_new, self.forgot = max_new, False

    def ask(self, text: str) -> list[int]:
        """Adds a user's turn and returns the ids to continue; drops the oldest turns while they leave too little room.

        Room is kept for an answer: ``max_new`` tokens, but at most half of the model's positions.

        Raises:
            UserError: this turn alone is too long, or the template refuses it; the chat is as it was.
        """
        limit = self.model.shape.max_positions
        room = limit - min(self.max_new, limit // 2)
        system = self.turns[:1] if self.turns and self.turns[0]["role"] == "system" else []
        recent: list[Message] = [*self.turns[len(system) :], {"role": "user", "content": text}]
        while True:
            ids, _ = render([*system, *recent], self.tokenizer, self.template, add_generation_prompt=True)
            if len(ids) <= room:
                break
            if len(recent) == 1:
                raise UserError("chat", f"expected a text of at most {room} tokens, got {len(ids)}", "shorten it")
            del recent[:2]
            self.forgot = True
        self.turns = [*system, *recent]
        return ids

    def answered(self, text: str) -> None:
        """Adds the model's turn; an empty one leaves no trace, with its question."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text.strip()})
        else:
            self.turns.pop()

    def stream(self, ids: list[int], **options: float | int) -> Iterator[str]:
        """The answer in pieces of text: whole characters, no control characters, end of turn left out."""
        stop = stop_ids(self.tokenizer, self.template)
        pieces = Pieces(self.tokenizer)
        for token in generate(self.model, ids, max_new=self.max_new, stop=stop, **options):  # type: ignore[arg-type]
            if token in stop:
                break
            yield pieces.add(token)
        yield pieces.rest()


class Pieces:
    """Turns ids into text as they come; holds back what the next token may still change."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.shown = tokenizer, 0
        self.ids: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self.ids.append(token)
        return self._new(_UNFINISHED.sub("", self.tokenizer.decode(self.ids)))

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        text = clean(text)
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def _answer(
    talk: Conversation, text: str, out: TextIO, seed: int, options: dict[str, float], *, one_line: bool
) -> None:
    """One turn: question in, answer streamed and kept, as far as it came."""
    ids, said = talk.ask(text), ""
    try:
        for piece in talk.stream(ids, seed=seed, **options):
            print(piece.replace("\n", " ") if one_line else piece, end="", flush=True, file=out)
            said += piece
    finally:
        print(flush=True, file=out)
        talk.answered(said)


def _answer_person(talk: Conversation, text: str, out: TextIO, seed: int, options: dict[str, float]) -> None:
    """One turn with somebody at the keyboard: Ctrl-C ends the answer only, and a bad line is explained and forgotten."""
    forgot = talk.forgot
    try:
        _answer(talk, text, out, seed, options, one_line=False)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(error, file=out)
    if talk.forgot and not forgot:
        print("(The oldest turns no longer fit and are forgotten.)", file=out)


def _lines(source: TextIO, out: TextIO, person: bool) -> Iterator[str]:
    while True:
        if person:
            print("> ", end="", flush=True, file=out)
        line = source.readline()
        if not line:
            return
        yield line


def clean(text: str) -> str:
    """Text without escape sequences and control characters, safe to print on a terminal."""
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))
