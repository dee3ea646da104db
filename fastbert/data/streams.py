"""Independent random streams, each a pure function of its purpose, not of earlier draws."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """The use of a stream; the numbers must not change, or runs would draw other data."""

    SPLIT = 0
    PAIRS = 1
    TRUNCATION = 2
    SHUFFLE = 3


def stream(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """The random generator for one purpose, epoch and document index, and any 64-bit `seed`.

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") can start anywhere in
    its sequence, and the streams of one seed and epoch start at least 2**128 blocks apart.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    counter = np.array([0, 0, index, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
