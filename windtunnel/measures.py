"""What post-training changed: what to measure of a model and of its parent, and the scores of it. Needs no torch."""

from __future__ import annotations

from typing import Any

from windtunnel.base.labbook import LabBook
from windtunnel.desk import Desk
from windtunnel.posttrain.config import POSTTRAINED
from windtunnel.program import Program
from windtunnel.train.stage import Stage

EXACT = "exact-answers"
"""The name under which the questions of ``evaluate/exact.py`` stand in the lab book."""


def answering_job(desk: Desk, program: Program, stage: Stage) -> dict[str, Any]:
    """What the finishing process needs to measure a branch's answers before and after; empty where it has learnt no chats."""
    recipe, prepared = program.recipe, program.prepared
    assert prepared is not None
    own = [name for name, _ in stage.corpora if recipe.corpus[name].chats]
    if stage.kind not in (*POSTTRAINED, "soup") or not own:
        return {}
    folders = {name: str(desk.home.root / prepared.corpora[name]["folder"]) for name in own}
    job = {"template": recipe.corpus[own[0]].template, "corpora": folders, "parent": str(desk.parent_checkpoint(stage))}
    return {"answering": {**job, "pairs": any(recipe.corpus[name].pairs for name in own)}}


def put_answers(book: LabBook, run: str, answering: dict[str, Any]) -> None:
    """The scores of a branch after its training, as rows of the lab book; those before stay in the model's facts."""
    after = answering["exact"]["after"]
    for task, share in {**after["tasks"], "all": after["all"]}.items():
        name = "accuracy" if task == "all" else f"accuracy_{task}"
        book.put_score(run, EXACT, name, share["accuracy"], "share", share["count"], share["low"], share["high"])
    ends = {EXACT: after["stops"], **{name: both["after"] for name, both in answering["stops"].items()}}
    for name, found in ends.items():
        book.put_score(run, name, "stop_rate", found["ended"], "share", found["count"], found["low"], found["high"])
        book.put_score(run, name, "answer_tokens", found["tokens"], "tokens", found["count"])
    for name, both in answering.get("sampled_stops", {}).items():
        found = both["after"]
        rate = (found["ended"], "share", found["count"], found["low"], found["high"])
        book.put_score(run, name, "stop_rate_sampled", *rate)
    for name, both in answering.get("preferences", {}).items():
        found = both["after"]
        book.put_score(
            run, name, "preference_accuracy", found["accuracy"], "share", found["count"], found["low"], found["high"]
        )
    for name, found in answering.get("divergence", {}).items():
        book.put_score(
            run,
            name,
            "kl_to_reference",
            found["per_answer"],
            "nats per answer",
            found["count"],
            found["low"],
            found["high"],
        )
