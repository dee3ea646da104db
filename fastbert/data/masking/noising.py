"""What becomes of the tokens that are to be predicted."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.masking.philox import uniform
from fastbert.data.masking.selection import Draws
from fastbert.data.text.tokenizer import SpecialTokens
from fastbert.data.tokenized.ngrams import NgramCounts


class Corrupt(Protocol):
    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        """What stands instead of the chosen tokens `ids`, (N,), given a `choice` for each."""
        ...


_ONE = 2.0**32  # a word of 32 bits is below


class BertNoise(NamedTuple):
    """80 % become [MASK], 10 % a random token that is not special, and 10 % stay as they are.

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
    """A token becomes [MASK] with probability gamma, else it stays.

    Blank noising of Xie et al. 2017 (https://arxiv.org/abs/1703.02573), as are the two below.
    """

    gamma: float
    specials: SpecialTokens

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        return np.where(choice < self.gamma * _ONE, self.specials.mask, ids)


class Replace(NamedTuple):
    """A token w becomes, with probability[w], another one drawn in proportion to `weights`.

    probability, cumulative: (V,) float64, the latter the weights' cumulative shares
    """

    probability: NDArray[np.float64]
    cumulative: NDArray[np.float64]

    def __call__(
        self, ids: NDArray[np.int64], choice: NDArray[np.uint64], draws: Draws
    ) -> NDArray[np.int64]:
        drawn = np.searchsorted(self.cumulative, uniform(draws.high, draws.low), side="right")
        return np.where(choice < self.probability[ids] * _ONE, drawn, ids)


def unigram(gamma: float, counts: NgramCounts, specials: SpecialTokens) -> Replace:
    """Each token with probability gamma, by one drawn from the unigram distribution."""
    probability = np.full(len(counts.tokens), gamma)
    return Replace(probability, _cumulative_shares(counts.tokens, specials))


def bigram_kneser_ney(gamma: float, counts: NgramCounts, specials: SpecialTokens) -> Replace:
    """w with probability min(1, gamma N1+(w, .) / c(w)), by a token in proportion to N1+(., w).

    So tokens that many different ones follow are replaced more often, and by tokens that follow
    many: the idea of Kneser-Ney smoothing. N1+(w, .) is how many different tokens follow w in the
    corpus, N1+(., w) how many precede it, c(w) how often it occurs.
    """
    probability = np.minimum(1.0, gamma * counts.followers / np.maximum(counts.tokens, 1))
    return Replace(probability, _cumulative_shares(counts.predecessors, specials))


def _cumulative_shares(weights: NDArray[np.int64], specials: SpecialTokens) -> NDArray[np.float64]:
    weights = weights.astype(np.float64)
    weights[list(specials)] = 0
    if not weights.any():
        raise InputError("masking: the corpus is too small to draw replacements from")
    shares = np.cumsum(weights / weights.sum())
    shares[np.flatnonzero(weights)[-1] :] = 1.0  # whatever was rounded: no token beyond is drawn
    return shares


def _ordinary_tokens(
    words: NDArray[np.uint64], vocab_size: int, specials: SpecialTokens
) -> NDArray[np.int64]:
    """A token that is not special for each random 32-bit word, all equally likely."""
    ordinary = np.uint64(vocab_size - len(specials))
    tokens = (words * ordinary >> np.uint64(32)).astype(np.int64)
    for special in sorted(specials):
        tokens += tokens >= special
    return tokens
