"""Long documents with questions at their end, made of real text: what a longer context is trained to look up.

Into real documents of a source, one after the other, sentences are put that state something of which nothing else in the text
tells: codes, contents of lockers, made-up facts. At the end all of them are asked for, in another order, beside passages of the
real text itself whose continuation is asked (after the synthetic long question-answering of arXiv 2404.06395, section 7.2).
Wordings, kinds of keys and filler are none of ``evaluate/passkey.py``: numbers have up to 12 digits there, never 5 or 10.

A recipe reads them as text from ``made:long/COUNT/CHARACTERS+SOURCE``, SOURCE being read with the same table: real documents that
the table's ``heldout`` keeps apart are never used. CHARACTERS is the length of the longest, a quarter of it that of the shortest;
5900-7000 states both, 5900-7000@150 also the characters of text for each thing that is asked (300), 5900-7000@150:40 that 40 %
of them, passages of the real text left out, are asked somewhere after what states them, and a seed may follow:
``made:long/1600/5900-7000@150:40/4+books.jsonl``. A pure function of that text and the name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import blake3

from windtunnel.base.errors import DataError
from windtunnel.corpus.cleaning import clean_text
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.fields import Document

PREFIX = "made:long/"
VERSION = 9
"""Part of every key: raised when the same name and text would give other documents."""
KINDS = {"code": 1, "locker": 1, "fact": 1, "quote": 1, "pair": 4}
"""How often each is drawn."""
DIGITS = (2, 3, 4, 6, 7, 8, 9, 11, 12)
"""Of many lengths, so that where a number ends has to be looked up too, and leaving any number of digits in its last token."""
MOST = 200_000
_NAME = re.compile(r"made:long/(\d{1,6})/(?:(\d{1,8})-)?(\d{1,8})(?:@(\d{1,6})(?::(\d{1,3}))?)?(?:/(\d{1,9}))?\+(.+)")
_LEAST = 60
_EVERY, _DENSEST = 300, 100
"""Characters of text for each thing that is asked, and the fewest that one takes."""
_ASKED = 64
_FEWEST_WORDS = 12
_LISTS, _ONE_LINK, _REPEATED = 0.3, 0.75, 0.5
"""Texts of nothing but pairs; those whose pairs are all joined by the same word, so that only the subject tells which of them
is meant; lists, and texts of sentences, that repeat a few again and again."""
_NUMBERS = 0.8
"""How many of the pairs that are asked for give a number, and how many of the others words: where it cannot tell which one is
meant, a model does best to answer with what stands there once."""
_READ = 48_000_000
"""Characters of real text that are kept at most."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])|\n+")
_THINGS = (
    "harbour", "archive", "observatory", "bakery", "cellar", "lighthouse", "orchard", "museum", "workshop", "station",
    "chapel", "library", "greenhouse", "mill", "theatre", "quarry", "stable", "depot", "kiosk", "studio", "vault",
    "attic", "canteen", "pier",
)  # fmt: skip
_NAMES = (
    "Alba", "Bruno", "Clara", "Dimitri", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leon", "Mara",
    "Nils", "Olga", "Pavel", "Rosa", "Sven", "Tilda", "Ugo", "Vera", "Wanda", "Yusuf", "Zora",
)  # fmt: skip
_FAMILIES = (
    "Adler", "Berg", "Castell", "Dorn", "Ekholm", "Falk", "Gruber", "Holt", "Ivers", "Janssen", "Krol", "Lund", "Moser",
    "Novak",
)  # fmt: skip
_FACTS = {
    "keeps a {}": (
        "What does {} keep?",
        ("falcon", "tortoise", "parrot", "goat", "ferret", "hedgehog", "donkey", "raven"),
    ),
    "was born in {}": (
        "Where was {} born?",
        ("Valmora", "Kestrel Bay", "Ostrand", "Tiberon", "Halvik", "Lower Pell", "Quint"),
    ),
    "plays the {}": ("What does {} play?", ("cello", "oboe", "harp", "trumpet", "zither", "bassoon", "lute", "tuba")),
    "collects {}": (
        "What does {} collect?",
        ("stamps", "coins", "maps", "shells", "clocks", "kettles", "masks", "buttons"),
    ),
}
_CODES = (
    ("The access code of the {thing} reads {key}.", "Which access code has the {thing}?"),
    ("To enter the {thing}, dial {key}.", "What must one dial for the {thing}?"),
    ("Note for the {thing}: its number is now {key}.", "Which number has the {thing} now?"),
)
_LINKS = {
    "is": 12, "was": 4, "has": 2, ":": 2, "=": 2, "belongs to": 1, "stands for": 1, "goes with": 1, "leads to": 1,
    "rhymes with": 1, "came after": 1, "weighs as much as": 1, "costs": 1, "means": 1, "equals": 1, "holds": 1, "and": 1,
    "of": 1, "as": 1, "for": 1, "in": 1, "got": 1, "->": 1, ",": 1, "or": 1,
}  # fmt: skip
"""How often each joins a pair. After the commonest, real text has the most other ways to go on."""
_AGAIN = (
    "Again:", "Once more:", "As stated:", "To repeat:", "Recall:", "So", "And {of}?", "What of {of}?", "Which was it for {of}?",
    "Tell me about {of}.", "Q: {of}? A:", "Asked: {of} {link} what? Answer:",
)  # fmt: skip
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class Asked:
    """One thing to look up: the sentence that is put into the text (none for a quote, which stands there), the question, the
    answer with what it repeats of the question, and the part of it that only the text tells."""

    kind: str
    sentence: str
    question: str
    answer: str
    key: str
    subject: str
    """What is asked about, however it is asked: once in a text."""


@dataclass(frozen=True)
class Made:
    """What a name asks for: documents, characters of the shortest, of the longest and for each thing asked, percent of the
    things that are asked before the end, seed, source."""

    count: int
    shortest: int
    longest: int
    every: int
    within: int
    seed: int
    source: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it but the source."""
        return self.count, self.shortest, self.longest, self.every, self.seed, *((self.within,) if self.within else ())


def parse(name: str) -> Made:
    """What a name ``made:long/COUNT/[SHORTEST-]LONGEST[@EVERY[:WITHIN]][/SEED]+SOURCE`` asks for.

    Raises:
        DataError: it is none.
    """
    match = _NAME.fullmatch(name)
    if match is not None:
        count, longest, every = int(match[1]), int(match[3]), int(match[4] or _EVERY)
        shortest = int(match[2]) if match[2] else longest // 4
        stated = shortest if match[2] else longest
        within, seed, source = int(match[5] or 0), int(match[6] or 0), match[7]
        fits = 1 <= count <= MOST and _LEAST <= stated <= longest and every >= _DENSEST and within <= 100
        if fits and not source.startswith("made:"):
            return Made(count, shortest, longest, every, within, seed, source)
    problem = f"expected made:long/COUNT/CHARACTERS+SOURCE, at most {MOST:,} documents of {_LEAST} characters or more"
    fix = (
        f"write for example made:long/2000/6000+books.txt, or 5000-6000@150:40 with {_DENSEST} or more for each thing asked and "
        "at most 100 % of them asked before the end"
    )
    raise DataError(name[:80], problem, fix)


def long_documents(name: str, real: Iterable[Document], config: SourceConfig) -> Iterator[Document]:
    """The documents that a name stands for.

    Args:
        real: documents of its source, read with the same table.
        config: the table; real documents that it holds out are left out.

    Raises:
        DataError: there is less real text than one document needs.
    """
    made = parse(name)
    texts, total = [], 0
    for document in real:
        if total < _READ and not document.messages and not _held_out(document, config):
            texts.append(document.text)
            total += len(document.text)
    if total < made.longest:
        raise DataError(name[:80], f"expected {made.longest:,} characters of text to put questions to, found {total:,}")
    for number in range(made.count):
        draw = random.Random(f"long {made.seed} {number}")
        length = round(made.longest * (made.longest / made.shortest) ** (draw.random() - 1))  # evenly in the logarithm
        text, _ = draw_text(draw, texts, length, made.every, made.within / 100)
        yield Document(text, f"long {made.seed} {number}")


def draw_text(
    draw: random.Random, texts: list[str], length: int, every: int = _EVERY, within: float = 0.0
) -> tuple[str, list[Asked]]:
    """A text of about that many characters over the real ``texts``, and what is asked in it."""
    words, link = _words(draw, texts), _link(draw) if draw.random() < _ONE_LINK else None
    if draw.random() < _LISTS:
        stated = _list(draw, words, length, link)
        named = {made.subject for made in stated}
        sentences = [made.sentence for made in stated]
        return compose(draw, sentences, length, every, words, link, {"pair": 1}, named, within)
    return compose(draw, _filler(draw, texts, length), length, every, words, link, within=within)


def compose(
    draw: random.Random, sentences: list[str], length: int, every: int = _EVERY, words: Sequence[str] = _THINGS,
    link: str | None = None, kinds: Mapping[str, int] = KINDS, named: Collection[str] = (), within: float = 0.0,
) -> tuple[str, list[Asked]]:  # fmt: skip
    """A text of that many characters, as near below it as whole sentences allow, and what is asked in it.

    Sentences that no question needs make way for the things that are asked; where those alone take more, it is longer.

    Args:
        words: of real text, for pairs that mean nothing.
        link: what joins the pairs; each draws its own where none is given.
        kinds: how often each is drawn.
        named: subjects of which the sentences say something already.
        within: the share of the things that are asked somewhere after what states them and not at the end.
    """
    wanted = max(1, min(_ASKED, length // every))
    asked, taken = [], set(named)
    while len(asked) < wanted:
        kind = draw.choices(tuple(kinds), tuple(kinds.values()))[0]
        made = _made(draw, kind, sentences, words, link)
        if made is None or made.subject in taken:
            made = _code(draw)
            if made.subject in taken:
                continue
        asked.append(made)
        taken.add(made.subject)
    body = _trimmed(sentences, asked, length)
    for made in asked:
        if made.sentence:
            body.insert(draw.randint(0, len(body)), made.sentence)
    draw.shuffle(asked)
    early = [made for made in asked if made.sentence][: round(within * len(asked))]
    for made in early:
        body.insert(draw.randint(body.index(made.sentence) + 1, len(body)), f"\n{made.question} {made.answer}")
    questions = "".join(f"\n{made.question} {made.answer}" for made in asked if made not in early)
    return " ".join(body).replace(" \n", "\n") + questions, asked


def _trimmed(sentences: list[str], asked: list[Asked], length: int) -> list[str]:
    """The sentences without as many of the last ones as the things asked need room for; those that are quoted stay."""
    quotes = [made.answer for made in asked if made.kind == "quote"]
    over = sum(len(made.sentence) + bool(made.sentence) + len(made.question) + len(made.answer) + 2 for made in asked)
    over += sum(len(sentence) + 1 for sentence in sentences) - 1 - length
    kept: list[str] = []
    for sentence in reversed(sentences):
        if over > 0 and not any(quote in sentence for quote in quotes):
            over -= len(sentence) + 1
        else:
            kept.append(sentence)
    return kept[::-1]


def _made(draw: random.Random, kind: str, sentences: list[str], words: Sequence[str], link: str | None) -> Asked | None:
    if kind == "quote":
        return _quote(draw, sentences) if sentences else None
    return _pair(draw, words, link) if kind == "pair" else _MAKERS[kind](draw)


def _code(draw: random.Random) -> Asked:
    sentence, question = draw.choice(_CODES)
    thing, key = _thing(draw), _key(draw)
    stated = sentence.format(thing=thing, key=key)
    return Asked("code", stated, question.format(thing=thing), stated, key, thing)


def _locker(draw: random.Random) -> Asked:
    thing, key = f"{draw.choice(_LETTERS)}{draw.choice(_LETTERS)}", _key(draw)
    stated = f"Locker {thing} holds item {key};"
    return Asked("locker", stated, f"Which item is in locker {thing}?", stated, key, thing)


def _fact(draw: random.Random) -> Asked:
    who, what = f"{draw.choice(_NAMES)} {draw.choice(_FAMILIES)}", draw.choice(tuple(_FACTS))
    question, values = _FACTS[what]
    value = draw.choice(values)
    stated = f"{who} {what.format(value)}."
    return Asked("fact", stated, question.format(who), stated, value, question.format(who))


def _pair(draw: random.Random, words: Sequence[str], link: str | None, numbers: float = _NUMBERS) -> Asked:
    """A few words that have nothing to do with each other, or a number: whatever follows can only be looked up."""
    of = " ".join(draw.choice(words) for _ in range(draw.choice((1, 2))))
    key = _key(draw) if draw.random() < numbers else " ".join(draw.choice(words) for _ in range(draw.choice((1, 2, 3))))
    link = link or _link(draw)
    stated = f"{of} {link} {key}."
    return Asked("pair", stated, draw.choice(_AGAIN).format(of=of, link=link), stated, key, of)


def _link(draw: random.Random) -> str:
    return draw.choices(tuple(_LINKS), tuple(_LINKS.values()))[0]


def _quote(draw: random.Random, sentences: list[str]) -> Asked | None:
    """A passage of the real text by its first five words; none if those stand there twice or nothing follows them."""
    words = draw.choice(sentences).split()
    begin, rest = " ".join(words[:5]), " ".join(words[5:13])
    if len(words) < 9 or " ".join(sentences).count(begin) != 1:
        return None
    return Asked("quote", "", f"How does the passage “{begin}” go on?", f"{begin} {rest}", rest, begin)


_MAKERS = {"code": _code, "locker": _locker, "fact": _fact}


def _thing(draw: random.Random) -> str:
    return f"{draw.choice(_NAMES)} {draw.choice(_THINGS)}" if draw.random() < 0.5 else draw.choice(_THINGS)


def _key(draw: random.Random) -> str:
    """Digits of an allowed length, or letters and digits."""
    digits = "".join(str(draw.randrange(10)) for _ in range(draw.choice(DIGITS)))
    if draw.random() < 0.75:
        return digits
    return f"{draw.choice(_LETTERS)}{draw.choice(_LETTERS)}-{digits[:3]}"


def _list(draw: random.Random, words: Sequence[str], length: int, link: str | None) -> list[Asked]:
    """Pairs that nobody asks for, ``length`` characters in all: each of something else, or a few again and again. What was said
    often, or after the same word, is not what was said of this."""
    few = _few(draw)
    out: list[Asked] = []
    room, named = length, set()
    while room > 0:
        if few and len(out) >= few:
            made = out[len(out) % few]
        elif (made := _pair(draw, words, link, 1 - _NUMBERS)).subject in named:
            room -= 1  # a document of few words ends too
            continue
        named.add(made.subject)
        out.append(made)
        room -= len(made.sentence) + 1
    return out


def _few(draw: random.Random) -> int:
    """After how many sentences a text says the same again; 0 for never."""
    return draw.choice((2, 3, 4, 5, 6)) if draw.random() < _REPEATED else 0


def _filler(draw: random.Random, texts: list[str], length: int) -> list[str]:
    """Sentences of consecutive real documents from a random one on, ``length`` characters in all, or a few of them again and
    again."""
    few = _few(draw)
    out, room, place = [], length, draw.randrange(len(texts))
    while room > 0:
        if few and len(out) >= few:
            out.append(out[len(out) % few][:room])
            room -= len(out[-1]) + 1
            continue
        for sentence in _SENTENCE.split(texts[place % len(texts)]):
            if room > 0 and sentence.strip():
                out.append(sentence.strip()[:room])
                room -= len(out[-1]) + 1
        place += 1
    return out


def _words(draw: random.Random, texts: list[str]) -> list[str]:
    """The words of one document, each once."""
    words = list(dict.fromkeys(word for word in re.findall(r"\w+", draw.choice(texts)) if len(word) > 2))
    return words if len(words) >= _FEWEST_WORDS else list(_THINGS)


def _held_out(document: Document, config: SourceConfig) -> bool:
    """Whether a real document lies on the held-out side of a corpus with this table."""
    own = document.group if document.group is not None else clean_text(document.text)
    return int.from_bytes(blake3.blake3(own.encode()).digest(8)) < int(config.heldout * 2.0**64)
