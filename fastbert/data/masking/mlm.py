"""Masked language modelling: which tokens to predict and what becomes of them, anew each epoch.

Every random number is Philox of the token's own place (position, example, epoch), so that an
example gets the same masks in whatever batch, rank or worker process it turns up.
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

_STREAM = 0  # the counter's last word: free for other uses of the same places


@dataclasses.dataclass(frozen=True)
class Masking:
    """choose: the tokens to predict, about `probability` of all; corrupt: what becomes of them."""

    choose: Choose
    corrupt: Corrupt
    probability: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise InputError(
                f"mlm_probability: expected a number between 0 and 1, got {self.probability}"
            )

    def __call__(
        self, tokens: Tokens, *, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(masked ids, labels) of a batch: (T,) int64 each, labels -100 where nothing is predicted.

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
        """How many tokens of the batch are predicted."""
        if self.choose is selection.choose_tokens:  # whichever they are
            return int(selection.examples_of(tokens, self.probability).wanted.sum())
        return len(self._choose(tokens, seed, epoch)[0].targets)

    def _choose(self, tokens: Tokens, seed: int, epoch: int) -> tuple[Chosen, Draws]:
        draws = Draws(*philox((tokens.position, tokens.example, epoch, _STREAM), seed))
        return self.choose(tokens, draws, self.probability), draws


SCHEMES = ("bert", "whole-word", "span", "blank", "unigram", "bigram-kn")


def make_masking(
    scheme: str,
    specials: SpecialTokens,
    vocab_size: int,
    *,
    probability: float = 0.15,
    gamma: float = 0.8,
    counts: Callable[[], NgramCounts] | None = None,
) -> Masking:
    """One of the SCHEMES.

    "bert": single tokens, 80/10/10; "whole-word", "span": the same of words and of spans of words;
    "blank", "unigram", "bigram-kn": single tokens, changed as in Xie et al. 2017, see `noising`.
    gamma: theirs; counts: gives what the last two draw from.
    """
    if scheme not in SCHEMES:
        raise InputError(f"masking: one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not gamma > 0:
        raise InputError(f"gamma: expected a number above 0, got {gamma}")
    choose = {"whole-word": selection.choose_words, "span": selection.choose_spans}
    corrupt: Corrupt = noising.BertNoise(specials, vocab_size)
    if scheme in ("blank", "unigram") and gamma > 1:
        raise InputError(f"gamma: expected a probability for {scheme}, got {gamma}")
    if scheme == "blank":
        corrupt = noising.Blank(gamma, specials)
    elif scheme in ("unigram", "bigram-kn"):
        assert counts is not None
        draw = noising.unigram if scheme == "unigram" else noising.bigram_kneser_ney
        corrupt = draw(gamma, counts(), specials)
    return Masking(choose.get(scheme, selection.choose_tokens), corrupt, probability)
