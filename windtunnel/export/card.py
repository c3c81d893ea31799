"""The model card: README.md with the metadata that model hubs read. Holds no paths, host or user names. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from windtunnel import __version__
from windtunnel.base.errors import UserError
from windtunnel.base.units import si
from windtunnel.model.shape import Shape


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the weights do not know.

    Attributes:
        name: of the model, as it shall be called in public.
        tokens: training tokens.
        scores: held-out bits per byte by corpus.
        corpora: for each corpus its ``licence`` and ``tokens``, if known.
        licence: of the weights, an SPDX name in lower case; None leaves it open and says so.
        languages: ISO codes.
    """

    name: str
    tokens: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    corpora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    licence: str | None = None
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in (self.name, *self.scores, *self.corpora):
            if "/" in text or "\\" in text or not text.strip():
                raise UserError(
                    "export", f"expected a plain name for the model card, got {text!r}", "name it without slashes"
                )


def render_card(
    facts: CardFacts,
    shape: Shape,
    *,
    chats: bool,
    template: str | None = "chatml",
    ends: Sequence[str] = ("<|im_end|>",),
) -> str:
    """The text of README.md.

    Args:
        chats: whether the model has learnt any.
        template: of these chats; None where the folder holds none, since it would not give the ids of training.
        ends: control tokens at which an answer ends.
    """
    told = _told(template, " or ".join(f"`{end}`" for end in ends)) if chats else ""
    return f"---\n{_metadata(facts, shape)}---\n\n{_body(facts, shape, told)}"


def _told(template: str | None, ends: str) -> str:
    if template is None:
        return (f"There is no chat template: marks and contents were tokenised apart in training, and one text of both gives "
                f"other ids; an answer ends with {ends}.")  # fmt: skip
    if template == "chatml":
        return f"Chats use the ChatML template in `chat_template.jinja`; a turn ends with {ends}."
    return f"Chats use the template in `chat_template.jinja`, which is not ChatML; an answer ends with {ends}."


def architecture(shape: Shape) -> str:
    """What the exported folder is to transformers."""
    if shape.experts > 1:
        return "Mixtral"
    return "Qwen3" if shape.qk_norm else "Llama"


def _metadata(facts: CardFacts, shape: Shape) -> str:
    """YAML, each value written as JSON, which is YAML as well."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [architecture(shape).lower(), "minicpm", "windtunnel"],
        "license": facts.licence or "other",
    }
    if facts.languages:
        metadata["language"] = list(facts.languages)
    if facts.scores:
        metadata["model-index"] = [{
            "name": facts.name,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": f"{corpus} (held out)", "type": corpus},
                    "metrics": [{"type": "bits_per_byte", "value": round(score, 4), "name": "bits per byte"}],
                }
                for corpus, score in facts.scores.items()
            ],
        }]  # fmt: skip
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())


def _body(facts: CardFacts, shape: Shape, told: str) -> str:
    lines = [
        f"# {facts.name}", "",
        f"A Llama-like language model of the MiniCPM family (arXiv 2404.06395), trained with windtunnel {__version__}.", "",
        "| | |", "|---|---|",
        f"| parameters | {si(shape.body)} body + {si(shape.embedding)} embedding = {si(shape.total)} |",
        f"| shape | {shape.layers} layers, width {shape.width}, {shape.heads} query and {shape.kv_heads} key-value heads |",
        f"| vocabulary | {shape.vocab:,} |",
    ]  # fmt: skip
    if facts.tokens:
        lines.append(f"| training tokens | {si(facts.tokens)} |")
    lines += [
        "",
        f"The training multipliers are folded into the weights: it loads as a plain {architecture(shape)}, without remote code.",
        "",
    ]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", ""]
    if told:
        lines += [told, ""]
    if facts.corpora:
        lines += ["## Training data", "", "| corpus | tokens | licence |", "|---|---|---|"]
        for name, known in facts.corpora.items():
            tokens = si(known["tokens"]) if known.get("tokens") else "not recorded"
            lines.append(f"| {name} | {tokens} | {known.get('licence') or 'not recorded'} |")
        lines.append("")
    if facts.scores:
        lines += ["## Held-out loss", "", "| corpus | bits per byte |", "|---|---|"]
        lines += [f"| {name} | {score:.4f} |" for name, score in facts.scores.items()]
        lines += ["", "Over every predicted token of whole held-out documents, end of text included.", ""]
    if facts.licence is None:
        lines += ["No licence was chosen for these weights; the data's licences above may bind them.", ""]
    return "\n".join(lines)
