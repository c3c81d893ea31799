"""A soup: weights averaged over checkpoints of the trunk, or over branches, instead of trained. Needs no torch.

Averaging the last checkpoints of a stable run does much of what a decay does (arXiv 2507.17634); averaging models that were
fine-tuned from one parent often joins what they learnt (arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from windtunnel.base.errors import RecipeError
from windtunnel.corpus.mixture import corpus_of
from windtunnel.pretrain.setting import Setting
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import Member, Stage, Start


def soup_stage(
    name: str, members: Sequence[tuple[Stage, int]], setting: Setting, weights: Sequence[float] | None = None
) -> Stage:
    """A stage that makes no step: its model is the average of its members' weights.

    Args:
        members: stages and their steps; the first is its parent in the tree.
        weights: one for each member, whatever they add up to; equal ones if not given.

    Raises:
        RecipeError: members of different shapes.
    """
    first, step = members[0]
    if other := next((stage for stage, _ in members if stage.shape != first.shape), None):
        raise RecipeError(
            f"branch.{name}.of",
            f"expected members of one shape, got '{first.name}' and '{other.name}' of two",
            "leave one out",
        )
    given = list(weights or [1.0] * len(members))
    average = tuple(
        Member(stage.key, at, weight / sum(given)) for (stage, at), weight in zip(members, given, strict=True)
    )
    # A branch of the soup goes on at the rate where its first member ended.
    rate = first.optimizer.learning_rate * first.schedule.factor(step) or first.optimizer.learning_rate
    names = {corpus_of(name) for segment in first.plan.segments for name, _ in segment.mixture}
    return replace(
        first, name=name, kind="soup", open_ended=False, start=Start(first.key, step, fresh=True), steps=0, keep=(),
        batch=first.batches.at(step), batch_changes=(),
        schedule=Schedule(), average=average, objective="lm", preference=None, lora=None, save_every=None,
        optimizer=replace(first.optimizer, learning_rate=rate),
        corpora=setting.only(names), score=setting.score, score_tokens=setting.score_tokens,
    )  # fmt: skip
