"""Builds tokenizers and corpora: pure functions of the sources' content, the configuration and the tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from windtunnel.base.artefact import content_hash, explained, write_artefact, write_json
from windtunnel.base.errors import ArtefactError
from windtunnel.corpus import tokenizer as bpe
from windtunnel.corpus.chat import last_answer, pair_of, render_batch
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.prepare import HELDOUT, TRAIN, VERSION, Prepared, prepare, text_key, turns_of
from windtunnel.corpus.sources import source_fingerprint
from windtunnel.corpus.store import KIND, Corpus, open_corpus
from windtunnel.corpus.tokenizer import Tokenizer

SAMPLE_PER_ENTRY, SMALLEST_SAMPLE = 2_000, 8_000_000
"""Text for training a vocabulary, in bytes: this much for each entry, and this much at least."""
_PLACE = {"source", "sha256", "decontaminate", "licence", "language"}
"""Fields that change nothing in the content; an artefact that recorded them would not be a function of its key."""
Say = Callable[[str], None]


def corpus_key(config: SourceConfig, tokenizer_hash: str, fingerprint: str) -> str:
    """Identifies a built corpus before it is built: equal keys mean equal content."""
    return content_hash(["corpus", VERSION, config.identity(), tokenizer_hash, fingerprint])


def tokenizer_key(
    configs: Mapping[str, SourceConfig],
    fingerprints: Mapping[str, str],
    vocab: int,
    weights: Mapping[str, float] | None = None,
    sample_bytes: int | None = None,
) -> str:
    """Identifies a tokenizer before it is trained."""
    texts = sorted((name, text_key(configs[name], fingerprints[name])) for name in configs)
    pattern = [bpe.PATTERN, list(bpe.SPECIAL_TOKENS)]
    return content_hash(
        ["tokenizer", VERSION, texts, vocab, dict(weights or {}), _sample(vocab, sample_bytes), pattern]
    )


def build_tokenizer(
    configs: Mapping[str, SourceConfig],
    vocab: int,
    *,
    downloads: Path,
    base: Path,
    weights: Mapping[str, float] | None = None,
    sample_bytes: int | None = None,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Tokenizer:
    """Trains a tokenizer on the train parts of several corpora.

    Args:
        configs: corpus tables by name.
        vocab: entries, control tokens included.
        downloads, base: see ``read_documents``.
        weights: shares of the sample; without them each corpus counts by its size. A corpus gives at most all it has.
        sample_bytes: at most this much text is read, the documents with the smallest hash; 2,000 bytes for each entry and
            8 MB at least if not given.
        cache: folder where prepared text is kept for ``build_corpus``; without it nothing is kept.
        say: takes lines for people.

    Raises:
        DataError: damaged or missing sources, or a vocabulary larger than the text can train.
    """
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(_prepared(config, downloads=downloads, base=base, cache=cache, say=say))
            for name, config in sorted(configs.items())
        }
        sizes = {name: float(part.stats["bytes"]["train"]) for name, part in parts.items()}
        shares = sizes if not weights else {name: float(weights.get(name, 0.0)) for name in parts}
        budget = min(float(_sample(vocab, sample_bytes)), sum(sizes.values()))
        limits = {name: budget * share / sum(shares.values()) for name, share in shares.items()}
        return bpe.train(_sampled(parts, limits), vocab)


def _sample(vocab: int, sample_bytes: int | None) -> int:
    return max(SMALLEST_SAMPLE, SAMPLE_PER_ENTRY * vocab) if sample_bytes is None else sample_bytes


def _sampled(parts: Mapping[str, Prepared], limits: Mapping[str, float]) -> Iterator[str]:
    for name, part in parts.items():
        chosen = part.select(TRAIN)
        begins = np.cumsum(part.lengths[chosen]) - part.lengths[chosen]
        for batch in part.batches(chosen[begins < limits[name]]):
            yield from map(part.plain, batch)


@contextmanager
def _prepared(
    config: SourceConfig,
    *,
    downloads: Path,
    base: Path,
    cache: Path | None,
    say: Say,
    fingerprint: str | None = None,
    scratch: Path | None = None,
) -> Iterator[Prepared]:
    """Prepared text from the cache, or in a temporary folder that is deleted at the end."""
    fingerprint = fingerprint or source_fingerprint(config, downloads=downloads, base=base)
    if cache is not None:
        key = text_key(config, fingerprint)
        yield prepare(
            config, cache / f"text-{key[:16]}", downloads=downloads, base=base, fingerprint=fingerprint, say=say
        )
        return
    if scratch is not None:
        with explained(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".text-", dir=scratch) as folder:
        yield prepare(config, Path(folder) / "text", downloads=downloads, base=base, fingerprint=fingerprint, say=say)


def build_corpus(
    config: SourceConfig,
    tokenizer: Tokenizer,
    out: Path,
    *,
    name: str,
    downloads: Path,
    base: Path,
    cache: Path | None = None,
    fingerprint: str | None = None,
    say: Say = lambda line: None,
) -> Corpus:
    """Tokenises a corpus into the artefact folder ``out``; opens it if it is there with the same key.

    Raises:
        DataError: see ``prepare``.
        UserError: full disk or read-only folder.
    """
    fingerprint = fingerprint or source_fingerprint(config, downloads=downloads, base=base)
    key = corpus_key(config, tokenizer.hash, fingerprint)
    try:
        corpus = open_corpus(out)
        if (corpus.key, corpus.name) == (key, name):
            return corpus
    except ArtefactError:
        pass
    masked = config.chats and config.loss == "assistant"
    body: dict[str, Any] = {
        "name": name, "key": key, "tokenizer": tokenizer.hash, "vocab": tokenizer.vocab_size, "dtype": tokenizer.dtype.name,
        "masked": masked, "corpus": config.model_dump(mode="json", exclude=_PLACE | config.unused), "highest_id": 0,
    }  # fmt: skip
    with (
        _prepared(
            config, downloads=downloads, base=base, cache=cache, say=say, fingerprint=fingerprint, scratch=out.parent
        ) as text,
        write_artefact(out, KIND, body, parents=[tokenizer.hash]) as folder,
    ):
        stats = dict(text.stats)
        train = write_side(folder, "train", text, text.select(TRAIN), config, tokenizer)
        heldout = write_side(
            folder, "heldout", text, text.select(HELDOUT), config, tokenizer, limit=config.heldout_tokens
        )
        body["highest_id"] = max(train.pop("highest_id"), heldout.pop("highest_id"))
        stats["train"], stats["heldout"] = train, heldout
        stats["warnings"] = [*stats["warnings"], *_cap_warning(config, text, heldout)]
        write_json(folder / "stats.json", stats)
        (folder / "examples.json").write_bytes((text.folder / "examples.json").read_bytes())
    return open_corpus(out, verify=False)


def _cap_warning(config: SourceConfig, text: Prepared, heldout: dict[str, Any]) -> list[str]:
    reserved = text.stats["documents"]["heldout"]
    if heldout["documents"] * 2 > reserved:
        return []
    share = config.heldout * heldout["documents"] / reserved
    return [
        f"only {heldout['documents']} of {reserved} held-out documents are scored (heldout_tokens = {config.heldout_tokens}); "
        f"heldout = {share:.2g} would leave more for training"
    ]


def write_side(
    folder: Path,
    side: str,
    text: Prepared,
    indices: np.ndarray,
    config: SourceConfig,
    tokenizer: Tokenizer,
    limit: int | None = None,
) -> dict[str, Any]:
    """Writes one side batch by batch, at most ``limit`` tokens of whole documents, but one document at least."""
    lengths: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    total = highest = plain_bytes = plain_tokens = 0
    masked = config.chats and config.loss == "assistant"
    with ExitStack() as stack:
        tokens_file = stack.enter_context((folder / f"{side}.tokens.bin").open("wb"))
        mask_file = stack.enter_context((folder / f"{side}.mask.bin").open("wb")) if masked else None
        for batch in text.batches(indices):
            ids, mask, counts = encode_documents(batch, config, tokenizer)
            scored = tokenizer.token_bytes[ids] if mask is None else tokenizer.token_bytes[ids] * mask
            size = np.add.reduceat(scored, np.cumsum(counts) - counts)
            full = limit is not None and total + len(ids) > limit
            if full:
                keep = int(np.searchsorted(total + np.cumsum(counts), cast(int, limit), "right"))
                least = 2 if config.pairs else 1  # a pair is two documents
                keep = max(keep - keep % least, least if total == 0 else 0)
                counts, size = counts[:keep], size[:keep]
                ids = ids[: int(counts.sum())]
                mask = None if mask is None else mask[: len(ids)]
            tokens_file.write(ids.astype(tokenizer.dtype).tobytes())
            if mask_file is not None and mask is not None:
                mask_file.write(mask.tobytes())
            lengths.append(counts)
            sizes.append(size)
            total += len(ids)
            plain_bytes += int(tokenizer.token_bytes[ids].sum())
            plain_tokens += int((ids >= len(bpe.SPECIAL_TOKENS)).sum())
            highest = max(highest, int(ids.max(initial=0)))
            if full:
                break
    counts, size = np.concatenate(lengths), np.concatenate(sizes)
    (folder / f"{side}.documents.bin").write_bytes(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).tobytes())
    if side == "heldout":
        (folder / "heldout.bytes.bin").write_bytes(size.astype(np.int64).tobytes())
    return {
        "documents": len(counts), "tokens": total, "bytes": int(size.sum()), "highest_id": highest,
        "bytes_per_token": round(plain_bytes / max(1, plain_tokens), 4),
    }  # fmt: skip


def encode_documents(
    batch: list[bytes], config: SourceConfig, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids of documents one after the other (int64), their mask (uint8, None where all is scored), tokens of each (int64).

    A text is ``<s> text </s>``; a chat is rendered with its template; a pair is two chats, the better answer first.
    """
    if config.pairs:
        pairs = [chat for raw in batch for chat in pair_of(turns_of(raw))]
        found = [last_answer(*chat) for chat in render_batch(pairs, tokenizer, config.template)]
        ids, mask = (np.concatenate([chat[part] for chat in found]) for part in (0, 1))
        return ids, mask, np.array([len(ids) for ids, _ in found], np.int64)
    if config.chats:
        chats = render_batch([turns_of(raw) for raw in batch], tokenizer, config.template)
        ids = np.concatenate([ids for ids, _ in chats])
        mask = np.concatenate([mask for _, mask in chats]) if config.loss == "assistant" else None
        return ids, mask, np.array([len(ids) for ids, _ in chats], np.int64)
    ids, counts = tokenizer.encode_documents([raw.decode() for raw in batch])
    return ids, None, counts
