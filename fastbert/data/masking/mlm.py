"""Masked language modelling: chooses and replaces tokens, differently in each epoch.

Philox draws every random number from the token's place (position, example, epoch), so an example
gets the same masks in every batch, rank and worker process.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.masking import noising, selection
from fastbert.data.masking.noising import Corrupt
from fastbert.data.masking.philox import philox
from fastbert.data.masking.selection import Choose, Chosen, Draws, Tokens
from fastbert.data.text.tokenizer import SpecialTokens
from fastbert.data.tokenized.ngrams import NgramCounts
from fastbert.packing import IGNORE_INDEX

_STREAM = 0  # last word of the Philox counter; other values are free for other uses


@dataclasses.dataclass(frozen=True)
class Masking:
    """A masking scheme.

    choose: chooses the tokens to predict, about the share `probability`; corrupt: replaces them in
    the input. Raises InputError for a probability that is not between 0 and 1.
    """

    choose: Choose
    corrupt: Corrupt
    probability: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise InputError(
                f"--mlm-probability: expected a number between 0 and 1, got {self.probability}"
            )

    def __call__(
        self, tokens: Tokens, *, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(masked ids, labels) of a batch, (T,) int64 each; labels are -100 where not predicted.

        seed: 64 bits
        """
        chosen, draws = self._choose(tokens, seed, epoch)
        own = draws.at(chosen.targets)
        labels = np.full(len(tokens.ids), IGNORE_INDEX, np.int64)
        masked = tokens.ids.copy()
        labels[chosen.targets] = tokens.ids[chosen.targets]
        masked[chosen.targets] = self.corrupt(
            tokens.ids[chosen.targets], draws.choice[chosen.leader], own
        )
        return masked, labels

    def num_targets(self, tokens: Tokens, *, seed: int, epoch: int) -> int:
        """The number of tokens to predict in the batch."""
        # the number of single tokens is known without a draw
        if self.choose is selection.choose_tokens:
            return int(selection.examples_of(tokens, self.probability).wanted.sum())
        return len(self._choose(tokens, seed, epoch)[0].targets)

    def _choose(self, tokens: Tokens, seed: int, epoch: int) -> tuple[Chosen, Draws]:
        draws = Draws(*philox((tokens.position, tokens.example, epoch, _STREAM), seed))
        return self.choose(tokens, draws, self.probability), draws


SCHEMES = ("bert", "whole-word", "span", "blank", "unigram", "bigram-kn")


def require_scheme(scheme: str) -> None:
    """Raises InputError for a masking that is not in SCHEMES."""
    if scheme not in SCHEMES:
        raise InputError(f"--masking: expected one of {', '.join(SCHEMES)}, got {scheme!r}")


def make_masking(
    scheme: str,
    specials: SpecialTokens,
    vocab_size: int,
    *,
    probability: float = 0.15,
    gamma: float = 0.8,
    counts: Callable[[], NgramCounts] | None = None,
) -> Masking:
    """The masking with a name in SCHEMES.

    "bert": single tokens, 80/10/10 (see `noising.BertNoise`); "whole-word" and "span": the same for
    whole words and for spans of words (see `selection`); "blank", "unigram" and "bigram-kn": single
    tokens, replaced as in Xie et al. 2017 (https://arxiv.org/abs/1703.02573), see `noising`.

    gamma: noise parameter of Xie et al.; counts: returns the corpus's counts, called only for
    "unigram" and "bigram-kn"

    Raises InputError for another scheme, or for a probability or gamma out of range.
    """
    require_scheme(scheme)
    if not gamma > 0:
        raise InputError(f"--gamma: expected a number above 0, got {gamma}")
    choose = {"whole-word": selection.choose_words, "span": selection.choose_spans}
    corrupt: Corrupt = noising.BertNoise(specials, vocab_size)
    if scheme in ("blank", "unigram") and gamma > 1:
        raise InputError(f"--gamma: expected a probability for {scheme}, got {gamma}")
    if scheme == "blank":
        corrupt = noising.Blank(gamma, specials)
    elif scheme in ("unigram", "bigram-kn"):
        assert counts is not None
        draw = noising.unigram if scheme == "unigram" else noising.bigram_kneser_ney
        corrupt = draw(gamma, counts(), specials)
    return Masking(choose.get(scheme, selection.choose_tokens), corrupt, probability)
