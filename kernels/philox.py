"""The random bits of dropout on a GPU: the same as in `fastbert.rng`, which explains them.

Philox4x32-7 with the seed as the key and the counter (sequence, position << 16 | place,
site << 16 | head, step).
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
GROUP = tl.constexpr(8)  # columns per Philox call: each gets 16 bits, of which 12 are compared


@triton.jit
def keep_mask(
    state_ptr, token_key, threshold, site,  # (2,) int64, [R] int64, int32, int32
    first_col,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK_N] bool: which elements of R rows are kept, from column `first_col` on.

    `first_col` and BLOCK_N are multiples of 8.
    """
    groups = first_col // GROUP + tl.arange(0, BLOCK_N // GROUP)
    zero = tl.zeros((token_key.shape[0], BLOCK_N // GROUP), dtype=tl.uint32)
    seed = tl.load(state_ptr)
    step = tl.load(state_ptr + 1).to(tl.uint32)
    sequence = zero + (token_key >> 32).to(tl.uint32)[:, None]
    place = zero + ((token_key.to(tl.uint32) << 16)[:, None] | groups.to(tl.uint32)[None, :])
    head = zero + (site << 16).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, sequence, place, head, zero + step, ROUNDS)
    t = threshold.to(tl.uint32)
    low = tl.join(tl.join(_low(r0) >= t, _low(r2) >= t), tl.join(_low(r1) >= t, _low(r3) >= t))
    high = tl.join(tl.join(_high(r0) >= t, _high(r2) >= t), tl.join(_high(r1) >= t, _high(r3) >= t))
    return tl.reshape(tl.join(low, high), (token_key.shape[0], BLOCK_N))


@triton.jit
def _low(word):
    """The upper 12 of a word's lower 16 bits."""
    return (word & 0xFFFF) >> 4


@triton.jit
def _high(word):
    return word >> 20


def keep_scale(threshold: int) -> float:
    """The factor that scales kept elements, for a threshold from `fastbert.rng.threshold`."""
    return 4096 / (4096 - threshold)
