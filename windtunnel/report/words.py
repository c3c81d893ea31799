"""The words of a report, each in one plain sentence. A word is explained where it first appears and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "forecast": "The loss that a run should reach, worked out from much smaller runs before it starts.",
        "sealed": "Written to a file that carries a hash of its own content, so that any later change would show.",
        "hash": "A short fingerprint of a file: change one letter and the fingerprint changes.",
        "outcome": "The loss that the finished run did reach.",
        "loss": "How badly a model predicts text: lower is better.",
        "held-out": "Set aside by document before training, never learned from, used only to score.",
        "bits per byte": "The loss in the unit of file compression: how many bits the model needs for one byte of text.",
        "interval": "A range that should hold the outcome in the stated share of cases, if the method is honest.",
        "proxy": "A tiny model of the same family that is trained in place of the big one.",
        "naive forecast": "What a simple rule would say: the bar that a forecast has to beat.",
        "parameters": "The numbers inside a model that training adjusts.",
        "tokens": "Pieces of words: a model reads and writes text as a row of them.",
        "blind": "This corpus and size had never been trained here when law and interval were fixed.",
        "rehearsal": "The target had been trained here before, so this forecast tests the method but counts for no record.",
        "corpus": "A named body of text, cleaned and cut into tokens, with a train part and a held-out part.",
        "mixture": "The share of training tokens that comes from each corpus.",
        "trunk": "The long run at a constant learning rate, from which every finished model is grown.",
        "branch": "A finished model, grown out of one long run that all finished models share.",
        "learning rate": "How large a step training takes each time it corrects the model.",
        "tunnel": "The tests on tiny models that come before the big run, as a wind tunnel comes before the aeroplane.",
        "trial": "One tiny training run of the tunnel with its own settings.",
        "valley": "The low stretch of the loss around the best setting: the wider it is, the less the exact value matters.",
        "transfer": "A setting found on a small model that is also best on a larger one.",
        "parametrization": "The rule by which initial weights and learning rates follow a model's width and depth.",
        "regret": "What a large model gives away by using the small model's best setting in place of its own.",
        "drift": "How far the best setting moves between the smallest and the largest model.",
        "batch": "The tokens that a model reads between one correction and the next.",
        "critical batch": "The largest batch that costs hardly more than a small one, at one point of a run.",
        "noise scale": "The batch at which chance and signal in a step's correction are equally large.",
        "law": "A formula for the loss given the number of parameters and of training tokens, fitted to small runs.",
        "decay": "The last part of training, where the learning rate falls and the loss drops quickly.",
        "checkpoint": "A saved copy of a model in the middle of training.",
        "nats per token": "The loss as the training loop counts it; one nat is 1.44 bits, and a token is a few bytes.",
        "FLOPs": "Single additions and multiplications: the machine-independent price of training.",
        "pairs of answers": "Two answers to one question, of which one is known to be better.",
        "reward": "How much likelier a model has made an answer than the model that it grew from found it.",
        "log-likelihood": "How likely a model finds a text, on a scale where one unit less is about a third as likely.",
        "divergence": "How different the words are that two models would write next.",
        "samples": "Texts that the model writes when nothing is asked of it.",
        "provenance": "Where every number on this page comes from.",
        "seed": "The number that fixes every random choice, so that a run can be repeated exactly.",
    }
)


_INFLECTED = {
    "corpus": "corpus|corpora",
    "proxy": "proxy|proxies",
    "branch": "branch|branches",
    "sealed": "sealed|seal",
    "pairs of answers": "pairs of answers",
}
_PATTERNS = {
    word: re.compile(rf"\b(?:{_INFLECTED.get(word, re.escape(word) + 's?')})\b", re.IGNORECASE) for word in WORDS
}


class Words:
    """Hands out explanations, each once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def first_in(self, text: str) -> list[tuple[str, str]]:
        """(word, sentence) for each word that a text uses for the first time, in order of appearance.

        Words that only an explanation uses follow directly behind it.
        """
        out: list[tuple[str, str]] = []
        for word in words_in(text):
            if word not in self._said:
                self._said.add(word)
                out.append((word, WORDS[word]))
                out.extend(self.first_in(WORDS[word]))
        return out


def words_in(text: str) -> list[str]:
    """The explained words that a text uses, in order of appearance."""
    found = [(match.start(), word) for word, pattern in _PATTERNS.items() if (match := pattern.search(text))]
    return [word for _, word in sorted(found)]
