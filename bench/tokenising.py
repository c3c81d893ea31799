"""Tokenising a corpus against the bare ``tokenizers`` library.

    python bench/tokenising.py [--json] [--text FILE ...] [--rounds 9]

Ours: prepared text on disk → token integers, boundaries and byte counts on disk, as ``build_corpus`` does it.
Bare: ``tokenizers.Tokenizer.encode_batch`` over the same texts in memory, ids dropped. Both use all cores; the two alternate,
the order swaps from round to round. ``ratio`` is bare time over our time: 1 is as fast, the goal is 0.8 or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers

from windtunnel.corpus.build import write_side
from windtunnel.corpus.config import SourceConfig
from windtunnel.corpus.prepare import TRAIN, Prepared, prepare
from windtunnel.corpus.tokenizer import Tokenizer, parallel, train

VOCAB = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--text", nargs="*", default=[], help="files to tokenise; without them this Python's standard library is"
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    sources = arguments.text or [str(Path(json.__file__).parent.parent / "*.py")]
    config = SourceConfig(source=tuple(sources), format="auto", on_bad="skip")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        text = prepare(config, scratch / "text", downloads=scratch, base=Path.cwd())
        indices = text.select(TRAIN)
        texts = [text.plain(raw) for batch in text.batches(indices) for raw in batch]
        tokenizer = train(texts, VOCAB)
        bare = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        result = compare(arguments.rounds, texts, bare, text, indices, config, tokenizer, scratch)
    if arguments.json:
        print(json.dumps(result))
        return
    low, high = result["interval"]
    print(f"{result['megabytes']:.1f} MB, {result['documents']} documents, {arguments.rounds} alternations")
    print(f"bare encode_batch {result['bare_mb_per_s']:.2f} MB/s, windtunnel {result['ours_mb_per_s']:.2f} MB/s")
    print(f"ratio {result['ratio']:.2f} (90 % interval of the median {low:.2f}–{high:.2f}; goal 0.80 or more)")
    sys.exit(0)


def compare(
    rounds: int,
    texts: list[str],
    bare: tokenizers.Tokenizer,
    text: Prepared,
    indices: np.ndarray,
    config: SourceConfig,
    tokenizer: Tokenizer,
    scratch: Path,
) -> dict[str, object]:
    def ours() -> None:
        write_side(scratch, "train", text, indices, config, tokenizer)

    def theirs() -> None:
        with parallel(True):
            bare.encode_batch(texts, add_special_tokens=False)

    ours(), theirs()
    pairs: list[tuple[float, float]] = []
    for turn in range(rounds):
        times = {}
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            begin = time.perf_counter()
            run()
            times[run] = time.perf_counter() - begin
        pairs.append((times[ours], times[theirs]))
    ratios = np.array([theirs_s / ours_s for ours_s, theirs_s in pairs])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    size = sum(len(t.encode()) for t in texts) / 1e6
    return {
        "ratio": float(np.median(ratios)), "interval": np.quantile(np.median(draws, axis=1), [0.05, 0.95]).tolist(),
        "megabytes": size, "documents": len(texts),
        "bare_mb_per_s": size / statistics.median(t for _, t in pairs),
        "ours_mb_per_s": size / statistics.median(t for t, _ in pairs),
    }  # fmt: skip


if __name__ == "__main__":
    main()
