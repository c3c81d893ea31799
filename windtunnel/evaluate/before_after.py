"""A post-trained model beside the one that it grew from: exact answers, whether answers end, preferences, divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from windtunnel.corpus.chat import stop_ids
from windtunnel.corpus.store import open_corpus
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate.answers import answers, heldout_prompts, stops
from windtunnel.evaluate.divergence import divergence
from windtunnel.evaluate.exact import score_exact
from windtunnel.evaluate.preference import score_pairs
from windtunnel.model.transformer import Transformer
from windtunnel.train.checkpoint import load_model

PROMPTS = 400
"""Held-out prompts of each corpus that are answered: where all of them end, the 95 % interval begins above 99 %."""
_EXACT = 100
"""Computed questions of each task."""
_BEFORE = 100
"""Prompts of each corpus that a model answers which has learnt no chats: few of its answers end, so that each costs the most."""
_ROWS = 2
"""Rows of tokens after which an answer has not ended by itself; no answer in the data is longer than one."""
_COMPARED = 64
"""Prompts of each corpus of pairs that both models answer: what counts there are the pairs, and every held-out one is scored."""


def answering(
    model: Transformer, tokenizer: Tokenizer, row: int, *, template: str, corpora: Mapping[str, str], parent: str,
    pairs: bool,
) -> dict[str, Any]:  # fmt: skip
    """The same measures of a model and of its parent, under ``before`` and ``after``.

    ``exact``: computed questions. ``stops``, by corpus: share of answers to held-out prompts that end by themselves within two
    rows of tokens and the model's positions, without sampling, which is the one that counts: it is the same each time, and a
    loop does not end in it. ``sampled_stops``: the same at temperature 1. With ``pairs`` also ``preferences``: accuracy on
    held-out pairs; and ``divergence`` from the parent on the model's own answers.

    Args:
        row: tokens of a training row.
        corpora: folders of the corpora of chats or pairs, by name.
        parent: folder of the parent's checkpoint.
    """
    before, _ = load_model(Path(parent))
    both = {"before": before, "after": model}
    opened = {name: open_corpus(Path(folder)) for name, folder in corpora.items()}
    prompts = {name: heldout_prompts(corpus, PROMPTS) for name, corpus in opened.items()}
    most = dict.fromkeys(both, _COMPARED) if pairs else {"before": _BEFORE, "after": PROMPTS}
    stop = stop_ids(tokenizer, template)
    out: dict[str, Any] = {
        "exact": {when: score_exact(m, tokenizer, template, count=_EXACT) for when, m in both.items()},
        **{
            key: {
                name: {
                    when: stops(
                        answers(m, asked[: most[when]], stop=stop, max_new=_ROWS * row, temperature=temperature)
                    )
                    for when, m in both.items()
                }
                for name, asked in prompts.items()
                if asked
            }
            for key, temperature in (("stops", 0.0), ("sampled_stops", 1.0))
        },
    }
    if pairs:
        out["preferences"] = {
            name: {when: score_pairs(m, corpus) for when, m in both.items()} for name, corpus in opened.items()
        }
        out["divergence"] = {
            name: divergence(model, before, asked[:_COMPARED], stop=stop, max_new=row)
            for name, asked in prompts.items()
            if asked
        }
    return out
