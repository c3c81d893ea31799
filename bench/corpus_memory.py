"""Peak memory of building a corpus from one large text file.

    python bench/corpus_memory.py [--megabytes 2000] [--vocab 4096] [--folder DIR] [--json]

Generates a text file of made-up sentences (deleted afterwards), trains a tokenizer, builds the corpus and prints the peak
resident memory of the process, measured by the operating system. The goal is 1 GB or less for 2 GB of text.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from windtunnel.corpus.build import build_corpus, build_tokenizer
from windtunnel.corpus.config import SourceConfig


def generate(path: Path, size: int) -> None:
    """Sentences of words drawn with falling frequency from 30,000 made-up ones, in paragraphs."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou", "ly")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(30_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            drawn = iter(draw.choices(words, weights, k=200_000))
            paragraph: list[str] = []
            for word in drawn:
                paragraph.append(word)
                if len(paragraph) == 90:
                    text = " ".join(paragraph).capitalize() + ".\n\n"
                    written += out.write(text)
                    paragraph = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument(
        "--folder", default=None, help="where the text and the corpus lie meanwhile (twice the text's size and more)"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base = Path(folder)
        generate(base / "text.txt", arguments.megabytes * 1_000_000)
        before = peak_mb()
        begin = time.perf_counter()
        configs = {"large": SourceConfig(source=("text.txt",), heldout=0.001)}
        places = {"downloads": base, "base": base, "cache": base / "cache"}
        tokenizer = build_tokenizer(configs, arguments.vocab, **places)
        trained = peak_mb()
        corpus = build_corpus(configs["large"], tokenizer, base / "corpus", name="large", **places)
        result = {
            "megabytes": arguments.megabytes,
            "documents": corpus.stats["documents"]["kept"],
            "tokens": corpus.tokens,
            "peak_mb_before": before,
            "peak_mb_prepared_and_tokenizer_trained": trained,
            "peak_mb": peak_mb(),
            "seconds": round(time.perf_counter() - begin, 1),
        }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:40} {value:,}")


def peak_mb() -> float:
    """Peak resident memory of this process in MB (kilobytes on Linux, bytes on macOS)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


if __name__ == "__main__":
    main()
