"""Tasks that need torch but no training, each in a process of its own: samples, scores, export, chat, checks.

``python -m windtunnel.finishing VERB JOB`` with a JSON job prints its JSON answer as its last line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from windtunnel.base.errors import WindtunnelError
from windtunnel.base.runtime import choose, prepare
from windtunnel.corpus.chat import render, stop_ids
from windtunnel.corpus.loader import Loader
from windtunnel.corpus.store import open_corpus
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.evaluate.before_after import answering
from windtunnel.evaluate.choice import score_choices
from windtunnel.evaluate.exact import score_exact
from windtunnel.evaluate.passkey import over_depths
from windtunnel.evaluate.positions import keys_found, loss_by_position, with_positions
from windtunnel.export.card import CardFacts
from windtunnel.export.huggingface import export_huggingface
from windtunnel.model.sample import generate
from windtunnel.model.serving import DynamicNtk
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import Transformer
from windtunnel.serve.chat import chat
from windtunnel.train.bits_per_byte import score_heldout
from windtunnel.train.checkpoint import load_model
from windtunnel.train.dynamics import Sampling, second_pass
from windtunnel.train.growth import Balance
from windtunnel.train.loop import scorer
from windtunnel.train.stage import Stage
from windtunnel.tunnel.coordinates import check_coordinates

_SAMPLES, _SAMPLE_TOKENS, _TEMPERATURE, _TOP_P = 5, 96, 0.7, 0.95
_QUESTIONS = ("What is Mathematics?", "How do I make pancakes?", "What is the Moon?")


def finish(job: dict[str, Any]) -> dict[str, Any]:
    """The first samples of a model, with seeds 0, 1, 2, …: not picked; answers if it has read chats, in whose template it is
    asked; task scores; for a post-trained model, what its answers were before and are after."""
    model, manifest = load_model(Path(job["checkpoint"]))
    tokenizer, row = Tokenizer.load(Path(job["tokenizer"])), manifest.config["stage"]["plan"]["row"]
    stop = {tokenizer.eos_id, tokenizer.im_end_id}
    options = {"max_new": _SAMPLE_TOKENS, "temperature": _TEMPERATURE, "top_p": _TOP_P, "stop": stop}
    samples = [
        tokenizer.decode(list(generate(model, [tokenizer.bos_id], seed=seed, **options))) for seed in range(_SAMPLES)
    ]
    answers, template = [], job["template"]
    for question in _QUESTIONS if template else ():
        ids, _ = render([{"role": "user", "content": question}], tokenizer, template, add_generation_prompt=True)
        given = generate(model, list(ids), seed=0, **{**options, "stop": stop_ids(tokenizer, template)})
        answers.append({"question": question, "answer": tokenizer.decode(list(given))})
    tasks = {name: score_choices(model, tokenizer, Path(path)) for name, path in job["tasks"].items()}
    more: dict[str, Any] = {}
    if job.get("context"):
        more["context"] = _context(model, tokenizer, **job["context"])
    return {
        **more, **({"template": template} if template else {}),
        **({"answering": answering(model, tokenizer, row, **job["answering"])} if "answering" in job else {}),
        "samples": samples, "answers": answers, "tasks": tasks,
        "sampling": {"temperature": _TEMPERATURE, "top_p": _TOP_P, "tokens": _SAMPLE_TOKENS, "seeds": list(range(_SAMPLES))},
    }  # fmt: skip


def measure_answers(job: dict[str, Any]) -> dict[str, Any]:
    """What a post-trained model's answers were before and are after."""
    model, manifest = load_model(Path(job.pop("checkpoint")))
    tokenizer = Tokenizer.load(Path(job.pop("tokenizer")))
    return answering(model, tokenizer, manifest.config["stage"]["plan"]["row"], **job)


def exact(job: dict[str, Any]) -> dict[str, Any]:
    """Computed questions answered by several models of one tokenizer."""
    tokenizer = Tokenizer.load(Path(job["tokenizer"]))
    return {
        key: score_exact(load_model(Path(path))[0], tokenizer, job["template"], count=job["count"])
        for key, path in job["checkpoints"].items()
    }


def _context(
    model: Transformer, tokenizer: Tokenizer, *, row: int, short: int, before: str, corpora: dict[str, str], items: int,
    tokens: int | None,
) -> dict[str, Any]:  # fmt: skip
    """What a longer context has brought: hidden keys found up to twice the trained row, loss by position, and the loss in short
    rows beside that of the checkpoint from which it grew."""
    earlier, _ = load_model(Path(before))
    runtime = choose(None, compiled=False)
    out: dict[str, Any] = {"row": row, "short_row": short, "short": {}, "positions": {}, "retrieval": []}
    for name, folder in corpora.items():
        heldout = open_corpus(Path(folder)).heldout
        both = {
            when: score_heldout(scorer(one, runtime, short), heldout, short, tokens).bits_per_byte
            for when, one in (("before", earlier), ("after", model))
        }
        out["short"][name] = both
        parts = {when: loss_by_position(with_positions(one, row), heldout, row, tokens)
                 for when, one in (("before", earlier), ("after", model))}  # fmt: skip
        known = {part["from"]: part["loss"] for part in parts["before"]}
        out["positions"][name] = [{**part, "before": known.get(part["from"])} for part in parts["after"]]
    out["retrieval"] = keys_found(model, tokenizer, row, items)
    return out


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Held-out bits per byte on any corpora of the same tokenizer, and task scores."""
    runtime = choose(job.get("devices"), compiled=False)
    prepare(runtime)
    model, manifest = load_model(Path(job["checkpoint"]), runtime.device)
    trainer, row = scorer(model, runtime), manifest.config["stage"]["plan"]["row"]
    scores = {}
    for name, folder in job["corpora"].items():
        found = score_heldout(trainer, open_corpus(Path(folder)).heldout, row, job.get("tokens"))
        scores[name] = {"bits_per_byte": found.bits_per_byte, "tokens": found.tokens, "bytes": found.bytes}
    tokenizer = Tokenizer.load(Path(job["tokenizer"]))
    return {
        "scores": scores,
        "tasks": {name: score_choices(model, tokenizer, Path(path)) for name, path in job["tasks"].items()},
        "retrieval": over_depths(keys_found(model, tokenizer, row, job.get("retrieval", 0))),
    }


def average(job: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of a run's newest checkpoint and of the means of its last 2, 3, … ones (arXiv 2306.03241)."""
    runtime = choose(job.get("devices"), compiled=False)
    prepare(runtime)
    model, _ = load_model(Path(job["checkpoints"][-1]), runtime.device)
    trainer = scorer(model, runtime, job["row"])
    corpora = {name: open_corpus(Path(folder)) for name, folder in job["corpora"].items()}

    def score() -> dict[str, float]:
        return {
            name: score_heldout(trainer, corpus.heldout, job["row"], job.get("tokens")).bits_per_byte
            for name, corpus in corpora.items()
        }

    newest, averages = score(), {}
    for count, path in enumerate(reversed(job["checkpoints"][:-1]), start=2):
        earlier, _ = load_model(Path(path), runtime.device)
        with torch.no_grad():
            for mean, other in zip(model.parameters(), earlier.parameters(), strict=True):
                mean += (other - mean) / count
        averages[str(count)] = score()
    return {"newest": newest, "averages": averages}


def export(job: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face folder, reloaded and compared before it counts as exported."""
    model, _ = load_model(Path(job["checkpoint"]))
    facts = CardFacts(name=job["name"], tokens=job["tokens"], scores=job["scores"], corpora=job["corpora"])
    source, out = Path(job["tokenizer"]) / "tokenizer.json", Path(job["out"])
    model = _served(model, job.get("dynamic_ntk"))
    template = job["template"]
    check = export_huggingface(model, source, out, facts, chats=job["chats"], template=template)
    return {"check": check, "dynamic_ntk": job.get("dynamic_ntk"), "template": template}


def _served(model: Transformer, dynamic_ntk: str | None) -> Transformer:
    return model.placed(DynamicNtk.parse(dynamic_ntk).of(model.shape)) if dynamic_ntk else model


def talk(job: dict[str, Any]) -> dict[str, Any]:
    """A chat on this terminal; the answer to one prompt if the job has one."""
    model, _ = load_model(Path(job["checkpoint"]))
    tokenizer = Tokenizer.load(Path(job["tokenizer"]))
    chat(_served(model, job.get("dynamic_ntk")), tokenizer, **job["options"])
    return {}


def coordinates(job: dict[str, Any]) -> dict[str, Any]:
    """The coordinate check of a parametrization over several shapes, on the first batches of a stage's own data; one thread."""
    prepare(choose("cpu", threads=1, compiled=False))
    stage = Stage.from_dict(job["stage"])
    loader = Loader(stage.plan, {name: open_corpus(Path(folder)) for name, folder in job["corpora"].items()})
    batches = [loader.rows(i * stage.batch, stage.batch) for i in range(job["batches"])]
    shapes = [Shape(**shape) for shape in job["shapes"]]
    check = check_coordinates(
        stage.parametrization, shapes, batches, seeds=job["seeds"], steps=job["steps"], optimizer=stage.optimizer,
        balance=Balance(**job["balance"]) if job["balance"] else None, bars=job["bars"],
    )  # fmt: skip
    return check.to_dict()


def dynamics(job: dict[str, Any]) -> dict[str, Any]:
    """A watched second pass over the last steps of a run."""
    runtime = choose(job.get("devices"), compiled=False)
    prepare(runtime)
    corpora = {name: open_corpus(Path(folder)) for name, folder in job["corpora"].items()}
    parent = Path(job["parent"]) if job["parent"] else None
    with tempfile.TemporaryDirectory(prefix="windtunnel-") as scratch:
        stage = Stage.from_dict(job["stage"])
        return second_pass(stage, corpora, parent, Sampling(**job["sampling"]), Path(scratch), runtime)


VERBS = {
    "answering": measure_answers,
    "coordinates": coordinates,
    "average": average,
    "dynamics": dynamics,
    "exact": exact,
    "finish": finish,
    "evaluate": evaluate,
    "export": export,
    "chat": talk,
}


def main() -> int:
    torch.set_grad_enabled(True)
    try:
        answer = VERBS[sys.argv[1]](json.loads(sys.argv[2]))
    except WindtunnelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if sys.argv[1] != "chat":
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
