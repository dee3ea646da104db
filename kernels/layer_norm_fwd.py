"""Layer normalization, forward: of x, or of residual + dropout(x + bias), in one pass over memory.

M rows, N columns. A program holds BLOCK_M whole rows in registers. Row strides are passed divided
by UNIT, which tells the compiler that each row starts at a multiple of UNIT elements.
"""

import functools

import triton
import triton.language as tl

from fastbert.kernels.philox import keep_mask
from fastbert.kernels.runtime import begin, kernel


@functools.cache
def forward_block(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, warps: a warp takes up to 1024 elements; short rows share a program."""
    block_n = max(triton.next_power_of_2(n_cols), 8)
    block_m = min(max(1024 // block_n, 1), 16)
    return block_m, block_n, 1 if block_n <= 1024 else min(block_n // 512, 16)


@triton.jit
def standardize(z, is_col, eps, N_COLS: tl.constexpr):
    """(z - mean) * rstd of rows z [R, C], then mean and rstd [R]; is_col [C] masks columns."""
    mean = tl.sum(z, axis=1) / N_COLS
    centered = tl.where(is_col[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / N_COLS + eps)
    return centered * rstd[:, None], mean, rstd


@kernel(do_not_specialize=[
    "x_row_stride", "residual_row_stride", "n_rows", "eps", "threshold", "site", "keep_scale",
])  # fmt: skip
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, x_bias_ptr,  # (M, N), (M, N) or None, (N,) or None
    weight_ptr, bias_ptr, state_ptr, token_key_ptr,  # (N,), (N,), (2,) or None, (M,)
    y_ptr, low_ptr, z_ptr,  # (M, N), (M, N) or None: y again, in x's dtype, (M, N) or None
    mean_ptr, rstd_ptr,  # (M,) or None, (M,) or None
    x_row_stride, residual_row_stride,
    n_rows, eps, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    begin()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    is_row, is_col = rows < n_rows, cols < N_COLS
    mask = is_row[:, None] & is_col[None, :]
    out = (rows * N_COLS)[:, None] + cols[None, :]

    x = (rows * x_row_stride * UNIT)[:, None] + cols[None, :]
    z = tl.load(x_ptr + x, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    if state_ptr is not None:
        keys = tl.load(token_key_ptr + rows, mask=is_row, other=0)
        keep = keep_mask(state_ptr, keys, threshold, site, 0, BLOCK_N)
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        residual = (rows * residual_row_stride * UNIT)[:, None] + cols[None, :]
        z += tl.load(residual_ptr + residual, mask=mask, other=0.0).to(tl.float32)
        # round z first, so that the backward reads exactly the numbers that are normalized here
        z = z.to(residual_ptr.dtype.element_ty).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + out, z, mask=mask)

    z_hat, mean, rstd = standardize(z, is_col, eps, N_COLS)
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    y = z_hat * weight[None, :] + bias[None, :]
    tl.store(y_ptr + out, y, mask=mask)
    if low_ptr is not None:
        tl.store(low_ptr + out, y, mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=is_row)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=is_row)
