"""Unicode and control-character hygiene, and the record of what cleaning dropped."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

STEPS = ("unicode", "short", "exact", "near", "decontaminate")
KEPT_EXAMPLES = 10
_EXCERPT = 300
# C0 and C1 controls other than tab and line end, DEL, zero-width no-break space, interlinear marks, non-characters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff]")
_LINE_END = re.compile("\r\n?|\u2028|\x85|\x0c|\x0b")


def clean_text(text: str) -> str:
    """NFC, line ends as \\n, no control characters but tab and line end, no white space around.

    Applying it twice changes nothing more.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.replace("\u2029", "\n\n"))
    text = _LINE_END.sub("\n", text)
    cleaned = _CONTROL.sub("", text)
    if cleaned is not text and not cleaned.isascii():
        cleaned = unicodedata.normalize("NFC", cleaned)  # a removed character may have parted a letter from its accent
    return cleaned.strip()


@dataclass
class Dropped:
    """How many documents a step dropped (``unicode``: changed), with up to ten examples."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def add(self, text: str, because: str, document: str) -> None:
        """Counts a document; ``because`` is its counterpart: the kept twin, the test text, or the text after the change."""
        self.count += 1
        if len(self.examples) < KEPT_EXAMPLES:
            self.examples.append({"document": document, "text": excerpt(text), "against": excerpt(because)})


def excerpt(text: str) -> str:
    """The beginning of a text, for people."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
