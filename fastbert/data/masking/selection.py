"""Chooses the tokens of a batch to predict: single tokens, whole words, or spans of words."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Span lengths in words: geometric with p = 0.2, at most 10 (Joshi et al. 2020).
SPAN_P, SPAN_MAX = 0.2, 10
_SHARES = SPAN_P * (1 - SPAN_P) ** np.arange(SPAN_MAX)
_LENGTHS_REACHED = np.cumsum(_SHARES / _SHARES.sum())[:-1]


class Tokens(NamedTuple):
    """T packed tokens of whole examples; each array is (T,).

    ids: int64; example: int64, index of the token's example in its epoch, different in adjacent
    examples; position: int64, the token's position in its example; maskable: bool, whether the
    token may be predicted; word_starts: bool, whether the token begins a word
    """

    ids: NDArray[np.int64]
    example: NDArray[np.int64]
    position: NDArray[np.int64]
    maskable: NDArray[np.bool_]
    word_starts: NDArray[np.bool_]


class Draws(NamedTuple):
    """Four independent random 32-bit words for each token; each array is (T,) uint64.

    A span's length is drawn from `low`, because `noising.BertNoise` draws its tokens from `high`.
    """

    key: NDArray[np.uint64]
    choice: NDArray[np.uint64]
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    def at(self, index: NDArray[np.int64]) -> "Draws":
        """The words of the tokens at these indices, (N,)."""
        return Draws(*(words[index] for words in self))


class Chosen(NamedTuple):
    """The tokens to predict, as indices into the batch.

    targets: (N,) int64, each token once; leader: (N,) int64, the token whose `Draws.choice` decides
    how the target is replaced: its own, or the same one for all tokens of a span
    """

    targets: NDArray[np.int64]
    leader: NDArray[np.int64]


Choose = Callable[[Tokens, Draws, float], Chosen]


def num_targets(maskable: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The number of tokens to predict in each example: a share of its maskable ones, at least one.

    maskable: (B,) number of maskable tokens in each example; an example without any predicts none
    """
    wanted = np.maximum(np.rint(share * maskable).astype(np.int64), 1)
    counts: NDArray[np.int64] = np.minimum(wanted, maskable)
    return counts


class Examples(NamedTuple):
    """The B examples of a batch of T tokens.

    begins: (B,) int64, index of each example's first token; number: (T,) int64, index in the batch
    of each token's example; wanted: (B,) int64, how many tokens of each example to predict
    """

    begins: NDArray[np.int64]
    number: NDArray[np.int64]
    wanted: NDArray[np.int64]


def examples_of(tokens: Tokens, share: float) -> Examples:
    """Each example's first token, and the number of its tokens to predict."""
    begins = np.flatnonzero(np.diff(tokens.example, prepend=-1))
    sizes = np.diff(begins, append=len(tokens.ids))
    maskable = np.add.reduceat(tokens.maskable, begins, dtype=np.int64)
    return Examples(begins, np.repeat(np.arange(len(begins)), sizes), num_targets(maskable, share))


def _at_random(number: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(N,) int64: the order that sorts by `number`, then by `key`, and keeps the order of ties.

    number: (N,) sorted example numbers; key: (N,) random keys of at most 2**32. Each sorted integer
    has its index in the low bits, because sorting integers is several times faster than argsort.
    """
    high = number.astype(np.uint64) << np.uint64(33) | key
    bits = len(key).bit_length()
    if len(key) and int(number[-1]).bit_length() + 33 + bits > 64:
        return np.argsort(high, kind="stable")
    index = np.arange(len(key), dtype=np.uint64)
    return (np.sort(high << np.uint64(bits) | index) & np.uint64(2**bits - 1)).astype(np.int64)


def choose_tokens(tokens: Tokens, draws: Draws, share: float) -> Chosen:
    """Chooses max(1, round(share * n)) of each example's n maskable tokens, uniformly."""
    examples = examples_of(tokens, share)
    key = np.where(tokens.maskable, draws.key, np.uint64(2**32))  # special tokens come last
    order = _at_random(examples.number, key)
    rank = np.arange(len(order)) - examples.begins[examples.number]
    index = order[rank < examples.wanted[examples.number]]
    return Chosen(index, index)


class _Words(NamedTuple):
    """W words of maskable tokens; each array is (W,) int64.

    first: index of the word's first token; size: its number of tokens; number: its example
    """

    first: NDArray[np.int64]
    size: NDArray[np.int64]
    number: NDArray[np.int64]


def _words(tokens: Tokens, examples: Examples) -> _Words:
    """The words of a batch; after a special token or a cut, the rest of a word is a word too."""
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
    """The ranges first[i], ..., first[i] + size[i] - 1 end to end, and i for each element."""
    which = np.repeat(np.arange(len(size)), size)
    begins = np.cumsum(size) - size
    return np.arange(len(which)) + (first - begins)[which], which


def choose_words(tokens: Tokens, draws: Draws, share: float) -> Chosen:
    """Chooses whole words in random order, skipping words that no longer fit into the share.

    The first word of each example is chosen even if it is longer than the share. Order and rule
    follow whole-word masking in https://github.com/google-research/bert.
    """
    examples = examples_of(tokens, share)
    words = _words(tokens, examples)
    order = _at_random(words.number, draws.key[words.first])
    number, size = words.number[order], words.size[order]
    is_first = np.diff(number, prepend=-1) != 0
    # a first word that is longer than the share raises it to the word's own length
    wanted = examples.wanted.copy()
    wanted[number[is_first]] = np.maximum(wanted[number[is_first]], size[is_first])
    chosen = order[_that_fit(number, size, wanted)]
    index, _ = _ranges(words.first[chosen], words.size[chosen])
    return Chosen(index, index)


def _that_fit(
    number: NDArray[np.int64], size: NDArray[np.int64], room: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Indices of the taken words, if each word in turn is taken when it fits into its example.

    number: (W,) sorted, the word's example; size: (W,) tokens of the word; room: (B,) tokens that
    each example may take. In each round every example takes its words up to the first that does not
    fit, then drops the words that exceed its remaining room. So there are at most as many rounds as
    different sizes, and few words are left after the first.
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
    """Chooses spans of whole words until the share is reached, and cuts the last span there.

    SpanBERT's masking (Joshi et al. 2020, https://arxiv.org/abs/1907.10529): a span begins with a
    random word that is in no earlier span, and its length in words is geometric with p = 0.2,
    truncated at 10 and renormalised. A span ends at the latest with its segment. All tokens of a
    span are replaced in the same way. Each round of the loop adds one span to every example that
    still needs tokens.
    """
    examples = examples_of(tokens, share)
    words = _words(tokens, examples)
    order = _at_random(words.number, draws.key[words.first])
    segment_end = _segment_ends(words)
    free = np.ones(len(order), bool)
    # for each example with words: its next word and its last word's end in `order`, and how many
    # tokens it still needs
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
        length = _span_lengths(draws.low[words.first[anchor]])
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
    """(W,) the end of each word's run of words without a gap.

    Special tokens and the ends of examples are gaps, so that a span does not cross segments.
    """
    gap = words.first[1:] != words.first[:-1] + words.size[:-1]
    gap |= np.diff(words.number) != 0
    ends = np.append(np.flatnonzero(gap) + 1, len(words.first))
    run_ends: NDArray[np.int64] = ends[np.append(0, np.cumsum(gap))]
    return run_ends


def _span_lengths(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The length of a span for each random 32-bit word."""
    return 1 + np.searchsorted(_LENGTHS_REACHED, words * 2.0**-32, side="right")
