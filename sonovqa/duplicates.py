"""Near-duplicate images: pairs of perceptual hashes that differ in few bits, and the clusters they form."""

from __future__ import annotations

import numpy as np

#: Bits of 256. On HC18 look-alike frames of one subject differ by 0 to 40, any two subjects by 58 or more.
NEAR = 32
_WORDS_AT_ONCE = 1 << 22  # 64-bit words compared at a time: 32 MB


def hash_words(hashes: list[str]) -> np.ndarray:
    """Hashes in hex, all of one length, as words: ``uint64 [n, bits / 64]``."""
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8)
    return raw.reshape(len(hashes), -1).view(np.uint64) if hashes else np.zeros((0, 4), np.uint64)


def near_pairs(words: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different rows at a Hamming distance of at most ``distance``: ``int64 [pairs, 2]``, first < second.

    Every pair is compared: 15,446 hashes of 256 bits take a second or two, and nothing is missed as by an index of buckets.

    Args:
        words: ``uint64 [n, words]``.
    """
    count = len(words)
    step = max(1, _WORDS_AT_ONCE // max(1, count))
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, count, step):
        block = words[start : start + step]
        bits = np.zeros((len(block), count - start), np.uint16)
        for word in range(words.shape[1]):
            bits += np.bitwise_count(block[:, word, None] ^ words[None, start:, word])
        first, second = np.nonzero(bits <= distance)
        keep = second > first
        found.append(np.stack([first[keep], second[keep]], axis=1) + start)
    return np.concatenate(found)


def clusters(hashes: list[str], distance: int = NEAR) -> np.ndarray:
    """Number the clusters that chains of near-duplicates form: ``int64 [n]``, equal numbers for one cluster.

    Args:
        hashes: perceptual hashes in hex, all of one length.
        distance: largest number of bits by which two near-duplicates differ.

    Source: connected components, `scipy.sparse.csgraph`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    words, place = np.unique(hash_words(hashes), axis=0, return_inverse=True)  # a thousand black images are one hash
    pairs = near_pairs(words, distance)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(len(words), len(words)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[place.reshape(-1)]
