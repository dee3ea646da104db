"""Replaces the tokens to predict in the model's input."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.masking.philox import uniform
from fastbert.data.masking.selection import Draws
from fastbert.data.text.tokenizer import SpecialTokens
from fastbert.data.tokenized.ngrams import NgramCounts


class Corrupt(Protocol):
    """A function that replaces the chosen tokens in the input with [MASK] or other tokens."""

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        """(N,) int64: the replacements of the chosen tokens `ids`, (N,).

        choice: (N,) 32-bit words that decide the kind of replacement, the same for all tokens of a
        span; draws: independent 32-bit words for each of the N tokens
        """
        ...


_ONE = 2.0**32  # scales a probability to 32-bit words


class BertNoise(NamedTuple):
    """80 % become [MASK], 10 % a random token that is not special, and 10 % do not change.

    Devlin et al. 2018 (https://arxiv.org/abs/1810.04805), section 3.1.
    """

    specials: SpecialTokens
    vocab_size: int

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        tenth = choice * np.uint64(10) >> np.uint64(32)  # 0 to 9, all equally likely
        random = _ordinary_tokens(draws.high, self.vocab_size, self.specials)
        return np.where(tenth < 8, self.specials.mask, np.where(tenth == 8, random, ids))


class Blank(NamedTuple):
    """Blank noising: a token becomes [MASK] with probability gamma.

    Xie et al. 2017 (https://arxiv.org/abs/1703.02573), as are `unigram` and `bigram_kneser_ney`.
    """

    gamma: float
    specials: SpecialTokens

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        return np.where(choice < self.gamma * _ONE, self.specials.mask, ids)


class Replace(NamedTuple):
    """Replaces a token w, with probability[w], with one drawn from a fixed distribution.

    probability: (V,) float64; cumulative: (V,) float64, cumulative distribution of the replacements
    """

    probability: NDArray[np.float64]
    cumulative: NDArray[np.float64]

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        drawn = np.searchsorted(self.cumulative, uniform(draws.high, draws.low), side="right")
        return np.where(choice < self.probability[ids] * _ONE, drawn, ids)


def unigram(gamma: float, counts: NgramCounts, specials: SpecialTokens) -> Replace:
    """Unigram noising: with probability gamma, a draw from the unigrams replaces the token.

    Raises InputError if the corpus has no ordinary token.
    """
    probability = np.full(len(counts.tokens), gamma)
    return Replace(probability, _cumulative_shares(counts.tokens, specials))


def bigram_kneser_ney(gamma: float, counts: NgramCounts, specials: SpecialTokens) -> Replace:
    """Bigram Kneser-Ney noising: replaces token w with probability gamma N1+(w, .) / c(w).

    The probability is at most 1, and the replacement is drawn in proportion to N1+(., w). N1+(w, .)
    is the number of different tokens that follow w in the corpus, N1+(., w) the number of different
    tokens that precede it, and c(w) the number of its occurrences. As in Kneser-Ney smoothing,
    tokens with many successors are replaced more often, with tokens that have many predecessors.

    Raises InputError if the corpus is too small to have replacements.
    """
    probability = np.minimum(1.0, gamma * counts.followers / np.maximum(counts.tokens, 1))
    return Replace(probability, _cumulative_shares(counts.predecessors, specials))


def _cumulative_shares(weights: NDArray[np.int64], specials: SpecialTokens) -> NDArray[np.float64]:
    weights = weights.astype(np.float64)
    weights[list(specials)] = 0
    if not weights.any():
        raise InputError("--masking: the corpus is too small to draw replacements from")
    shares = np.cumsum(weights / weights.sum())
    # exactly 1 despite rounding, so that no token after the last one with a weight is drawn
    shares[np.flatnonzero(weights)[-1] :] = 1.0
    return shares


def _ordinary_tokens(
    words: NDArray[np.uint64], vocab_size: int, specials: SpecialTokens
) -> NDArray[np.int64]:
    """A uniformly drawn token that is not special, for each random 32-bit word."""
    ordinary = np.uint64(vocab_size - len(specials))
    tokens = (words * ordinary >> np.uint64(32)).astype(np.int64)
    for special in sorted(specials):
        tokens += tokens >= special
    return tokens
