"""Dropout of the residual stream by itself; other kernels have their own as a part of them."""

import triton.language as tl
from torch import Tensor

from fastbert.kernels.philox import keep_mask, keep_scale
from fastbert.kernels.runtime import begin, cdiv, kernel, launcher, like

BLOCK = 4, 256, 4  # rows and columns of a tile, and warps


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


def _outputs(x: Tensor, state: Tensor, token_key: Tensor, site: int, threshold: int):
    return like(x)


@launcher(_outputs)
def dropout(x: Tensor, state: Tensor, token_key: Tensor, site: int, threshold: int) -> Tensor:
    """x (M, N) with unit column stride, its elements dropped or scaled; its own gradient."""
    y = _outputs(x, state, token_key, site, threshold)
    n_rows, n_cols = x.shape
    rows, cols, num_warps = BLOCK
    if y.numel():
        _dropout_kernel(
            (cdiv(n_rows, rows) * cdiv(n_cols, cols),),
            x, y, state, token_key, x.stride(0),
            n_rows, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
    return y
