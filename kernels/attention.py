"""Launchers of variable-length attention; the kernels are in the other files `attention_*.py`.

The host never waits for the device: upper bounds of the lengths size the grids, programs without
work return at once, and an extra slice of the grid zeros the rows after the last sequence.
"""

import torch
from torch import Tensor

from fastbert.kernels.attention_bwd import (
    attention_dkdv_kernel,
    attention_dq_kernel,
    dkdv_tile,
    dq_tile,
)
from fastbert.kernels.attention_common import block_d, precision, sums_by_dot
from fastbert.kernels.attention_fwd import attention_fwd_kernel, fwd_tile
from fastbert.kernels.attention_single import attention_single_kernel, single_tile
from fastbert.kernels.dropout import attention_drop_words as attention_drop_words
from fastbert.kernels.partial_sums import add_partials
from fastbert.kernels.runtime import capability, cdiv, launcher, like


def _fwd_outputs(q, *others):
    outputs = [like(q)]
    if others[-1]:  # keep
        outputs.append(q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32))
    return outputs


@launcher(_fwd_outputs)
def attention_fwd(
    outputs: list[Tensor],
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, mask: Tensor | None,
    drop_words: Tensor | None, keep_scale: float, keep: bool,
) -> None:  # fmt: skip
    """q (T_q, N, D), k and v (T_k, N, D) -> out (T_q, N, D); if `keep`, lse (N, T_q) too.

    lse: float32, the log-sum-exp to base 2, for the backward; cu_seqlens_q, cu_seqlens_k: (B + 1,)
    int32; mask: (B, N, max_seqlen_q, max_seqlen_k), boolean or floating, with strides of 0 in
    expanded dimensions; drop_words: (N, T_q, W) int32, from `attention_drop_words`; keep_scale: 1
    without drop_words. Raises ValueError if the offset of a row within its sequence could reach
    2**31 elements.
    """
    if q.numel():
        out, lse = (*outputs, None)[:2]
        num_rows, num_heads, head_dim = q.shape
        columns, inputs = block_d(head_dim), _strides(q, k, v, max_seqlen_q, max_seqlen_k)
        has_dropout, has_mask = drop_words is not None, mask is not None
        tile = fwd_tile(capability(q), q.itemsize, columns, dropout=has_dropout, mask=has_mask)
        grid = (max(cdiv(max_seqlen_q, tile.block_m), 1), num_heads, cu_seqlens_q.shape[0])
        mask, mask_strides = _mask_and_strides(mask)
        attention_fwd_kernel(
            grid,
            q, k, v, cu_seqlens_q, cu_seqlens_k, mask, drop_words, out, lse,
            *inputs, *mask_strides, _words_stride(drop_words), num_heads * head_dim,
            num_rows, softmax_scale, keep_scale,
            HEAD_DIM=head_dim, BLOCK_D=columns, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            PRECISION=precision(q.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _bwd_outputs(dout, q, k, v, *others):
    if k is not None:
        return [like(q), like(k), like(v)]
    bias_dtype = others[-1]
    dbias = [] if bias_dtype is None else [q.new_empty(q.shape[1:].numel(), dtype=bias_dtype)]
    return [like(q), *dbias]


@launcher(_bwd_outputs)
def attention_bwd(
    outputs: list[Tensor],
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, mask: Tensor | None, drop_words: Tensor | None, keep_scale: float,
    bias_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """dout (T_q, N, D) -> dq (T_q, N, D), dk and dv (T_k, N, D); the rest as in `attention_fwd`.

    If k and v are None, q is qkv (T, 3, N, D) and the result dqkv (T, 3, N, D), which the kernels
    fill without a copy. With a bias_dtype, dbias (3 N D,) in that dtype is returned too, the
    gradient of a bias that is part of qkv: the column sums of dqkv, exactly 0 for the keys. The
    partial sums temporarily take 2 N D float32 numbers for every 32 to 128 of the B S places.
    """
    dbias = None
    if k is None:
        dbias = None if bias_dtype is None else outputs[1]
        (q, k, v), (dq, dk, dv) = q.unbind(1), outputs[0].unbind(1)
    else:
        dq, dk, dv = outputs  # all with the same row stride, like the parts of a packed gradient
    num_rows, num_heads, head_dim = q.shape
    if not q.numel() + k.numel():
        if dbias is not None:
            dbias.zero_()
        return
    dout = dout.contiguous()
    columns = block_d(head_dim)
    grid = (num_heads, cu_seqlens_q.shape[0])
    inputs = _strides(q, k, v, max_seqlen_q, max_seqlen_k)
    gpu = capability(q)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": columns, "PRECISION": precision(q.dtype)}
    by_dot = dbias is not None and sums_by_dot(gpu, q.itemsize, columns)
    longest = max(max_seqlen_q, max_seqlen_k)
    has_mask, has_dropout = mask is not None, drop_words is not None
    tile = None
    if not has_mask:
        tile = single_tile(gpu, q.itemsize, columns, longest, dropout=has_dropout)
    if tile is not None:
        sums = _partial_sums(dbias, cu_seqlens_q, 1)
        attention_single_kernel(
            (1, *grid),
            q, k, v, out, dout, lse, cu_seqlens_q, cu_seqlens_k, drop_words, dq, dk, dv, sums,
            *inputs, _words_stride(drop_words), out.stride(0), dq.stride(0),
            num_rows, k.shape[0], softmax_scale, keep_scale,
            **shape, BLOCK=tile.block_m, BY_DOT=by_dot,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if dbias is not None:
            add_partials(sums, dbias.view(3, -1))  # the row for the keys becomes 0
        return
    delta = torch.empty_like(lse)
    total = torch.empty_like(lse) if q.dtype == torch.float32 else None
    mask, mask_strides = _mask_and_strides(mask)
    strides = (*inputs, *mask_strides, _words_stride(drop_words), out.stride(0))
    tile = dq_tile(gpu, q.itemsize, columns, dropout=has_dropout, mask=has_mask)
    tile_k = dkdv_tile(gpu, q.itemsize, columns, mask=has_mask)
    tiles = max(cdiv(max_seqlen_q, tile.block_m), 1)
    tiles_k = max(cdiv(max_seqlen_k, tile_k.block_n), 1)
    if dbias is not None:  # both kernels must store the same number of partial sums
        tiles = tiles_k = max(tiles, tiles_k)
    sums = _partial_sums(dbias, cu_seqlens_q, tiles)
    attention_dq_kernel(
        (tiles, *grid),
        q, k, v, out, dout, lse, cu_seqlens_q, cu_seqlens_k, mask, drop_words,
        dq, delta, total, sums, *strides, dq.stride(0), num_rows, softmax_scale, keep_scale,
        **shape, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BY_DOT=by_dot,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip
    attention_dkdv_kernel(
        (tiles_k, *grid),
        q, k, v, dout, lse, delta, total, cu_seqlens_q, cu_seqlens_k, mask, drop_words, dk, dv,
        sums, *strides, dk.stride(0), num_rows, k.shape[0], softmax_scale, keep_scale,
        **shape, BLOCK_M=tile_k.block_m, BLOCK_N=tile_k.block_n, BY_DOT=by_dot,
        num_warps=tile_k.num_warps, num_stages=tile_k.num_stages,
    )  # fmt: skip
    if dbias is not None:
        add_partials(sums, dbias.view(3, -1))


def _partial_sums(dbias: Tensor | None, cu_seqlens: Tensor, tiles: int):
    """Memory for the column sums of dq and dv: a row for each tile of each sequence."""
    if dbias is None:
        return None
    rows = tiles * (cu_seqlens.shape[0] - 1)
    return dbias.new_empty((2, rows, dbias.shape[0] // 3), dtype=torch.float32)


def variant(q: Tensor, longest: int, *, mask: bool, dropout: bool) -> str:
    """Names the kernels that run for q (T, N, D) and sequences of at most `longest` tokens."""
    gpu, columns = capability(q), block_d(q.shape[-1])
    tile = fwd_tile(gpu, q.itemsize, columns, dropout=dropout, mask=mask)
    forward = f"forward {tile.block_m}x{tile.block_n}"
    if not mask and single_tile(gpu, q.itemsize, columns, longest, dropout=dropout):
        return f"{forward}, backward in one tile"
    return f"{forward}, backward dq and dk/dv"


def _mask_and_strides(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    if mask is None:
        return None, (0, 0, 0, 0)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), mask.stride()


def _words_stride(drop_words: Tensor | None) -> int:
    return 0 if drop_words is None else drop_words.stride(1)


def _strides(q, k, v, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, ...]:
    """Strides of rows and heads; raises ValueError if an offset in a sequence exceeds 31 bits."""
    (q_row, q_head, _), (k_row, k_head, _), (v_row, v_head, _) = q.stride(), k.stride(), v.stride()
    if max(q_row * max_seqlen_q, k_row * max_seqlen_k, v_row * max_seqlen_k) >= 2**31:
        raise ValueError(
            f"attention: expected rows of a sequence within 2**31 elements, got up to"
            f" {max(max_seqlen_q, max_seqlen_k)} rows with strides {q_row}, {k_row} and {v_row}"
        )
    return q_row, q_head, k_row, k_head, v_row, v_head
