"""Tokenised corpora that are the same, and the documents of one that ends early."""

import numpy as np

from fastbert.data import TokenizedCorpus

ARRAYS = ("tokens", "word_starts", "sentence_offsets", "document_offsets")


def assert_same(a: TokenizedCorpus, b: TokenizedCorpus):
    assert a.vocab_size == b.vocab_size
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


def interrupted(documents, after):
    yield from documents[:after]
    raise KeyboardInterrupt
