"""Attention, backward, for sequences that fit in one tile: one kernel reads each tensor once.

`attention_bwd` has the formulas; it computes the scores and their gradients twice, once for dQ and
once for dK and dV. Here both are computed once, with five matrix products instead of seven.
"""

import triton.language as tl

from fastbert.kernels.attention_bwd import row_delta, score_gradient
from fastbert.kernels.attention_common import (
    LOG2_E,
    Tile,
    drop,
    generation,
    load_tile,
    load_words,
    store_sums,
    store_tile,
    tile_ptrs,
    zero_rows,
)
from fastbert.kernels.runtime import TRITON_VERSION, begin, kernel


def single_tile(
    capability: int, itemsize: int, block_d: int, max_seqlen: int, *, dropout: bool
) -> Tile | None:
    """A tile that holds the longest sequence; None if it does not fit in registers."""
    if generation(capability) == 80 or itemsize == 4 or block_d > 64 or max_seqlen > 128:
        return None
    if dropout and max_seqlen > 64 and TRITON_VERSION >= (3, 9):
        return None  # Triton 3.9 spills registers here
    if max_seqlen <= 64:
        return Tile(64, 64, 4, 1)
    # H200, bf16, 188 sequences of 128, Triton 3.6: 172 us with 4 warps, despite 114 spills, and 203
    # with 8; with dropout 276 and 207. Triton 3.9 spills 482 times with 4 warps and was not timed.
    is_measured = capability == 90 and block_d == 64 and TRITON_VERSION < (3, 9)
    return Tile(128, 128, 4 if is_measured and not dropout else 8, 1)


@kernel(do_not_specialize=["n_rows", "n_key_rows", "softmax_scale", "keep_scale"])
def attention_single_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    out_ptr, dout_ptr, lse_ptr,  # (T_q, N, D), (T_q, N, D), (N, T_q)
    cu_q_ptr, cu_k_ptr, words_ptr,  # (B + 1,), (B + 1,), (N, T_q, W) or None
    dq_ptr, dk_ptr, dv_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    sums_ptr,  # (2, B, N, D) or None: column sums of dQ and dV, a row for each sequence
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    words_row_stride, out_row_stride, grad_row_stride,
    n_rows, n_key_rows,  # T_q, T_k
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head of one sequence, which is a single tile."""
    begin()
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dq_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence, but the rows after the last one
        zero_rows(dq_ptr, grad_row_stride, q_first, n_rows, HEAD_DIM, BLOCK_D, BLOCK)
        zero_rows(dk_ptr, grad_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK)
        zero_rows(dv_ptr, grad_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK)
        return

    rows = tl.arange(0, BLOCK)
    rows_in = rows < (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    cols_in = rows < (tl.load(cu_k_ptr + sequence + 1) - k_first).to(tl.int32)
    q_ptr += q_first * q_row_stride + head * q_head_stride
    k_ptr += k_first * k_row_stride + head * k_head_stride
    v_ptr += k_first * v_row_stride + head * v_head_stride
    out_offset = q_first * out_row_stride + head * HEAD_DIM
    out_ptrs = tile_ptrs(out_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    q = load_tile(tile_ptrs(q_ptr, q_row_stride, rows, BLOCK_D), rows_in, HEAD_DIM, True)
    k = load_tile(tile_ptrs(k_ptr, k_row_stride, rows, BLOCK_D), cols_in, HEAD_DIM, True)
    dout = load_tile(dout_ptrs, rows_in, HEAD_DIM, True)
    v = load_tile(tile_ptrs(v_ptr, v_row_stride, rows, BLOCK_D), cols_in, HEAD_DIM, True)
    delta = row_delta(load_tile(out_ptrs, rows_in, HEAD_DIM, True), dout, keep_scale)
    statistics = head * n_rows + q_first + rows
    lse = tl.load(lse_ptr + statistics, mask=rows_in, other=float("inf"))

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(cols_in[None, :], s, float("-inf"))
    p = tl.exp2(s * (softmax_scale * LOG2_E) - lse[:, None])
    kept = p
    if words_ptr is not None:
        words = load_words(words_ptr + statistics * words_row_stride, rows_in, 0, BLOCK)
        kept = drop(p, words)
    dv = tl.dot(tl.trans(kept.to(dout.dtype)), dout, input_precision=PRECISION)
    dv = (dv * keep_scale).to(dv_ptr.dtype.element_ty)
    if sums_ptr is not None:  # rows beyond the end are zero, here and in dq
        store_sums(sums_ptr, 1, dv, HEAD_DIM, BY_DOT)
    dv_ptrs = tile_ptrs(dv_ptr + k_first * grad_row_stride, grad_row_stride, rows, BLOCK_D)
    store_tile(dv_ptrs, dv, cols_in, HEAD_DIM)

    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = score_gradient(p, kept, dp, delta, words_ptr is not None).to(q.dtype)
    scale = softmax_scale * keep_scale
    dq = (tl.dot(ds, k, input_precision=PRECISION) * scale).to(dq_ptr.dtype.element_ty)
    if sums_ptr is not None:
        store_sums(sums_ptr, 0, dq, HEAD_DIM, BY_DOT)
    dq_ptrs = tile_ptrs(dq_ptr + q_first * grad_row_stride, grad_row_stride, rows, BLOCK_D)
    store_tile(dq_ptrs, dq, rows_in, HEAD_DIM)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
    dk_ptrs = tile_ptrs(dk_ptr + k_first * grad_row_stride, grad_row_stride, rows, BLOCK_D)
    store_tile(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), cols_in, HEAD_DIM)
