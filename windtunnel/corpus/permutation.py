"""Random permutations of 0…n−1 in constant memory: a Feistel network over the next even number of bits, walked until inside.

(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 3: cycle walking keeps it a bijection.)
"""

from __future__ import annotations

import blake3
import numpy as np

from windtunnel.corpus.shingles import mix

ROUNDS = 6


def name_key(name: str) -> np.uint64:
    """A number for a corpus name, so that its order does not depend on which other corpora there are."""
    return np.uint64(int.from_bytes(blake3.blake3(name.encode()).digest(8), "little"))


def permuted(index: np.ndarray, size: int, seed: int, key: np.uint64, epoch: np.ndarray) -> np.ndarray:
    """The images of indices under the permutations of 0…size−1 that belong to (seed, key, epoch).

    Args:
        index: int64 [n] in 0…size−1.
        size: of the domain, at most 2^62.
        seed: of the data plan, any integer (its lowest 64 bits count).
        key: of the corpus.
        epoch: int64 [n], one for each index.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    start = mix(np.full(1, seed % (1 << 64), np.uint64) ^ key)
    keys = mix(start + mix(epoch.astype(np.uint64) + np.uint64(1)))
    result = index.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        values, key_of = result[walking], keys[walking]
        left, right = values >> half, values & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(right + mix(key_of + np.uint64(turn))) & low)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= np.uint64(size)]
    return result.astype(np.int64)
