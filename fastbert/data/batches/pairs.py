"""Plans the examples of an epoch as spans of tokens: sentence pairs, or full sentences.

A document's sentences follow each other in the corpus, so an example is two spans of the corpus,
and planning does not read tokens. The procedure is BERT's (Devlin et al. 2018,
https://arxiv.org/abs/1810.04805, and create_pretraining_data.py in
https://github.com/google-research/bert), except that every epoch has new pairs.
"""

import dataclasses
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.streams import Purpose, stream
from fastbert.data.tokenized.corpus import TokenizedCorpus

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """The E examples of one epoch, in the order of their documents.

    spans: (E, 4) int64: a_start, a_end, b_start, b_end, indices into `TokenizedCorpus.tokens`. A is
        never empty. B is empty only in a plan without pairs, whose examples are [CLS] A [SEP].
    is_random: (E,) bool, True if B is from another document than A; None without pairs
    """

    spans: NDArray[np.int64]
    is_random: NDArray[np.bool_] | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) int64: number of tokens in each example, including [CLS] and every [SEP]."""
        a_start, a_end, b_start, b_end = self.spans.T
        special = NUM_SPECIAL - (self.is_random is None)
        lengths: NDArray[np.int64] = (a_end - a_start) + (b_end - b_start) + special
        return lengths


def plan_pairs(
    corpus: TokenizedCorpus,
    docs: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    max_seq_len: int,
    short_seq_prob: float = 0.1,
) -> PairPlan:
    """Plans the sentence pairs of the documents `docs`: a pure function of (seed, epoch).

    docs: (D,) indices of documents

    Sentences are taken until they reach a target length: max_seq_len - 3 or, with probability
    `short_seq_prob`, a uniformly drawn smaller one. (The target is drawn for each example. The
    original draws it for each document, which turns some documents into very many very short
    examples.) A random number of these sentences becomes A. With probability 1/2, and always if
    there is only one sentence, B is a random span from another document of `docs`, and the next
    example begins with the sentences after A; otherwise they are B. An example that is longer than
    max_seq_len loses single tokens of its longer span, each at the front or the back at random.

    Raises InputError for fewer than two documents or an option out of range.
    """
    if len(docs) < 2:
        raise InputError(
            f"--corpus: {len(docs)} document(s), but a random next sentence needs two; separate "
            "documents with blank lines"
        )
    if max_seq_len < NUM_SPECIAL + 2:
        raise InputError(f"--max-seq-len: expected at least {NUM_SPECIAL + 2}, got {max_seq_len}")
    if not 0 <= short_seq_prob <= 1:
        raise InputError(f"--short-seq-prob: expected a number from 0 to 1, got {short_seq_prob}")
    room = max_seq_len - NUM_SPECIAL

    rows = array("q")  # a list of tuples would take ten times the memory
    partners = array("d")
    for number, doc in enumerate(docs.tolist()):
        first, last = corpus.document_offsets[doc : doc + 2]
        offsets = corpus.sentence_offsets[first : last + 1].tolist()
        draws = stream(seed, Purpose.PAIRS, epoch, doc).random((last - first, 6)).tolist()
        for sentence, *row in _chunks(offsets, draws, room, short_seq_prob):
            rows.extend((number, *row))
            partners.extend(draws[sentence][4:])

    numbers, targets, a_start, a_end, b_end, is_random = np.array(rows).reshape(-1, 6).T
    b_start = a_end.copy()
    where = np.flatnonzero(is_random)
    b_start[where], b_end[where] = _random_spans(
        corpus,
        docs,
        numbers[where],
        np.array(partners).reshape(-1, 2)[where],
        targets[where] - (a_end - a_start)[where],
    )
    spans = np.stack([a_start, a_end, b_start, b_end], axis=1)
    _truncate(spans, room, stream(seed, Purpose.TRUNCATION, epoch))
    return PairPlan(spans, is_random.astype(bool))


def plan_sentences(
    corpus: TokenizedCorpus, docs: NDArray[np.int64], *, max_seq_len: int
) -> PairPlan:
    """Plans examples without pairs: as many consecutive sentences of one document as fit.

    This is DOC-SENTENCES of Liu et al. 2019 (https://arxiv.org/abs/1907.11692), who found it
    slightly better than examples that cross documents, but used the latter to keep the batch size
    constant, which packed batches do not need. A sentence longer than an example is cut into
    several examples. The plan is the same in every epoch; only the masks change.

    docs: (D,) indices of documents. Raises InputError for a max_seq_len below 3.
    """
    room = max_seq_len - 2
    if room < 1:
        raise InputError(f"--max-seq-len: expected at least 3, got {max_seq_len}")
    rows = array("q")
    for doc in docs.tolist():
        first, last = corpus.document_offsets[doc : doc + 2]
        offsets = corpus.sentence_offsets[first : last + 1].tolist()
        start, end = 0, len(offsets) - 1
        while start < end:
            stop = max(bisect_right(offsets, offsets[start] + room) - 1, start + 1)
            for begin in range(offsets[start], offsets[stop], room):
                rows.extend((begin, min(begin + room, offsets[stop])))
            start = stop
    a_start, a_end = np.array(rows, np.int64).reshape(-1, 2).T
    return PairPlan(np.stack([a_start, a_end, a_end, a_end], axis=1), None)


def _chunks(
    offsets: list[int], draws: list[list[float]], room: int, short_seq_prob: float
) -> Iterator[tuple[int, int, int, int, int, bool]]:
    """Yields (first sentence, target, start of A, end of A, end of the chunk, whether B is random).

    offsets: where each sentence of one document begins, and where the document ends, in tokens;
    draws: six uniform numbers for each sentence
    """
    first, last = 0, len(offsets) - 1
    while first < last:
        short, length, split, random, _, _ = draws[first]
        target = 2 + int(length * (room - 1)) if short < short_seq_prob else room
        end = bisect_left(offsets, offsets[first] + target, first + 1, last)
        a_end = first + 1 + int(split * (end - first - 1))  # at least one sentence on either side
        is_random = end == first + 1 or random < 0.5
        yield first, target, offsets[first], offsets[a_end], offsets[end], is_random
        first = a_end if is_random else end


def _random_spans(
    corpus: TokenizedCorpus,
    docs: NDArray[np.int64],
    numbers: NDArray[np.int64],
    draws: NDArray[np.float64],
    wanted: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, ends) of random spans of whole sentences, the segments B of N examples.

    A span has `wanted` tokens or more, or ends with its document. Its document is drawn uniformly
    from `docs` without `docs[numbers]`, the document of segment A. draws: (N, 2) uniform numbers
    """
    other = (draws[:, 0] * (len(docs) - 1)).astype(np.int64)
    other += other >= numbers
    first = corpus.document_offsets[docs[other]]
    last = corpus.document_offsets[docs[other] + 1]
    begin = first + (draws[:, 1] * (last - first)).astype(np.int64)
    starts = corpus.sentence_offsets[begin]
    end = np.searchsorted(corpus.sentence_offsets, starts + np.maximum(wanted, 1))
    return starts, corpus.sentence_offsets[np.minimum(end, last)]


def _truncate(spans: NDArray[np.int64], room: int, generator: np.random.Generator) -> None:
    """Shortens A and B, in place, until together they have at most `room` tokens."""
    lengths = spans[:, 1::2] - spans[:, ::2]  # (E, 2)
    total = np.minimum(lengths.sum(axis=1), room)
    # Dropping tokens one by one from the longer segment leaves each half of the room, unless one of
    # them is shorter than that and stays whole.
    keep_a = np.minimum(lengths[:, 0], np.maximum(total - lengths[:, 1], total - total // 2))
    keep = np.stack([keep_a, total - keep_a], axis=1)
    spans[:, ::2] += generator.binomial(lengths - keep, 0.5)
    spans[:, 1::2] = spans[:, ::2] + keep
