"""When the head's logits are made in chunks, and how large those are. Needs no torch."""

from __future__ import annotations

WHOLE = 1 << 24
"""Most logits of a micro-batch that are held at once (64 MiB in fp32); above, they are made in chunks."""
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits of a chunk: what a CPU's caches and a GPU's multiprocessors keep busy with."""


def is_chunked(positions: int, vocab: int) -> bool:
    """Whether the logits of that many positions are made in chunks."""
    return positions * vocab > WHOLE


def chunk_positions(vocab: int, device: str = "cpu") -> int:
    """Positions of a chunk."""
    return max(16, CHUNK.get(device, CHUNK["cpu"]) // vocab)
