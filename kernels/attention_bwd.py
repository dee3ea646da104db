"""Attention, backward: gradients without atomics, so that repeated runs give the same bits.

P = exp2(S - lse) is computed again from the scores S. With M the dropout mask (1 keeps) and c its
scale: dV = c (M P)^T dO; dS = c (M P) (dO V^T) - P delta, where delta is the row sum of O dO;
dQ = scale dS K; dK = scale dS^T Q. The kernels apply the factor c at the end, and use delta / c
instead of delta. One kernel computes dQ and delta, a second one dK and dV.

In float32 the scores may differ from the forward's in the last bit, because the tiles differ. Then
rows of P sum to 1, and rows of dS to 0, less exactly than in PyTorch. So the dQ kernel also
computes these sums, t = rowsum(P) and e = rowsum(dS), and both kernels use P / t and delta + e / t:
dQ = scale (dS K - e / t P K) / t. In 16 bits this is not done: P and dS are rounded anyway.

For the gradient of a bias that is part of Q, K and V, each program stores the column sums of its
rows of dQ or dV. The column sums of dK add up to 0, because each row of dS does.
"""

import triton
import triton.language as tl

from fastbert.kernels.attention_common import (
    LOG2_E,
    Tile,
    add_mask,
    drop,
    generation,
    load_tile,
    load_words,
    store_sums,
    store_tile,
    tile_ptrs,
    zero_rows,
)
from fastbert.kernels.runtime import begin, kernel


def dq_tile(capability: int, itemsize: int, block_d: int, *, dropout: bool, mask: bool) -> Tile:
    """The tile of the dQ kernel; dropout and a mask take registers, so their tiles are smaller."""
    gpu = generation(capability)
    if itemsize == 4:
        return Tile(64 if gpu == 100 else 32, 32, 8, 1)
    if block_d == 128:
        return Tile(128, 32 if gpu == 80 else 64, 8, 2)
    if gpu == 90 and block_d == 64 and not mask:
        # H200, bf16, 47 sequences of 512, whole backward: 484 us, against 530 with (64, 64, 4, 2);
        # with dropout 653 us, against 735. Up to 128 registers, four programs are resident. With
        # the bias's sums, Triton 3.6 would take 133: 213 us per layer of a step, against 179
        # without the sums
        return Tile(64, 32, 4, 3, maxnreg=128) if dropout else Tile(64, 64, 4, 3)
    if gpu == 80 and (dropout or mask):
        return Tile(64, 32, 4, 2)
    # on sm_100, a second pipeline stage makes ptxas spill if the head size is this small
    return Tile(64, 64, 4, 1 if gpu == 100 and block_d <= 32 else 2)


def dkdv_tile(capability: int, itemsize: int, block_d: int, *, mask: bool) -> Tile:
    """The tile of the dK/dV kernel, with one pipeline stage, because occupancy gains more.

    On sm_90, the only one where tiles were measured, three stages are faster.
    """
    if itemsize == 4:
        return Tile(32, 32, 8, 1)
    if block_d == 128:
        return Tile(64 if generation(capability) == 80 else 128, 64, 8, 1)
    if capability == 90 and block_d == 64 and not mask:
        # H200, bf16, 47 sequences of 512, whole backward: 503 us, against 528 with (64, 64, 4, 1);
        # with dropout 592 us, against 736
        return Tile(64, 64, 4, 3)
    return Tile(64, 64, 4, 1)


@kernel(do_not_specialize=["n_rows", "softmax_scale", "keep_scale"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    out_ptr, dout_ptr, lse_ptr,  # (T_q, N, D), (T_q, N, D), (N, T_q)
    cu_q_ptr, cu_k_ptr,  # (B + 1,) each
    mask_ptr, words_ptr,  # (B, N, S_q, S_k) or None, (N, T_q, W) or None
    dq_ptr, delta_ptr, total_ptr,  # (T_q, N, D), (N, T_q), (N, T_q) or None
    sums_ptr,  # (2, B * P, N, D) or None: column sums of dQ and dV, a row for each of P tiles
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_col_stride,
    words_row_stride, out_row_stride, dq_row_stride,
    n_rows,  # T_q
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, BY_DOT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head of one sequence, and its rows' delta."""
    begin()
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dq_ptr += head * HEAD_DIM
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence, but the rows after the last one
        zero_rows(dq_ptr, dq_row_stride, q_first, n_rows, HEAD_DIM, BLOCK_D, BLOCK_M)
        return
    n_queries = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= n_queries:
        if sums_ptr is not None:
            store_sums(sums_ptr, 0, tl.zeros((1, BLOCK_D), tl.float32), HEAD_DIM, False)
        return
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    n_keys = (tl.load(cu_k_ptr + sequence + 1) - k_first).to(tl.int32)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in = rows < n_queries
    cols = tl.arange(0, BLOCK_N)
    q_ptr += q_first * q_row_stride + head * q_head_stride
    k_ptr += k_first * k_row_stride + head * k_head_stride
    v_ptr += k_first * v_row_stride + head * v_head_stride
    out_offset = q_first * out_row_stride + head * HEAD_DIM
    k_ptrs = tile_ptrs(k_ptr, k_row_stride, cols, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, v_row_stride, cols, BLOCK_D)
    if mask_ptr is not None:
        mask_ptr += sequence * mask_batch_stride + head * mask_head_stride
        mask_ptr += rows.to(tl.int64)[:, None] * mask_row_stride
    if words_ptr is not None:
        words_ptr += (head * n_rows + q_first + rows) * words_row_stride

    q = load_tile(tile_ptrs(q_ptr, q_row_stride, rows, BLOCK_D), rows_in, HEAD_DIM, True)
    out_ptrs = tile_ptrs(out_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr + out_offset, out_row_stride, rows, BLOCK_D)
    dout = load_tile(dout_ptrs, rows_in, HEAD_DIM, True)
    delta = row_delta(load_tile(out_ptrs, rows_in, HEAD_DIM, True), dout, keep_scale)
    statistics = head * n_rows + q_first + rows
    if total_ptr is None:
        tl.store(delta_ptr + statistics, delta, mask=rows_in)
    lse = tl.load(lse_ptr + statistics, mask=rows_in, other=float("inf"))

    scale = softmax_scale * LOG2_E
    mask_scale = 1.0 / softmax_scale
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    n_full = n_keys // BLOCK_N * BLOCK_N
    inputs = (
        q, dout, lse, delta, k_ptrs, v_ptrs, mask_ptr, words_ptr, rows_in, k_row_stride,
        v_row_stride, mask_col_stride, n_keys, scale, mask_scale,
    )  # fmt: skip
    for start in tl.range(0, n_full, BLOCK_N):
        dq, pk, total, excess = _dq_step(
            dq, pk, total, excess, start, *inputs,
            HEAD_DIM, BLOCK_N, PRECISION, total_ptr is not None, False,
        )  # fmt: skip
    if n_full < n_keys:
        dq, pk, total, excess = _dq_step(
            dq, pk, total, excess, n_full, *inputs,
            HEAD_DIM, BLOCK_N, PRECISION, total_ptr is not None, True,
        )  # fmt: skip
    if total_ptr is not None:
        total = tl.where(total > 0.0, total, 1.0)  # a query without a key has a total of 0
        excess /= total
        dq = (dq - excess[:, None] * pk) / total[:, None]
        tl.store(delta_ptr + statistics, delta + excess, mask=rows_in)
        tl.store(total_ptr + statistics, total, mask=rows_in)
    dq = (dq * (softmax_scale * keep_scale)).to(dq_ptr.dtype.element_ty)
    if sums_ptr is not None:  # rows beyond the end are zero, as their probabilities are
        store_sums(sums_ptr, 0, dq, HEAD_DIM, BY_DOT)
    dq_ptrs = tile_ptrs(dq_ptr + q_first * dq_row_stride, dq_row_stride, rows, BLOCK_D)
    store_tile(dq_ptrs, dq, rows_in, HEAD_DIM)


@triton.jit
def _dq_step(
    dq, pk, total, excess,  # [BLOCK_M, BLOCK_D] each, then [BLOCK_M] each
    start, q, dout, lse, delta, k_ptrs, v_ptrs, mask_ptrs, word_ptrs, rows_in, k_row_stride,
    v_row_stride, mask_col_stride, n_keys, scale, mask_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    WITH_SUMS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BLOCK_N)
    cols_in = cols < n_keys
    k = load_tile(k_ptrs + start * k_row_stride, cols_in, HEAD_DIM, IS_LAST)
    v = load_tile(v_ptrs + start * v_row_stride, cols_in, HEAD_DIM, IS_LAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = add_mask(s, mask_ptrs, mask_col_stride, cols, rows_in, cols_in, mask_scale, IS_LAST)
    if IS_LAST:  # keys beyond the end have s = 0: exp2(-lse) may be inf, and inf * 0 is NaN
        s = tl.where(cols_in[None, :], s, float("-inf"))
    p = tl.exp2(s * scale - lse[:, None])
    if WITH_SUMS:
        total += tl.sum(p, axis=1)
        # tf32 is precise enough, because pk is multiplied by `excess`, which is a rounding error
        pk = tl.dot(p, k, pk, input_precision="tf32")
    kept = p
    if word_ptrs is not None:
        kept = drop(p, load_words(word_ptrs, rows_in, start, BLOCK_N))
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = score_gradient(p, kept, dp, delta, word_ptrs is not None)
    if WITH_SUMS:
        excess += tl.sum(ds, axis=1)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, pk, total, excess


@kernel(do_not_specialize=["n_rows", "n_key_rows", "softmax_scale", "keep_scale"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    dout_ptr, lse_ptr, delta_ptr, total_ptr,  # (T_q, N, D), (N, T_q), (N, T_q), (N, T_q) or None
    cu_q_ptr, cu_k_ptr,  # (B + 1,) each
    mask_ptr, words_ptr,  # (B, N, S_q, S_k) or None, (N, T_q, W) or None
    dk_ptr, dv_ptr, sums_ptr,  # (T_k, N, D) each; as in the dQ kernel
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_col_stride,
    words_row_stride, out_row_stride, dk_row_stride,
    n_rows, n_key_rows,  # T_q, T_k
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, BY_DOT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head of one sequence."""
    begin()
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence, but the rows after the last one
        zero_rows(dk_ptr, dk_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK_N)
        zero_rows(dv_ptr, dk_row_stride, k_first, n_key_rows, HEAD_DIM, BLOCK_D, BLOCK_N)
        return
    n_keys = (tl.load(cu_k_ptr + sequence + 1) - k_first).to(tl.int32)
    first_col = tl.program_id(0) * BLOCK_N
    if first_col >= n_keys:
        if sums_ptr is not None:
            store_sums(sums_ptr, 1, tl.zeros((1, BLOCK_D), tl.float32), HEAD_DIM, False)
        return
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    n_queries = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)

    rows = tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    cols_in = cols < n_keys
    q_ptr += q_first * q_row_stride + head * q_head_stride
    k_ptr += k_first * k_row_stride + head * k_head_stride
    v_ptr += k_first * v_row_stride + head * v_head_stride
    dout_ptr += q_first * out_row_stride + head * HEAD_DIM
    q_ptrs = tile_ptrs(q_ptr, q_row_stride, rows, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr, out_row_stride, rows, BLOCK_D)
    statistics = head * n_rows + q_first + rows
    lse_ptrs, delta_ptrs = lse_ptr + statistics, delta_ptr + statistics
    if total_ptr is not None:
        total_ptr += statistics
    if mask_ptr is not None:
        mask_ptr += sequence * mask_batch_stride + head * mask_head_stride
    if words_ptr is not None:
        words_ptr += statistics * words_row_stride

    k = load_tile(tile_ptrs(k_ptr, k_row_stride, cols, BLOCK_D), cols_in, HEAD_DIM, True)
    v = load_tile(tile_ptrs(v_ptr, v_row_stride, cols, BLOCK_D), cols_in, HEAD_DIM, True)
    scale = softmax_scale * LOG2_E
    mask_scale = 1.0 / softmax_scale
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    n_full = n_queries // BLOCK_M * BLOCK_M
    inputs = (
        k, v, q_ptrs, dout_ptrs, lse_ptrs, delta_ptrs, total_ptr, mask_ptr, words_ptr,
        q_row_stride, out_row_stride, mask_row_stride, mask_col_stride, words_row_stride,
        n_queries, first_col, cols_in, scale, mask_scale,
    )  # fmt: skip
    for start in tl.range(0, n_full, BLOCK_M):
        dk, dv = _dkdv_step(dk, dv, start, *inputs, HEAD_DIM, BLOCK_M, BLOCK_N, PRECISION, False)
    if n_full < n_queries:
        dk, dv = _dkdv_step(dk, dv, n_full, *inputs, HEAD_DIM, BLOCK_M, BLOCK_N, PRECISION, True)
    dk *= softmax_scale * keep_scale
    dv = (dv * keep_scale).to(dv_ptr.dtype.element_ty)
    if sums_ptr is not None:  # rows beyond the end are not zero, see `_dkdv_step`
        store_sums(sums_ptr, 1, tl.where(cols_in[:, None], dv, 0.0), HEAD_DIM, BY_DOT)
    offset = k_first * dk_row_stride
    dk_ptrs = tile_ptrs(dk_ptr + offset, dk_row_stride, cols, BLOCK_D)
    dv_ptrs = tile_ptrs(dv_ptr + offset, dk_row_stride, cols, BLOCK_D)
    store_tile(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), cols_in, HEAD_DIM)
    store_tile(dv_ptrs, dv, cols_in, HEAD_DIM)


@triton.jit
def _dkdv_step(
    dk, dv, start, k, v, q_ptrs, dout_ptrs, lse_ptrs, delta_ptrs, total_ptrs, mask_ptr, word_ptrs,
    q_row_stride, out_row_stride, mask_row_stride, mask_col_stride, words_row_stride,
    n_queries, first_col, cols_in, scale, mask_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of queries contributes to dk and dv; rows of the scores are queries.

    Keys beyond the end are not masked: they only reach rows of dk and dv that are neither stored
    nor summed. A query beyond the end has lse = inf, so its probabilities are zero.
    """
    rows = start + tl.arange(0, BLOCK_M)
    rows_in = rows < n_queries
    q = load_tile(q_ptrs + start * q_row_stride, rows_in, HEAD_DIM, IS_LAST)
    dout = load_tile(dout_ptrs + start * out_row_stride, rows_in, HEAD_DIM, IS_LAST)
    if IS_LAST:
        lse = tl.load(lse_ptrs + start, mask=rows_in, other=float("inf"))
        delta = tl.load(delta_ptrs + start, mask=rows_in, other=0.0)
    else:
        lse = tl.load(lse_ptrs + start)
        delta = tl.load(delta_ptrs + start)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + rows.to(tl.int64)[:, None] * mask_row_stride
        cols = first_col + tl.arange(0, BLOCK_N)
        s = add_mask(s, mask_ptrs, mask_col_stride, cols, rows_in, cols_in, mask_scale, True)
    p = tl.exp2(s * scale - lse[:, None])
    if total_ptrs is not None:  # div_rn, as t / t must be 1 and Triton does not round `/` exactly
        total = tl.load(total_ptrs + start, mask=rows_in, other=1.0)
        p = tl.div_rn(p, total[:, None])
    kept = p
    if word_ptrs is not None:
        ptrs = word_ptrs + start * words_row_stride
        kept = drop(p, load_words(ptrs, rows_in, first_col, BLOCK_N))
    dv = tl.dot(tl.trans(kept.to(dout.dtype)), dout, dv, input_precision=PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = score_gradient(p, kept, dp, delta, word_ptrs is not None)
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def row_delta(out, dout, keep_scale):
    """The row sums of out * dout (M,), divided by keep_scale."""
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1) / keep_scale


@triton.jit
def score_gradient(p, kept, dp, delta, DROPOUT: tl.constexpr):
    """The gradient of the scores, without the scales of softmax and dropout."""
    return kept * dp - p * delta[:, None] if DROPOUT else p * (dp - delta[:, None])
