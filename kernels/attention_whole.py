"""Attention, backward, of a whole sequence in one program: five matrix products in place of seven.

`attention_bwd` has the formulas, and computes the scores and their gradients twice, once for dQ and
once for dK and dV. Here each tile of them is computed once. Where a sequence is a single tile, one
kernel computes all gradients without a loop, and reads each tensor once.

For longer sequences, the other kernel's program goes over the tiles of keys, whose dK and dV it
keeps in registers, and for each over all tiles of queries, whose parts of dQ it adds to float32
numbers in memory. FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) adds them so too,
from a program for each tile of keys, in an order that differs from run to run. No other program
adds to the numbers here, and an element is always added to by the same thread, so that repeated
runs give the same bits. The additions are atomic none the less, because a `red` needs neither the
old number in a register nor time to wait for it. Barriers stand where other threads read what has
been added or written.
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
from fastbert.kernels.runtime import TRITON_VERSION, kernel


def single_tile(
    capability: int, itemsize: int, block_d: int, max_seqlen: int, *, dropout: bool
) -> Tile | None:
    """A tile that holds the longest sequence; None where registers would not hold it."""
    if generation(capability) == 80 or itemsize == 4 or block_d > 64 or max_seqlen > 128:
        return None
    if dropout and max_seqlen > 64 and TRITON_VERSION >= (3, 9):
        return None  # Triton 3.9 spills registers here
    if max_seqlen <= 64:
        return Tile(64, 64, 4, 1)
    # H200, bf16, 188 sequences of 128, Triton 3.6: 172 us with 4 warps, despite 114 spills, and 203
    # with 8; with dropout 276 and 207. Triton 3.9 with 4 warps spills 482 times, and was not timed.
    is_measured = capability == 90 and block_d == 64 and TRITON_VERSION < (3, 9)
    return Tile(128, 128, 4 if is_measured and not dropout else 8, 1)


@kernel(do_not_specialize=["n_rows", "n_key_rows", "softmax_scale", "keep_scale"])
def attention_single_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    out_ptr, dout_ptr, lse_ptr,  # (T_q, N, D), (T_q, N, D), (N, T_q)
    cu_q_ptr, cu_k_ptr, words_ptr,  # (B + 1,), (B + 1,), (N, T_q, W) or None
    dq_ptr, dk_ptr, dv_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    sums_ptr,  # (2, B, N, D) or None: of dQ and of dV, a row for each sequence
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    words_row_stride, out_row_stride, grad_row_stride,
    n_rows, n_key_rows,  # T_q, T_k
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head of one sequence, which is a single tile."""
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dq_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence: the rows behind the last one
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


def whole_tile(capability: int, block_d: int, *, dropout: bool) -> Tile | None:
    """The tile of the kernel with loops; None where two kernels are to run.

    They are everywhere, until a GPU has measured this one beside them, which `python -m benchmarks
    tune --table attention.whole_tile` does. It has a program for each head of each sequence alone,
    which is few for a small batch.
    """
    return None


@kernel(do_not_specialize=["n_rows", "n_key_rows", "softmax_scale", "keep_scale"])
def attention_whole_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    out_ptr, dout_ptr, lse_ptr,  # (T_q, N, D), (T_q, N, D), (N, T_q)
    cu_q_ptr, cu_k_ptr, words_ptr,  # (B + 1,), (B + 1,), (N, T_q, W) or None
    dq_ptr, dk_ptr, dv_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    delta_ptr, dq_sums_ptr,  # (N, R), (N, R, BLOCK_D), for R = T_q + B * BLOCK_M; see below
    sums_ptr,  # (2, B, N, D) or None: of dQ and of dV, a row for each sequence
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    words_row_stride, out_row_stride, grad_row_stride,
    n_rows, n_key_rows,  # T_q, T_k
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head of one sequence, of any length."""
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dq_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence: the rows behind the last one
        zero_rows(dq_ptr, grad_row_stride, q_first, n_rows, HEAD_DIM, BLOCK_D, BLOCK_M)
        zero_rows(dk_ptr, grad_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK_N)
        zero_rows(dv_ptr, grad_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK_N)
        return
    n_queries = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    n_keys = (tl.load(cu_k_ptr + sequence + 1) - k_first).to(tl.int32)

    rows = tl.arange(0, BLOCK_M)
    q_ptr += q_first * q_row_stride + head * q_head_stride
    k_ptr += k_first * k_row_stride + head * k_head_stride
    v_ptr += k_first * v_row_stride + head * v_head_stride
    dk_ptr += k_first * grad_row_stride
    dv_ptr += k_first * grad_row_stride
    out_offset = q_first * out_row_stride + head * HEAD_DIM
    q_ptrs = tile_ptrs(q_ptr, q_row_stride, rows, BLOCK_D)
    out_ptrs = tile_ptrs(out_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    dq_ptrs = tile_ptrs(dq_ptr + q_first * grad_row_stride, grad_row_stride, rows, BLOCK_D)
    statistics = head * n_rows + q_first + rows
    lse_ptrs = lse_ptr + statistics
    # delta and the sums of dQ have rows of their own for the queries beyond a sequence's end, so
    # that they need no mask
    n_sums = n_rows + (tl.num_programs(2).to(tl.int64) - 1) * BLOCK_M
    first_sum = head * n_sums + q_first + sequence * BLOCK_M
    delta_ptrs = delta_ptr + first_sum + rows
    dq_sums_ptrs = tile_ptrs(dq_sums_ptr + first_sum * BLOCK_D, BLOCK_D, rows, BLOCK_D)
    if words_ptr is not None:
        words_ptr += statistics * words_row_stride

    if sums_ptr is not None:
        dims = tl.arange(0, BLOCK_D)
        dims_in = dims < HEAD_DIM
        row = (tl.num_programs(2).to(tl.int64) - 1 + sequence) * tl.num_programs(1) + head
        dv_sum_ptrs = sums_ptr + row * HEAD_DIM + dims
        tl.store(dv_sum_ptrs, tl.zeros((BLOCK_D,), tl.float32), mask=dims_in)
    nothing = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, n_queries, BLOCK_M):
        rows_in = start + rows < n_queries
        out = load_tile(out_ptrs + start * out_row_stride, rows_in, HEAD_DIM, True)
        dout = load_tile(dout_ptrs + start * out_row_stride, rows_in, HEAD_DIM, True)
        tl.store(delta_ptrs + start, row_delta(out, dout, keep_scale))
        tl.store(dq_sums_ptrs + start * BLOCK_D, nothing)
    tl.debug_barrier()

    scale = softmax_scale * LOG2_E
    for first_col in tl.range(0, n_keys, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)
        cols_in = cols < n_keys
        k = load_tile(tile_ptrs(k_ptr, k_row_stride, cols, BLOCK_D), cols_in, HEAD_DIM, True)
        v = load_tile(tile_ptrs(v_ptr, v_row_stride, cols, BLOCK_D), cols_in, HEAD_DIM, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in tl.range(0, n_queries, BLOCK_M):
            rows_in = start + rows < n_queries
            q = load_tile(q_ptrs + start * q_row_stride, rows_in, HEAD_DIM, True)
            dout = load_tile(dout_ptrs + start * out_row_stride, rows_in, HEAD_DIM, True)
            lse = tl.load(lse_ptrs + start, mask=rows_in, other=float("inf"))
            delta = tl.load(delta_ptrs + start)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            # A key beyond the end is all zeros, so that it adds nothing to dQ, unless exp2(0 - lse)
            # is infinite. Real exponents are at most 0, but for rounding, and not bounded by 1.
            exponent = s * scale - lse[:, None]
            p = tl.exp2(tl.minimum(exponent, 1.0, propagate_nan=tl.PropagateNan.ALL))
            kept = p
            if words_ptr is not None:
                word_ptrs = words_ptr + start * words_row_stride
                kept = drop(p, load_words(word_ptrs, rows_in, first_col, BLOCK_N))
            dv = tl.dot(tl.trans(kept.to(dout.dtype)), dout, dv, input_precision=PRECISION)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = score_gradient(p, kept, dp, delta, words_ptr is not None).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            dq = tl.dot(ds, k, input_precision=PRECISION)
            tl.atomic_add(dq_sums_ptrs + start * BLOCK_D, dq, sem="relaxed")
        dk *= softmax_scale * keep_scale
        dv = (dv * keep_scale).to(dv_ptr.dtype.element_ty)
        if sums_ptr is not None:
            dv_sum = tl.sum(tl.where(cols_in[:, None], dv.to(tl.float32), 0.0), axis=0)
            tl.atomic_add(dv_sum_ptrs, dv_sum, mask=dims_in, sem="relaxed")
        dk_ptrs = tile_ptrs(dk_ptr, grad_row_stride, cols, BLOCK_D)
        dv_ptrs = tile_ptrs(dv_ptr, grad_row_stride, cols, BLOCK_D)
        store_tile(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), cols_in, HEAD_DIM)
        store_tile(dv_ptrs, dv, cols_in, HEAD_DIM)
    tl.debug_barrier()

    dq_sum = nothing
    for start in tl.range(0, n_queries, BLOCK_M):
        rows_in = start + rows < n_queries
        dq = tl.load(dq_sums_ptrs + start * BLOCK_D, cache_modifier=".cg")  # where it was added up
        dq = (dq * (softmax_scale * keep_scale)).to(dq_ptr.dtype.element_ty)
        store_tile(dq_ptrs + start * grad_row_stride, dq, rows_in, HEAD_DIM)
        dq_sum += dq.to(tl.float32)
    if sums_ptr is not None:
        store_sums(sums_ptr, 0, dq_sum, HEAD_DIM, False)
