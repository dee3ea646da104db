"""Counter-based random numbers: functions of the counter and the key, not of the order of draws.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the keys each round: golden ratio, sqrt(3) - 1
_WORD = np.uint64(0xFFFFFFFF)
_BLOCK = 1 << 14  # counters computed at once; their words fit in a core's cache


def philox(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int
) -> tuple[NDArray[np.uint64], ...]:
    """Four random 32-bit words for each counter: four uint64 arrays of the counter's shape.

    counter: four integers or arrays below 2**32, lowest word first, broadcast together
    key: 64 bits; the lower half is the first key word
    """
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    if words[0].ndim != 1 or words[0].size <= _BLOCK:
        return _rounds(words, key)
    blocks = range(0, words[0].size, _BLOCK)
    found = [_rounds([word[i : i + _BLOCK] for word in words], key) for i in blocks]
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _rounds(words: Sequence[NDArray[np.uint64]], key: int) -> tuple[NDArray[np.uint64], ...]:
    x0, x1, x2, x3 = words
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * np.uint64(_MULTIPLIERS[0]), x2 * np.uint64(_MULTIPLIERS[1])
        x0, x1 = p1 >> np.uint64(32) ^ x1 ^ np.uint64(k0), p1 & _WORD
        x2, x3 = p0 >> np.uint64(32) ^ x3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def uniform(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2**-53, each from two random 32-bit words; float64."""
    return (high << np.uint64(21) | low >> np.uint64(11)) * 2.0**-53
