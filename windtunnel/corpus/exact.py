"""Questions with one right answer, computed: arithmetic, sorting, counting. Made from a seed, held out by construction.

A question's key says what is asked, however it is worded: 3 + 4 and 4 + 3 have one key. Whether a key is held out follows from
its hash alone, so no training question, of any seed or count, asks what a held-out one asks. A recipe reads training questions
from the source ``made:exact/COUNT`` as chats (``messages``) or as pairs (``prompt``, ``chosen``, ``rejected``).
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import blake3

from windtunnel.base.errors import DataError
from windtunnel.corpus.files import File

HELD_OUT = 0.1
"""Share of the keys that only evaluation asks."""
MOST = 1_000_000
_SOURCE = re.compile(r"made:exact/(\d{1,7})(?:/(\d{1,9}))?")
_THINGS = (
    "apple", "bread", "candle", "door", "engine", "flower", "garden", "house", "island", "jacket", "kitchen", "lamp", "mirror",
    "needle", "orange", "paper", "river", "stone", "table", "window",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question: its task, its key, its words, the numbers of its right answer, a right and a wrong reply."""

    task: str
    key: str
    text: str
    answer: tuple[int, ...]
    right: str
    wrong: str

    def accepts(self, reply: str) -> bool:
        """Whether a reply is right: a sorted list in full and in order; otherwise its last number, however it is worded."""
        numbers = tuple(int(digits) for digits in re.findall(r"\d{1,18}", reply))
        return numbers == self.answer if self.task == "sorting" else numbers[-1:] == self.answer

    def record(self) -> dict[str, object]:
        """As a line of JSONL, for chats and for pairs."""
        turns = [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.right}]
        return {
            "messages": turns, "prompt": self.text, "chosen": self.right, "rejected": self.wrong, "key": self.key,
            "task": self.task,
        }  # fmt: skip


def _addition(draw: random.Random) -> Question:
    a, b = draw.randint(1, 99), draw.randint(1, 99)
    asked = draw.choice(("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.")).format(a=a, b=b)
    wrong = _other(draw, a + b)
    return Question(
        "addition", f"add {min(a, b)} {max(a, b)}", asked, (a + b,), f"{a} + {b} = {a + b}.", f"{a} + {b} = {wrong}."
    )


def _subtraction(draw: random.Random) -> Question:
    b, a = sorted((draw.randint(1, 99), draw.randint(1, 99)))
    asked = draw.choice(("What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.")).format(a=a, b=b)
    wrong = _other(draw, a - b)
    return Question(
        "subtraction", f"subtract {a} {b}", asked, (a - b,), f"{a} - {b} = {a - b}.", f"{a} - {b} = {wrong}."
    )


def _sorting(draw: random.Random) -> Question:
    numbers = draw.sample(range(1, 100), draw.randint(3, 4))
    right = sorted(numbers)
    wrong = right[:]
    while wrong == right:
        draw.shuffle(wrong)
    asked = f"Sort these numbers from smallest to largest: {_listed(numbers)}."
    return Question(
        "sorting", f"sort {_listed(right)}", asked, tuple(right), f"{_listed(right)}.", f"{_listed(wrong)}."
    )


def _counting(draw: random.Random) -> Question:
    things = [draw.choice(_THINGS) for _ in range(draw.randint(2, 6))]
    thing = draw.choice(things)
    count = things.count(thing)
    wrong = _other(draw, count)
    asked = f'How often does "{thing}" occur in this list: {", ".join(things)}?'
    return Question(
        "counting", f"count {thing} in {' '.join(sorted(things))}", asked, (count,), f'"{thing}" occurs {_times(count)}.',
        f'"{thing}" occurs {_times(wrong)}.',
    )  # fmt: skip


def _other(draw: random.Random, right: int) -> int:
    return draw.choice([value for value in range(max(0, right - 3), right + 4) if value != right])


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _times(count: int) -> str:
    return f"{count} time{'' if count == 1 else 's'}"


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "addition": _addition, "subtraction": _subtraction, "sorting": _sorting, "counting": _counting,
}  # fmt: skip


def is_held_out(key: str) -> bool:
    """Whether a question of this key is kept for evaluation."""
    # With a word in front: a corpus that splits by the same key must not find all of its own held-out questions gone.
    return int.from_bytes(blake3.blake3(f"exact {key}".encode()).digest()[:4], "big") < HELD_OUT * 2**32


def questions(
    count: int, seed: int = 0, *, held_out: bool, tasks: tuple[str, ...] = tuple(TASKS)
) -> Iterator[Question]:
    """``count`` questions of each task in turn, those that are held out or those that are not; the same for the same seed."""
    draw = random.Random(f"{seed} {held_out}")
    for _ in range(count):
        for task in tasks:
            made = TASKS[task](draw)
            while is_held_out(made.key) != held_out:
                made = TASKS[task](draw)
            yield made


def made_file(name: str) -> File:
    """The file that ``made:exact/COUNT`` or ``made:exact/COUNT/SEED`` stands for: COUNT training questions as JSONL.

    Raises:
        DataError: another name, or more than a million questions.
    """
    match = _SOURCE.fullmatch(name)
    count = int(match[1]) if match else 0
    if match is None or not 1 <= count <= MOST:
        raise DataError(
            name[:80], f"expected made:exact/COUNT with at most {MOST:,}", "write for example made:exact/20000"
        )
    seed, tasks = int(match[2] or 0), len(TASKS)

    def opener() -> io.BytesIO:
        made = questions(-(-count // tasks), seed, held_out=False)
        lines = (json.dumps(question.record()) for question, _ in zip(made, range(count), strict=False))
        return io.BytesIO("".join(f"{line}\n" for line in lines).encode())

    return File(f"{name}.jsonl", opener)
