"""Word, position and token type embeddings, LayerNorm of their sum, and dropout, in one pass.

T tokens, N columns; tables of V words, P positions and S types. The backward gathers and sums the
embeddings again, which moves less memory than saving the sums. It computes their gradient dz
(T, N), which `table_gradients` adds to the gradients of the tables.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.layer_norm import (
    backward_block,
    backward_programs,
    standardize,
    standardize_gradient,
)
from fastbert.kernels.partial_sums import add_partials, store_partial
from fastbert.kernels.philox import keep_mask, keep_scale
from fastbert.kernels.runtime import begin, cdiv, kernel, launcher, stride_unit
from fastbert.kernels.table_gradients import add_to_tables


@functools.cache
def forward_block(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, warps: a warp takes 512 elements, each the sum of three gathers."""
    block_m, block_n, _ = backward_block(n_cols)
    return block_m, block_n, min(max(block_m * block_n // 512, 1), 16)


@triton.jit
def _load_ids(ids_ptr, rows, is_row, n_ids):
    """int64 ids [R], all 0 if the pointer is None, and which of them are inside the table."""
    ids = tl.zeros_like(rows)
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + rows, mask=is_row, other=0).to(tl.int64)
    return ids, (ids >= 0) & (ids < n_ids)


@triton.jit
def _gather(table_ptr, ids, mask, N_COLS: tl.constexpr, BLOCK_N: tl.constexpr):
    places = (ids * N_COLS)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    return tl.load(table_ptr + places, mask=mask, other=0.0).to(tl.float32)


@kernel(do_not_specialize=[
    "n_rows", "n_words", "n_positions", "n_types", "eps", "threshold", "site", "keep_scale",
])  # fmt: skip
def _forward_kernel(
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr,  # (T,), (T,), (T,) or None
    word_ptr, position_ptr, token_type_ptr,  # (V, N), (P, N), (S, N)
    weight_ptr, bias_ptr, state_ptr, token_key_ptr,  # (N,), (N,), (2,) or None, (T,)
    y_ptr, mean_ptr, rstd_ptr,  # (T, N), (T,) or None, (T,) or None
    n_rows, n_words, n_positions, n_types, eps, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    is_row, is_col = rows < n_rows, cols < N_COLS

    words, has_word = _load_ids(input_ids_ptr, rows, is_row, n_words)
    positions, has_position = _load_ids(position_ids_ptr, rows, is_row, n_positions)
    types, has_type = _load_ids(token_type_ids_ptr, rows, is_row, n_types)
    is_known = has_word & has_position & has_type
    mask = (is_row & is_known)[:, None] & is_col[None, :]
    z = _gather(word_ptr, words, mask, N_COLS, BLOCK_N)
    z += _gather(token_type_ptr, types, mask, N_COLS, BLOCK_N)
    z += _gather(position_ptr, positions, mask, N_COLS, BLOCK_N)

    # nothing is read for an id outside its table; its row becomes NaN, which costs nothing extra
    row_eps = tl.where(is_known, eps, float("nan"))
    z_hat, mean, rstd = standardize(z, is_col, row_eps, N_COLS)
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    y = z_hat * weight[None, :] + bias[None, :]
    if state_ptr is not None:
        keys = tl.load(token_key_ptr + rows, mask=is_row, other=0)
        keep = keep_mask(state_ptr, keys, threshold, site, 0, BLOCK_N)
        y = tl.where(keep, y * keep_scale, 0.0)
    out = (rows * N_COLS)[:, None] + cols[None, :]
    tl.store(y_ptr + out, y, mask=is_row[:, None] & is_col[None, :])
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=is_row)
        tl.store(rstd_ptr + rows, rstd, mask=is_row)


@kernel(do_not_specialize=[
    "dy_row_stride", "n_rows", "n_words", "n_positions", "n_types", "threshold", "site",
    "keep_scale",
])  # fmt: skip
def _backward_kernel(
    dy_ptr,  # (T, N)
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr,  # (T,), (T,), (T,) or None
    word_ptr, position_ptr, token_type_ptr,  # (V, N), (P, N), (S, N)
    weight_ptr, mean_ptr, rstd_ptr, state_ptr, token_key_ptr,  # (N,), (T,), (T,), (2,), (T,)
    dz_ptr, keys_ptr, partials_ptr,  # (T, N), (3, T): ids over all tables, (2, programs, N)
    dy_row_stride,
    n_rows, n_words, n_positions, n_types, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    begin()
    cols = tl.arange(0, BLOCK_N)
    is_col = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for first in tl.range(tl.program_id(0) * BLOCK_M, n_rows, tl.num_programs(0) * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        is_row = rows < n_rows
        mask = is_row[:, None] & is_col[None, :]
        words, has_word = _load_ids(input_ids_ptr, rows, is_row, n_words)
        positions, has_position = _load_ids(position_ids_ptr, rows, is_row, n_positions)
        types, has_type = _load_ids(token_type_ids_ptr, rows, is_row, n_types)
        is_known = (has_word & has_position & has_type)[:, None] & mask
        z = _gather(word_ptr, words, is_known, N_COLS, BLOCK_N)
        z += _gather(token_type_ptr, types, is_known, N_COLS, BLOCK_N)
        z += _gather(position_ptr, positions, is_known, N_COLS, BLOCK_N)

        dy = (rows * dy_row_stride * UNIT)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + dy, mask=mask, other=0.0).to(tl.float32)
        if state_ptr is not None:
            keys = tl.load(token_key_ptr + rows, mask=is_row, other=0)
            keep = keep_mask(state_ptr, keys, threshold, site, 0, BLOCK_N)
            dy = tl.where(keep, dy * keep_scale, 0.0)
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0)
        z_hat = (z - mean[:, None]) * rstd[:, None]
        dweight += dy * z_hat
        dbias += dy
        dz = standardize_gradient(dy * weight[None, :], z_hat, rstd, N_COLS)
        tl.store(dz_ptr + (rows * N_COLS)[:, None] + cols[None, :], dz, mask=mask)

        # ids outside their table get the key n_ids, which sorts last and is never stored
        n_ids = n_words + n_positions + n_types
        word_keys = tl.where(has_word, words, n_ids)
        position_keys = tl.where(has_position, n_words + positions, n_ids)
        type_keys = tl.where(has_type, n_words + n_positions + types, n_ids)
        tl.store(keys_ptr + rows, word_keys, mask=is_row)
        tl.store(keys_ptr + n_rows + rows, position_keys, mask=is_row)
        tl.store(keys_ptr + 2 * n_rows.to(tl.int64) + rows, type_keys, mask=is_row)

    store_partial(partials_ptr, 0, dweight, is_col, N_COLS)
    store_partial(partials_ptr, 1, dbias, is_col, N_COLS)


def _fwd_outputs(input_ids, position_ids, token_type_ids, word, *others):
    dtype, keep = others[-2:]
    n_rows, device = input_ids.shape[0], word.device
    y = torch.empty(n_rows, word.shape[1], dtype=dtype, device=device)
    if not keep:
        return [y]
    mean = torch.empty(n_rows, dtype=torch.float32, device=device)
    return [y, mean, torch.empty_like(mean)]


@launcher(_fwd_outputs)
def embedding_layer_norm_fwd(
    outputs: list[Tensor], input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor, eps: float,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, dtype: torch.dtype,
    keep: bool,
) -> None:  # fmt: skip
    """dropout(layer_norm(...)) of the summed embeddings: y (T, N) in `dtype`.

    Ids (T,) are contiguous; tables (V, N), (P, N), (S, N) are contiguous and of one dtype. If
    `keep`, also returns mean and rstd (T,) in float32, for the backward. A state of None means no
    dropout.
    """
    y, *statistics = outputs
    n_rows, n_cols = y.shape
    block_m, block_n, num_warps = forward_block(n_cols)
    if n_rows:
        _forward_kernel(
            (cdiv(n_rows, block_m),),
            input_ids, position_ids, token_type_ids, word, position, token_type,
            weight, bias, state, token_key, y, *(statistics or (None, None)),
            n_rows, word.shape[0], position.shape[0], token_type.shape[0],
            eps, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip


def _bwd_outputs(*arguments):
    *tables, weight = arguments[4:8]
    return *map(torch.zeros_like, tables), weight.new_empty((2, weight.shape[0]))


@launcher(_bwd_outputs)
def embedding_layer_norm_bwd(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dy: Tensor, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, padding_id: int,
) -> None:  # fmt: skip
    """Dense gradients of the three tables, and of weight and bias (2, N), in their dtypes.

    dy: (T, N) with unit column stride; padding_id: the word whose row gets no gradient, or -1.
    """
    dword, dposition, dtoken_type, sums = outputs
    n_rows, n_cols = dy.shape
    sizes = word.shape[0], position.shape[0], token_type.shape[0]
    block_m, block_n, num_warps = block = backward_block(n_cols)
    n_programs = backward_programs(dy, n_rows, block)
    unit = stride_unit(dy.stride(0))
    partials = torch.empty(2, n_programs, n_cols, dtype=torch.float32, device=dy.device)
    dz = torch.empty(n_rows, n_cols, dtype=word.dtype, device=dy.device)
    keys = torch.empty(3, n_rows, dtype=torch.int32, device=dy.device)
    if n_rows:
        _backward_kernel(
            (n_programs,),
            dy, input_ids, position_ids, token_type_ids, word, position, token_type,
            weight, mean, rstd, state, token_key, dz, keys, partials, dy.stride(0) // unit,
            n_rows, *sizes, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit,
            num_warps=num_warps,
        )  # fmt: skip
        add_to_tables(dz, keys, dword, dposition, dtoken_type, padding_id)
    add_partials(partials, sums)
