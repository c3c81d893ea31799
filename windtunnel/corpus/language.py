"""A guess at the language of a text: by script, and for Latin script by the most frequent short words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")), ("ko", re.compile("[\uac00-\ud7af]")), ("zh", re.compile("[\u4e00-\u9fff]")),
    ("ru", re.compile("[\u0400-\u04ff]")), ("el", re.compile("[\u0370-\u03ff]")), ("ar", re.compile("[\u0600-\u06ff]")),
    ("he", re.compile("[\u0590-\u05ff]")), ("hi", re.compile("[\u0900-\u097f]")), ("th", re.compile("[\u0e00-\u0e7f]")),
)  # fmt: skip
_WORDS = {
    "en": "the of and to in is that it was for with as on are this be by from not have",
    "de": "der die und das ist nicht mit ein eine den von zu sie auf für im dem wird werden auch",
    "fr": "le la les des et est une dans que pour pas sur du au par il elle avec sont plus",
    "es": "el los las que una por con para del se su como más pero sus está son fue este",
    "it": "il che di non per una sono con della del gli più anche alla nel dei come ha è lo",
    "pt": "que não uma para com os por mais das dos como mas foi ao ele são também seu pela em",
    "nl": "de het een van en niet dat zijn op voor met aan ook te er maar bij wordt door uit",
    "pl": "się nie że jest na do jak ale co to są przez dla od był jego który oraz po za",
    "sv": "och att det som är på för inte med av en ett den till har om jag var från kan",
}
_LISTS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import |#include|function |var |const |public |return\b|if \(|for \()",
    re.MULTILINE,
)
_SHOWN = 4000


def guess_language(text: str) -> str:
    """A two-letter code, ``code`` for source code, or ``?`` where nothing speaks for one."""
    text = text[:_SHOWN]
    letters = sum(c.isalpha() for c in text)
    for language, pattern in _SCRIPTS:
        if len(pattern.findall(text)) > (0.05 if language == "ja" else 0.3) * max(1, letters):
            return language
    if len(_CODE.findall(text)) > text.count("\n") / 12 + 1:
        return "code"
    words = re.findall(r"[^\W\d_]+", text.lower())
    score, best = max((sum(w in known for w in words), language) for language, known in _LISTS.items())
    return best if words and score > 0.08 * len(words) else "?"


def language_shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of characters by language, largest first."""
    sizes: dict[str, int] = {}
    for text in texts:
        language = guess_language(text)
        sizes[language] = sizes.get(language, 0) + len(text)
    total = max(1, sum(sizes.values()))
    return {language: size / total for language, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))}
