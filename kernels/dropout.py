"""Dropout of the residual stream as an operator of its own, and the drop mask of attention.

Other kernels fuse dropout. Attention's mask has one bit per score, the same as in
`fastbert.rng.attention_drop_words`. It is drawn once and read by the forward and by both kernels of
the backward: drawing the bits inside them would take several times as long as the matrix products.
32 bits are drawn together: twelve random words hold the inverted binary digits, lowest first, of 32
numbers, and one bitwise majority per digit compares all 32 numbers with the threshold.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.philox import ROUNDS, keep_mask, keep_scale
from fastbert.kernels.runtime import begin, capability, cdiv, kernel, launcher, like

BLOCK = 4, 256, 4  # rows and columns of a tile of the residual stream, and warps


@kernel(do_not_specialize=["n_rows", "threshold", "site", "scale"])
def _dropout_kernel(
    x_ptr, y_ptr, state_ptr, token_key_ptr,  # (M, N), (M, N), (2,) int64, (M,) int64
    x_row_stride,
    n_rows, threshold, site, scale,
    N_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    program = tl.program_id(0)
    rows = (program // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_col = program % strips * COLS
    cols = first_col + tl.arange(0, COLS)
    is_row = rows < n_rows
    mask = is_row[:, None] & (cols < N_COLS)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    token_key = tl.load(token_key_ptr + rows, mask=is_row, other=0)
    keep = keep_mask(state_ptr, token_key, threshold, site, first_col, COLS)
    y = tl.where(keep, x.to(tl.float32) * scale, 0.0)
    tl.store(y_ptr + rows[:, None] * N_COLS + cols[None, :], y, mask=mask)


@launcher(lambda x, *_: like(x))
def dropout(
    y: Tensor, x: Tensor, state: Tensor, token_key: Tensor, site: int, threshold: int
) -> None:
    """x (M, N) with unit column stride -> y (M, N): elements dropped or scaled; of dy, gives dx."""
    n_rows, n_cols = x.shape
    rows, cols, num_warps = BLOCK
    if y.numel():
        _dropout_kernel(
            (cdiv(n_rows, rows) * cdiv(n_cols, cols),),
            x, y, state, token_key, x.stride(0),
            n_rows, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip


def words_block(capability: int) -> tuple[int, int, int]:
    """Rows of a tile, words of each row, and warps."""
    # H200, forward of 126 sequences of Wikipedia's lengths: 271 us; 276 us with (64, 8, 4), which
    # for 188 sequences of 128 took 111 us, against 131 us with (32, 16, 4)
    return (64, 4, 2) if capability == 90 else (32, 16, 4)


@kernel(do_not_specialize=["n_rows", "site", "threshold"])
def attention_drop_words_kernel(
    token_key_ptr, state_ptr, cu_q_ptr, cu_k_ptr,  # (T_q,) int64, (2,) int64, (B + 1,), (B + 1,)
    words_ptr,  # (N, T_q, W)
    words_row_stride,
    n_rows,  # T_q
    site, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    begin()
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    n_queries = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    if tl.program_id(0) * BLOCK_ROWS >= n_queries:
        return
    n_keys = tl.load(cu_k_ptr + sequence + 1) - tl.load(cu_k_ptr + sequence)

    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_in = rows < n_queries
    key = tl.load(token_key_ptr + q_first + rows, mask=rows_in, other=0)
    seed = tl.load(state_ptr)
    step = tl.load(state_ptr + 1).to(tl.uint32)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), dtype=tl.uint32)
    number = zero + (key >> 32).to(tl.uint32)[:, None]
    position = (key.to(tl.uint32) << 16)[:, None]
    site_and_head = zero + (site << 16 | head).to(tl.uint32)
    row_stride = words_row_stride // 4 * 4  # tells the compiler that 16-byte stores are aligned
    row_ptrs = words_ptr + (head.to(tl.int64) * n_rows + q_first + rows) * row_stride

    for first in range(0, tl.cdiv(n_keys, 32), BLOCK_WORDS):
        words = first + tl.arange(0, BLOCK_WORDS)
        below = zero
        for call in tl.static_range(3):
            place = position | (words << 2 | call).to(tl.uint32)[None, :]
            digits = tl.philox(seed, number, place, site_and_head, zero + step, n_rounds=ROUNDS)
            for digit in tl.static_range(4):
                below = _compare(below, digits[digit], threshold, 4 * call + digit)
        mask = rows_in[:, None] & (words < row_stride)[None, :]
        ptrs = row_ptrs[:, None] + words[None, :]
        tl.store(ptrs, below.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _compare(below, digit, threshold, place: tl.constexpr):
    """One digit of 32 comparisons: the majority of `below`, the digit and the threshold's digit.

    A set bit of `digit` is a binary digit 0. A number below the threshold in its lower digits stays
    below it unless its next digit is 1 and the threshold's is 0.
    """
    is_set = (0 - (threshold >> place & 1)).to(tl.uint32, bitcast=True)
    return (digit & below) | (is_set & (digit | below))


def _words_outputs(token_key, state, cu_q, cu_k, max_seqlen_q, max_seqlen_k, num_heads, *_):
    row_words = cdiv(max_seqlen_k, 128) * 4  # a multiple of 4, for 16-byte stores
    return cu_q.new_empty((num_heads, token_key.shape[0], row_words))


@launcher(_words_outputs)
def attention_drop_words(
    words: Tensor,
    token_key: Tensor, state: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, num_heads: int, site: int, threshold: int,
) -> None:  # fmt: skip
    """token_key (T_q,), state (2,) int64 -> (N, T_q, W) int32: each bit that is set drops a score.

    Bit j of word w belongs to key 32 * w + j of the query's sequence. Words beyond a sequence's
    last key, and words of rows that belong to no sequence, are not written.
    """
    num_sequences = cu_seqlens_q.shape[0] - 1
    if words.numel() and num_sequences and max_seqlen_q:
        block_rows, block_words, num_warps = words_block(capability(token_key))
        grid = (cdiv(max_seqlen_q, block_rows), num_heads, num_sequences)
        attention_drop_words_kernel(
            grid,
            token_key, state, cu_seqlens_q, cu_seqlens_k, words,
            words.stride(1), token_key.shape[0], site, threshold,
            BLOCK_ROWS=block_rows, BLOCK_WORDS=block_words, num_warps=num_warps,
        )  # fmt: skip
