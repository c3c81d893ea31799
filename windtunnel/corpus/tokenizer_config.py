"""The table ``[tokenizer]`` of a recipe."""

from __future__ import annotations

from pydantic import Field

from windtunnel.base.config import Config, Tuple

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""The control tokens of every vocabulary: ids 0 to 4 in this order."""
SMALLEST_VOCABULARY = 261
"""256 bytes and 5 special tokens."""
LARGEST_VOCABULARY = 1 << 18


class TokenizerConfig(Config):
    """A byte-level BPE trained on the program's own text, or an existing one."""

    vocab: int = Field(
        default=4096,
        ge=SMALLEST_VOCABULARY,
        le=LARGEST_VOCABULARY,
        description="size of the vocabulary, special tokens included; small models want small ones",
        examples=[4096],
    )
    corpora: Tuple[str] | None = Field(
        default=None,
        min_length=1,
        description="corpora that it is trained on; without it, those of the trunk's mixture",
        examples=[["wiki"]],
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="folder of an existing tokenizer, used as it is; nothing is trained",
        examples=["my-tokenizer"],
    )
