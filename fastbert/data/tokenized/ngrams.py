"""Counts of unigrams and distinct bigrams in a tokenised corpus, stored beside it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.tokenized.corpus import TokenizedCorpus
from fastbert.system.files import output

FILE = "ngrams.npz"
LARGEST = 2**16  # entries of a vocabulary, for which one bit per pair takes 512 MB
_CHUNK = 1 << 22  # tokens at a time


class NgramCounts(NamedTuple):
    """Counts for each token of the vocabulary; each array is (V,) int64.

    tokens: how often the token occurs; followers, predecessors: how many different tokens follow
    and precede it in the same document
    """

    tokens: NDArray[np.int64]
    followers: NDArray[np.int64]
    predecessors: NDArray[np.int64]


def ngram_counts(corpus: TokenizedCorpus) -> NgramCounts:
    """The counts of a whole corpus, read from its directory or counted and stored there.

    Raises InputError for a vocabulary of more than 65,536 tokens, Unwritable if the counts cannot
    be stored.
    """
    if corpus.vocab_size > LARGEST:
        raise InputError(
            f"--masking: unigram and bigram-kn need a vocabulary of at most {LARGEST:,} tokens, "
            f"got {corpus.vocab_size:,}"
        )
    path = corpus.directory / FILE
    try:
        with np.load(path) as arrays:
            if str(arrays["identity"]) == corpus.identity:
                return NgramCounts(*(arrays[name] for name in NgramCounts._fields))
    except Exception:  # a missing or damaged file: the corpus is counted again
        pass
    counts = _count(corpus)
    with output(path) as file:
        np.savez(file, identity=corpus.identity, **counts._asdict())
    return counts


def _count(corpus: TokenizedCorpus) -> NgramCounts:
    size, total = corpus.vocab_size, corpus.num_tokens
    tokens = np.zeros(size, np.int64)
    follows = np.zeros((size, -(-size // 8)), np.uint8)  # bit (a, b): b follows a
    ends = corpus.sentence_offsets[corpus.document_offsets[1:]] - 1  # a document's last tokens
    for begin in range(0, total, _CHUNK):
        chunk = corpus.tokens[begin : begin + _CHUNK + 1].astype(np.int64)
        tokens += np.bincount(chunk[:_CHUNK], minlength=size)
        here = ends[np.searchsorted(ends, begin) : np.searchsorted(ends, begin + _CHUNK)] - begin
        inside = np.ones(len(chunk) - 1, bool)
        inside[here[here < len(inside)]] = False
        pairs = np.unique((chunk[:-1] * size + chunk[1:])[inside])
        first, second = np.divmod(pairs, size)
        np.bitwise_or.at(follows, (first, second >> 3), (1 << (second & 7)).astype(np.uint8))
    followers, predecessors = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for token, row in enumerate(follows):
        bits = np.unpackbits(row, count=size, bitorder="little")
        followers[token] = bits.sum()
        predecessors += bits
    return NgramCounts(tokens, followers, predecessors)
