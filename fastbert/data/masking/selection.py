"""Which tokens of a batch are to be predicted: single tokens, whole words, or spans of words."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.data.masking.philox import uniform

# Lengths of spans in words: geometric with 0.2, no longer than 10 (Joshi et al. 2020).
SPAN_P, SPAN_MAX = 0.2, 10
_SHARES = SPAN_P * (1 - SPAN_P) ** np.arange(SPAN_MAX)
_LENGTHS_REACHED = np.cumsum(_SHARES / _SHARES.sum())[:-1]


class Tokens(NamedTuple):
    """T tokens of whole examples laid end to end; each array is (T,).

    ids: int64; example: int64, the index in its epoch, the same for its neighbours only; position:
    int64, in the example; maskable: bool, True where a token may be predicted; word_starts: bool
    """

    ids: NDArray[np.int64]
    example: NDArray[np.int64]
    position: NDArray[np.int64]
    maskable: NDArray[np.bool_]
    word_starts: NDArray[np.bool_]


class Draws(NamedTuple):
    """Four independent random words of 32 bits for each token, in uint64."""

    key: NDArray[np.uint64]
    choice: NDArray[np.uint64]
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    def at(self, index: NDArray[np.int64]) -> "Draws":
        return Draws(*(words[index] for words in self))


class Chosen(NamedTuple):
    """targets: (N,) int64, the tokens to predict, each once; leader: (N,) int64, for each the token
    by whose `choice` it is changed, one for those that are changed alike."""

    targets: NDArray[np.int64]
    leader: NDArray[np.int64]


Choose = Callable[[Tokens, Draws, float], Chosen]


def num_targets(maskable: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """How many tokens an example predicts, given how many it could: the share, one at least."""
    wanted = np.maximum(np.rint(share * maskable).astype(np.int64), 1)
    return np.minimum(wanted, maskable)


class Examples(NamedTuple):
    """begins: (B,) where each example begins; number: (T,) of the example of each token;
    wanted: (B,) how many tokens of each are to be predicted."""

    begins: NDArray[np.int64]
    number: NDArray[np.int64]
    wanted: NDArray[np.int64]


def examples_of(tokens: Tokens, share: float) -> Examples:
    begins = np.flatnonzero(np.diff(tokens.example, prepend=-1))
    sizes = np.diff(begins, append=len(tokens.ids))
    maskable = np.add.reduceat(tokens.maskable, begins, dtype=np.int64)
    return Examples(begins, np.repeat(np.arange(len(begins)), sizes), num_targets(maskable, share))


def _at_random(number: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Example by example, the order of the keys, which are at most 2**32; of equal ones as it is.

    Numbers are sorted several times faster than an order is found, so each carries its index.
    """
    high = number.astype(np.uint64) << np.uint64(33) | key
    bits = len(key).bit_length()
    if len(key) and int(number[-1]).bit_length() + 33 + bits > 64:
        return np.argsort(high, kind="stable")
    index = np.arange(len(key), dtype=np.uint64)
    return (np.sort(high << np.uint64(bits) | index) & np.uint64(2**bits - 1)).astype(np.int64)


def choose_tokens(tokens: Tokens, draws: Draws, share: float) -> Chosen:
    """Of each example's n maskable tokens max(1, round(share * n)), all sets equally likely."""
    examples = examples_of(tokens, share)
    key = np.where(tokens.maskable, draws.key, np.uint64(2**32))  # the others come last
    order = _at_random(examples.number, key)
    rank = np.arange(len(order)) - examples.begins[examples.number]
    index = order[rank < examples.wanted[examples.number]]
    return Chosen(index, index)


class _Words(NamedTuple):
    """W words of maskable tokens; each array is (W,).

    first, size: of its tokens; number: of its example
    """

    first: NDArray[np.int64]
    size: NDArray[np.int64]
    number: NDArray[np.int64]


def _words(tokens: Tokens, examples: Examples) -> _Words:
    """What is left of a word that was cut off, or stands beside a special token, is a word too."""
    after_another = np.append(False, tokens.maskable[:-1])
    after_another[examples.begins] = False
    begins = tokens.maskable & (tokens.word_starts | ~after_another)
    first = np.flatnonzero(begins)
    word_of_token = np.cumsum(begins) - 1
    size = np.bincount(word_of_token[tokens.maskable], minlength=len(first))
    return _Words(first, size, examples.number[first])


def _ranges(
    first: NDArray[np.int64], size: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers from each `first` on, `size` of them, end to end; and which range each is in."""
    which = np.repeat(np.arange(len(size)), size)
    begins = np.cumsum(size) - size
    return np.arange(len(which)) + (first - begins)[which], which


def choose_words(tokens: Tokens, draws: Draws, share: float) -> Chosen:
    """Whole words in random order, each if it still fits in the share; the first one in any case.

    The order and the rule of the whole-word masking in https://github.com/google-research/bert.
    """
    examples = examples_of(tokens, share)
    words = _words(tokens, examples)
    order = _at_random(words.number, draws.key[words.first])
    number, size = words.number[order], words.size[order]
    is_first = np.diff(number, prepend=-1) != 0
    # what may be too long for the share alone stands in for it
    wanted = examples.wanted.copy()
    wanted[number[is_first]] = np.maximum(wanted[number[is_first]], size[is_first])
    chosen = order[_that_fit(number, size, wanted)]
    index, _ = _ranges(words.first[chosen], words.size[chosen])
    return Chosen(index, index)


def _that_fit(
    number: NDArray[np.int64], size: NDArray[np.int64], room: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Which are taken if each, in its turn, is taken where the room of its number still holds it.

    Every round takes all up to the first that does not fit, and drops what is larger than what is
    then left: as many rounds as there are sizes at most, and few words after the first.
    """
    room, taken = room.copy(), []
    waiting = np.arange(len(number))
    while len(waiting):
        of, used = number[waiting], np.cumsum(size[waiting])
        first = np.flatnonzero(np.diff(of, prepend=-1))
        used -= np.repeat(used[first] - size[waiting[first]], np.diff(first, append=len(of)))
        fits = used <= room[of]
        taken.append(waiting[fits])
        np.subtract.at(room, of[fits], size[waiting[fits]])
        waiting = waiting[~fits]
        waiting = waiting[size[waiting] <= room[number[waiting]]]
    return np.concatenate(taken) if taken else waiting


def choose_spans(tokens: Tokens, draws: Draws, share: float) -> Chosen:
    """Spans of whole words, one after the other, until the share is reached; the last is cut there.

    SpanBERT's (Joshi et al. 2020, https://arxiv.org/abs/1907.10529): a span begins with a word at
    random that is not in an earlier one, and its length in words is geometric with p = 0.2, cut at
    10 and renormalised. It ends early where its segment does. What it becomes is decided for all
    of it at once. All examples go on at the same time, a span each in every round.
    """
    examples = examples_of(tokens, share)
    words = _words(tokens, examples)
    order = _at_random(words.number, draws.key[words.first])
    segment_end = _segment_ends(words)
    free = np.ones(len(order), bool)
    # of the examples that have words: where their words are in `order`, and what is still wanted
    place = np.flatnonzero(np.diff(words.number, prepend=-1))
    end = np.append(place[1:], len(order))
    left = examples.wanted[words.number[place]]
    index, leader = [place[:0]], [place[:0]]
    active = np.arange(len(place))
    while len(active):
        anchor = order[place[active]]
        place[active] += 1
        is_free = free[anchor]
        anchor, of = anchor[is_free], active[is_free]
        length = _span_lengths(draws.at(words.first[anchor]))
        span, owner = _ranges(anchor, np.minimum(length, segment_end[anchor] - anchor))
        is_free = free[span]
        span, owner = span[is_free], owner[is_free]
        free[span] = False
        token, word = _ranges(words.first[span], words.size[span])
        owner = owner[word]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        fits = rank < left[of][owner]
        index.append(token[fits])
        leader.append(words.first[anchor][owner[fits]])
        left[of] -= np.bincount(owner[fits], minlength=len(of))
        active = active[(left[active] > 0) & (place[active] < end[active])]
    return Chosen(np.concatenate(index), np.concatenate(leader))


def _segment_ends(words: _Words) -> NDArray[np.int64]:
    """(W,) the end of the words that follow each without a gap, in its example."""
    gap = words.first[1:] != words.first[:-1] + words.size[:-1]
    gap |= np.diff(words.number) != 0
    ends = np.append(np.flatnonzero(gap) + 1, len(words.first))
    return ends[np.append(0, np.cumsum(gap))]


def _span_lengths(draws: Draws) -> NDArray[np.int64]:
    uniform_numbers = uniform(draws.high, draws.low)
    return 1 + np.searchsorted(_LENGTHS_REACHED, uniform_numbers, side="right")
