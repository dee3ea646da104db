"""Attention, forward: one program computes a tile of queries of one head of one sequence.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a running maximum and sum over tiles
of keys, so that no score is written to memory. The maximum is taken of raw scores, so that the
scale folds into the exponent's multiply-add. Only the last tile masks keys beyond the sequence.
"""

import triton
import triton.language as tl

from fastbert.kernels.attention_common import (
    LOG2_E,
    LOWEST,
    Tile,
    add_mask,
    drop,
    generation,
    load_tile,
    load_words,
    store_tile,
    tile_ptrs,
    zero_rows,
)
from fastbert.kernels.runtime import begin, kernel


def fwd_tile(capability: int, itemsize: int, block_d: int, *, dropout: bool, mask: bool) -> Tile:
    """The largest tile without spills that leaves room for two programs per multiprocessor.

    Dropout and a mask take registers, and float32 spills at every useful size. On sm_90, the only
    one where tiles were measured, it is the fastest.
    """
    gpu = generation(capability)
    if itemsize == 4 and gpu == 90 and block_d <= 64:
        return Tile(64, 32, 4, 2)
    if itemsize == 4:
        return Tile(64, 32, 8, 1) if gpu == 100 or block_d <= 64 else Tile(32, 32, 4, 1)
    if block_d == 128:
        return Tile(128, 32 if gpu == 80 else 64, 8, 2)
    if gpu == 90 and block_d == 64 and not mask:
        # H200, bf16, 47 sequences of 512: 147 us, against 191 with (128, 64, 4, 2); with dropout
        # 226 us, against 253 with (64, 64, 4, 2)
        return Tile(64, 64, 4, 3)
    return Tile(64 if mask or (dropout and gpu != 100) else 128, 64, 4, 2)


@kernel(do_not_specialize=["n_rows", "softmax_scale", "keep_scale"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (T_q, N, D), (T_k, N, D), (T_k, N, D)
    cu_q_ptr, cu_k_ptr,  # (B + 1,) each
    mask_ptr, words_ptr,  # (B, N, S_q, S_k) or None, (N, T_q, W) or None
    out_ptr, lse_ptr,  # (T_q, N, D), (N, T_q) or None
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_col_stride,
    words_row_stride, out_row_stride,
    n_rows,  # T_q
    softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin()
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    out_ptr += head * HEAD_DIM
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    if sequence == tl.num_programs(2) - 1:  # not a sequence, but the rows after the last one
        zero_rows(out_ptr, out_row_stride, q_first, n_rows, HEAD_DIM, BLOCK_D, BLOCK_M)
        return
    n_queries = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= n_queries:
        return
    k_first = tl.load(cu_k_ptr + sequence).to(tl.int64)
    n_keys = (tl.load(cu_k_ptr + sequence + 1) - k_first).to(tl.int32)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in = rows < n_queries
    cols = tl.arange(0, BLOCK_N)
    q_ptr += q_first * q_row_stride + head * q_head_stride
    k_ptr += k_first * k_row_stride + head * k_head_stride
    v_ptr += k_first * v_row_stride + head * v_head_stride
    k_ptrs = tile_ptrs(k_ptr, k_row_stride, cols, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, v_row_stride, cols, BLOCK_D)
    if mask_ptr is not None:
        mask_ptr += sequence * mask_batch_stride + head * mask_head_stride
        mask_ptr += rows.to(tl.int64)[:, None] * mask_row_stride
    if words_ptr is not None:
        words_ptr += (head * n_rows + q_first + rows) * words_row_stride

    q = load_tile(tile_ptrs(q_ptr, q_row_stride, rows, BLOCK_D), rows_in, HEAD_DIM, True)
    scale = softmax_scale * LOG2_E
    mask_scale = 1.0 / softmax_scale
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    n_full = n_keys // BLOCK_N * BLOCK_N
    inputs = (
        q, k_ptrs, v_ptrs, mask_ptr, words_ptr, rows_in, k_row_stride, v_row_stride,
        mask_col_stride, n_keys, scale, mask_scale,
    )  # fmt: skip
    for start in tl.range(0, n_full, BLOCK_N):
        out, total, peak = _fwd_step(
            out, total, peak, start, *inputs, HEAD_DIM, BLOCK_N, PRECISION, False
        )
    if n_full < n_keys:
        out, total, peak = _fwd_step(
            out, total, peak, n_full, *inputs, HEAD_DIM, BLOCK_N, PRECISION, True
        )

    # a query without a key gives zeros, and lse = inf makes its probabilities zero in the backward;
    # a total of NaN is not 0, so its row's probabilities are NaN in the backward, as in PyTorch
    has_key = total != 0.0
    if lse_ptr is not None:
        lse = tl.where(has_key, peak * scale + tl.log2(total), float("inf"))
        tl.store(lse_ptr + head * n_rows + q_first + rows, lse, mask=rows_in)
    out *= tl.where(has_key, keep_scale / total, 0.0)[:, None]
    out_ptrs = tile_ptrs(out_ptr + q_first * out_row_stride, out_row_stride, rows, BLOCK_D)
    store_tile(out_ptrs, out.to(out_ptr.dtype.element_ty), rows_in, HEAD_DIM)


@triton.jit
def _fwd_step(
    out, total, peak,  # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]
    start, q, k_ptrs, v_ptrs, mask_ptrs, word_ptrs, rows_in, k_row_stride, v_row_stride,
    mask_col_stride, n_keys, scale, mask_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BLOCK_N)
    cols_in = cols < n_keys
    k = load_tile(k_ptrs + start * k_row_stride, cols_in, HEAD_DIM, IS_LAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = add_mask(s, mask_ptrs, mask_col_stride, cols, rows_in, cols_in, mask_scale, IS_LAST)
    if IS_LAST:
        s = tl.where(cols_in[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    p = tl.exp2(s * scale - (new_peak * scale)[:, None])
    shrink = tl.exp2((peak - new_peak) * scale)
    total = total * shrink + tl.sum(p, axis=1)
    if word_ptrs is not None:
        p = drop(p, load_words(word_ptrs, rows_in, start, BLOCK_N))
    v = load_tile(v_ptrs + start * v_row_stride, cols_in, HEAD_DIM, IS_LAST)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, total, new_peak
