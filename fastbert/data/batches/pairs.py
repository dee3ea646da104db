"""The examples of an epoch, planned without touching a token: sentence pairs, or full sentences.

The sentences of a document lie end to end in the corpus, so that an example is only two spans of
it. The procedure is that of BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805) and of
create_pretraining_data.py in https://github.com/google-research/bert, with fresh pairs each epoch.
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

    spans: (E, 4) int64: a_start, a_end, b_start, b_end in the corpus' tokens; A is never empty, and
        B only where there are no pairs: [CLS] A [SEP]
    is_random: (E,) bool, True where B is from another document than A; None without pairs
    """

    spans: NDArray[np.int64]
    is_random: NDArray[np.bool_] | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) int64: tokens of each example, with [CLS] and every [SEP]."""
        a_start, a_end, b_start, b_end = self.spans.T
        special = NUM_SPECIAL - (self.is_random is None)
        return (a_end - a_start) + (b_end - b_start) + special


def plan_pairs(
    corpus: TokenizedCorpus,
    docs: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    max_seq_len: int,
    short_seq_prob: float = 0.1,
) -> PairPlan:
    """The examples of the documents `docs` in an epoch: a pure function of (seed, epoch).

    Sentences are taken until they reach a target length: max_seq_len - 3 or, with probability
    `short_seq_prob`, a uniformly drawn smaller one. (Drawn for each example. The original draws
    for each document, which turns some documents into very many very short examples.) A random
    number of them is A. With probability 1/2, and always if there is only one, B is a random span
    of another of the `docs` and the rest goes back; else the rest is B. What is then longer than
    max_seq_len loses tokens of the longer span, one by one, at the front or the back by chance.

    Raises InputError for fewer than two documents or an option out of range.
    """
    if len(docs) < 2:
        raise InputError(
            f"corpus: {len(docs)} document(s), and one gives no random next sentence; separate "
            "documents by blank lines"
        )
    if max_seq_len < NUM_SPECIAL + 2:
        raise InputError(f"max_seq_len: expected at least {NUM_SPECIAL + 2}, got {max_seq_len}")
    if not 0 <= short_seq_prob <= 1:
        raise InputError(f"short_seq_prob: expected a number from 0 to 1, got {short_seq_prob}")
    room = max_seq_len - NUM_SPECIAL

    rows = array("q")  # not a list of tuples, which would take ten times the memory
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
    """Consecutive sentences of one document, as many as fit: Liu et al. 2019, "DOC-SENTENCES".

    https://arxiv.org/abs/1907.11692 found them the best by a little, and took sentences across
    documents only because batches of rows of one length need them; packed ones do not. A sentence
    longer than an example is cut. The same in every epoch; masks are drawn anew. Raises InputError
    for a max_seq_len without room.
    """
    room = max_seq_len - 2
    if room < 1:
        raise InputError(f"max_seq_len: expected at least 3, got {max_seq_len}")
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
    """(first sentence, target, start of A, end of A, end of the rest, B is random) of a document.

    offsets: of its sentences, and its end; draws: six uniform numbers a sentence
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
    """(starts, ends) of whole sentences, `wanted` tokens or more if the document has them.

    Each from another of the `docs` than the one at index `numbers`, all equally likely.
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
    """Shortens A and B, in place, until both together have at most `room` tokens."""
    lengths = spans[:, 1::2] - spans[:, ::2]  # (E, 2)
    total = np.minimum(lengths.sum(axis=1), room)
    # Taking single tokens from the longer one leaves both half of the room, or a shorter one whole.
    keep_a = np.minimum(lengths[:, 0], np.maximum(total - lengths[:, 1], total - total // 2))
    keep = np.stack([keep_a, total - keep_a], axis=1)
    spans[:, ::2] += generator.binomial(lengths - keep, 0.5)
    spans[:, 1::2] = spans[:, ::2] + keep
