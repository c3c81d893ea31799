"""What ``windtunnel data PATH`` shows: a corpus as training would see it, without training anything that is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import DataError
from windtunnel.base.units import bytes_size, si
from windtunnel.corpus import tokenizer as bpe
from windtunnel.corpus.build import build_corpus
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.language import language_shares
from windtunnel.corpus.loader import IGNORED, Loader
from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.corpus.prepare import TRAIN, Prepared, prepare
from windtunnel.corpus.tokenizer import Tokenizer

_SAMPLE = 2_000
_NAME = "data"


@dataclass(frozen=True)
class Inspection:
    """What was found. ``dropped`` holds up to ten pairs for each cleaning step; ``batch`` the first packed rows, each as runs
    of ``{document, scored, text}``."""

    source: tuple[str, ...]
    records: dict[str, Any]
    documents: dict[str, int]
    bytes: dict[str, int]
    languages: dict[str, float]
    lengths: dict[str, int]
    changed: int
    dropped: dict[str, int]
    examples: dict[str, list[dict[str, str]]]
    vocab: int
    tokens: int
    heldout_tokens: int
    bytes_per_token: float
    row: int
    batch: list[list[dict[str, Any]]]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_source(
    config: SourceConfig,
    *,
    downloads: Path,
    base: Path,
    tokenizer: Tokenizer | None = None,
    vocab: int = 4096,
    row: int = 256,
    rows: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Reads, cleans, tokenises and packs a corpus in a temporary folder.

    Args:
        config: the corpus; ``SourceConfig(source=(path,))`` for a bare path.
        downloads, base: see ``read_documents``.
        tokenizer: the one to use; without it a vocabulary of ``vocab`` is trained on the text, a smaller one if it is too little.
        row, rows: size of the packed rows and how many to show.
        say: takes lines for people.

    Raises:
        DataError: see ``prepare``.
    """
    with tempfile.TemporaryDirectory(prefix="windtunnel-data-") as folder:
        scratch = Path(folder)
        text = prepare(config, scratch / "text", downloads=downloads, base=base, say=say)
        sample = _sample(text)
        tokenizer = tokenizer or _trained(sample, vocab)
        corpus = build_corpus(config, tokenizer, scratch / "corpus", name=_NAME, downloads=downloads, base=base)
        shown = min(rows, corpus.rows(row))
        batch: list[list[dict[str, Any]]] = []
        if shown:
            packed = Loader(DataPlan(0, row, (Segment(0, ((_NAME, 1.0),)),)), {_NAME: corpus}).rows(0, shown)
            batch = [
                _runs(*parts, tokenizer) for parts in zip(packed.inputs, packed.targets, packed.documents, strict=True)
            ]
        sizes = np.sort(text.lengths[text.fate == TRAIN])
        return Inspection(
            config.source, text.stats["records"], text.stats["documents"], text.stats["bytes"], language_shares(sample),
            {name: int(np.quantile(sizes, share)) for name, share in (("median", 0.5), ("p90", 0.9), ("longest", 1.0))},
            text.stats["changed"], text.stats["dropped"], read_json(text.folder / "examples.json"), tokenizer.vocab_size,
            corpus.tokens, corpus.stats["heldout"]["tokens"], corpus.stats["heldout"]["bytes_per_token"], row, batch,
            corpus.stats["warnings"],
        )  # fmt: skip


def _sample(text: Prepared) -> list[str]:
    chosen = text.select(TRAIN)[:_SAMPLE]
    return [text.plain(raw) for batch in text.batches(chosen) for raw in batch]


def _trained(sample: list[str], vocab: int) -> Tokenizer:
    while vocab > bpe.SMALLEST:
        try:
            return bpe.train(sample, vocab)
        except DataError:
            vocab = max(bpe.SMALLEST, vocab // 2)
    return bpe.train(sample, bpe.SMALLEST)


def _runs(inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A row as runs of tokens that belong to one document and are all scored, or all not, when predicted."""
    scored = np.ones(len(inputs), bool)
    scored[1:] = targets[:-1] != IGNORED
    edges = np.flatnonzero((np.diff(documents) != 0) | (scored[1:] != scored[:-1])) + 1
    return [
        {
            "document": int(documents[begin]),
            "scored": bool(scored[begin]),
            "tokens": int(end - begin),
            "text": tokenizer.decode(inputs[begin:end].tolist(), control=True),
        }
        for begin, end in zip([0, *edges], [*edges, len(inputs)], strict=True)
    ]


def render_inspection(found: Inspection) -> RenderableType:
    """The inspection for a terminal."""
    facts = Table.grid(padding=(0, 2))
    documents = found.documents
    share = ", ".join(f"{language} {100 * part:.0f} %" for language, part in list(found.languages.items())[:6])
    lengths = found.lengths
    for name, value in (
        ("source", ", ".join(found.source)),
        ("records", f"{found.records['good']:,} good, {found.records['bad']:,} damaged"),
        ("documents", f"{documents['read']:,} read, {documents['train']:,} train, {documents['heldout']:,} held out"),
        ("text", f"{bytes_size(found.bytes['train'])} train, {bytes_size(found.bytes['heldout'])} held out"),
        (
            "length",
            f"median {lengths['median']:,} bytes, 90 % below {lengths['p90']:,}, longest {lengths['longest']:,}",
        ),
        ("languages", f"{share} (a guess)"),
        ("tokens", f"{si(found.tokens)} train, {si(found.heldout_tokens)} held out, vocabulary {found.vocab}"),
        ("bytes per token", f"{found.bytes_per_token:.2f} on held-out documents"),
        (
            "cleaning",
            ", ".join([f"{found.changed:,} changed", *(f"{step} −{count:,}" for step, count in found.dropped.items())]),
        ),
    ):
        facts.add_row(Text(name, style="bold"), escape(value))
    parts: list[RenderableType] = [facts]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in found.warnings]
    parts += [_examples(step, pairs) for step, pairs in found.examples.items() if pairs]
    parts.append(_packed(found))
    return Group(*parts)


def _examples(step: str, pairs: list[dict[str, str]]) -> Table:
    titles = {"unicode": ("changed from", "to"), "short": ("dropped", ""), "decontaminate": ("dropped", "test text"),
              "exact": ("dropped", "kept twin"), "near": ("dropped", "kept twin")}[step]  # fmt: skip
    table = Table(title=f"cleaning step '{step}': {len(pairs)} examples", title_justify="left")
    for title in titles:
        table.add_column(title, ratio=1)
    for pair in pairs:
        table.add_row(*(_plain(pair[side]) for side in ("text", "against")))
    return table


def _plain(text: str) -> Text:
    """Text of a corpus with nothing in it that a terminal would obey."""
    return Text("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text[:120]))


def _packed(found: Inspection) -> RenderableType:
    table = Table(
        title=f"first packed rows of {found.row} tokens (dim: not scored)", title_justify="left", show_lines=True
    )
    table.add_column("row")
    table.add_column("documents")
    table.add_column("tokens", ratio=1)
    for number, runs in enumerate(found.batch):
        line = Text()
        for run in runs:
            line.append(_printable(run["text"]), style="" if run["scored"] else "dim")
        table.add_row(str(number), str(runs[-1]["document"] + 1), line)
    return table


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "·" for c in text)
