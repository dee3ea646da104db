"""Independent random streams, each a pure function of what it is for: nothing depends on order."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream decides; the numbers are part of every run, so none is ever changed."""

    SPLIT = 0
    PAIRS = 1
    TRUNCATION = 2
    SHUFFLE = 3


def stream(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """The generator of one purpose, epoch and index (of a document), for any 64-bit `seed`.

    Philox (Salmon et al. 2011) reaches any place of its sequence at once: the streams are places
    2**128 blocks apart.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    counter = np.array([0, 0, index, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
