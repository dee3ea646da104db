"""Masked language modelling: which tokens to predict, decided anew each epoch, by counting alone.

Every random number is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3") of the token's own place (position, example, epoch), so that an example gets the same masks
in whatever batch, rank or worker process it turns up.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbert.data.tokenizer import SpecialTokens
from fastbert.packing import IGNORE_INDEX

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, which step the keys
_WORD = np.uint64(0xFFFFFFFF)
_STREAM = 0  # the counter's last word: free for other uses of the same places


def philox(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int
) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four 32-bit words, in uint64, for each counter.

    counter: four integers or arrays below 2**32, lowest word first, broadcast together
    key: 64 bits, the lower half first
    """
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * np.uint64(_MULTIPLIERS[0]), x2 * np.uint64(_MULTIPLIERS[1])
        x0, x1 = p1 >> np.uint64(32) ^ x1 ^ np.uint64(k0), p1 & _WORD
        x2, x3 = p0 >> np.uint64(32) ^ x3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def num_targets(maskable: NDArray[np.int64], mlm_probability: float) -> NDArray[np.int64]:
    """How many tokens an example predicts, given how many it could: the share, one at least."""
    wanted = np.maximum(np.rint(mlm_probability * maskable).astype(np.int64), 1)
    return np.minimum(wanted, maskable)


def mask_tokens(
    ids: NDArray[np.int64],
    example_of_token: NDArray[np.int64],
    position_of_token: NDArray[np.int64],
    maskable: NDArray[np.bool_],
    *,
    seed: int,
    epoch: int,
    vocab_size: int,
    specials: SpecialTokens,
    mlm_probability: float = 0.15,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(masked ids, labels) of a batch: (T,) int64 each, labels -100 where nothing is predicted.

    ids: (T,) tokens of whole examples laid end to end
    example_of_token: (T,) the example's index in its epoch, the same for its neighbours only
    position_of_token: (T,) position in the example
    maskable: (T,) True where a token may be predicted

    Of each example's n maskable tokens max(1, round(mlm_probability * n)) are predicted. Of these
    80 % become [MASK], 10 % a random token that is not special, and 10 % stay as they are (Devlin
    et al. 2018, https://arxiv.org/abs/1810.04805, section 3.1).
    """
    rank_key, choice, replacement, _ = philox(
        (position_of_token, example_of_token, epoch, _STREAM), seed
    )
    # Within its example, a token's rank among the random keys; those not maskable come last.
    rank_key = np.where(maskable, rank_key, np.uint64(2**32))
    begins = np.flatnonzero(np.diff(example_of_token, prepend=-1))
    sizes = np.diff(begins, append=len(ids))
    number = np.repeat(np.arange(len(begins)), sizes)
    order = np.lexsort((rank_key, number))
    rank = np.arange(len(ids)) - np.repeat(begins, sizes)
    count = num_targets(np.add.reduceat(maskable, begins, dtype=np.int64), mlm_probability)
    chosen = order[rank < np.repeat(count, sizes)]

    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    labels[chosen] = ids[chosen]
    masked = ids.copy()
    tenth = choice[chosen] * np.uint64(10) >> np.uint64(32)  # 0 to 9, all equally likely
    masked[chosen[tenth < 8]] = specials.mask
    random = chosen[tenth == 8]
    masked[random] = _ordinary_tokens(replacement[random], vocab_size, specials)
    return masked, labels


def _ordinary_tokens(
    words: NDArray[np.uint64], vocab_size: int, specials: SpecialTokens
) -> NDArray[np.int64]:
    """A token that is not special for each random 32-bit word, all equally likely."""
    ordinary = np.uint64(vocab_size - len(specials))
    tokens = (words * ordinary >> np.uint64(32)).astype(np.int64)
    for special in sorted(specials):
        tokens += tokens >= special
    return tokens
