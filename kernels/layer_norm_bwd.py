"""Layer normalization, backward: one pass over memory, from what the forward saved.

M rows, N columns; strides are divided by UNIT as in `layer_norm_fwd`. A program walks down the
matrix, BLOCK_M whole rows at a time. Where parameters are trained, each program stores one row of
partial sums for their gradients, which `add_partials` adds up in a fixed order.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.partial_sums import store_partial
from fastbert.kernels.philox import keep_mask
from fastbert.kernels.runtime import begin, cdiv, kernel, num_sms


@functools.cache
def backward_block(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps, with 256 elements a warp, because each column needs three sums.

    In very long rows a warp takes 512: more than 16 warps would leave each too few registers. Of
    short ones it takes 128, as the sums of one row after the other would spill with 256.
    """
    block_n = max(triton.next_power_of_2(n_cols), 8)
    block_m = min(max(1024 // block_n, 1), 16)
    per_warp = 128 if block_n <= 128 else 256 if block_n <= 2048 else 512
    return block_m, block_n, max(block_m * block_n // per_warp, 1)


def backward_programs(
    x: Tensor, n_rows: int, block: tuple[int, int, int], *, from_y: bool = False
) -> int:
    """As many programs as are resident at once, by the registers in the compile report."""
    block_m, block_n, num_warps = block
    from_z_or_y = (24, 20) if block_n <= 2048 else (16, 8)
    warps_per_sm = from_z_or_y[from_y]
    return min(cdiv(n_rows, block_m), max(warps_per_sm // num_warps, 1) * num_sms(x))


@triton.jit
def standardize_gradient(dz_hat, z_hat, rstd, N_COLS: tl.constexpr):
    """dz = rstd * (dz_hat - mean(dz_hat) - z_hat * mean(dz_hat * z_hat)), by rows [R, C].

    dz_hat is 0 in masked columns, so z_hat may be anything there.
    """
    along_one = tl.sum(dz_hat, axis=1) / N_COLS
    along_z = tl.sum(dz_hat * z_hat, axis=1) / N_COLS
    return (dz_hat - along_one[:, None] - z_hat * along_z[:, None]) * rstd[:, None]


@kernel(do_not_specialize=[
    "dy_row_stride", "kept_row_stride", "n_rows", "threshold", "site", "keep_scale",
])  # fmt: skip
def layer_norm_bwd_kernel(
    dy_ptr, dy2_ptr, kept_ptr,  # (M, N), (M, N) with dy's strides or None, (M, N): z or y
    weight_ptr, bias_ptr,  # (N,), (N,) or None
    mean_ptr, rstd_ptr,  # (M,) or None, (M,)
    state_ptr, token_key_ptr,  # (2,) or None, (M,)
    dz_ptr, dx_ptr,  # (M, N), (M, N) or None
    partials_ptr,  # (K, P, N) or None: sums for weight, bias and x_bias, one row a program
    dy_row_stride, kept_row_stride,
    n_rows, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes z_hat, which all gradients need, from z and the mean, or from y with a bias.

    K: 3 sums, 2 without that for x_bias, 0 for none.
    """
    begin()
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    is_col = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=is_col, other=1.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
        inverse = 1.0 / weight
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    step = n_programs * BLOCK_M
    for first in tl.range(program * BLOCK_M, n_rows, step, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        is_row = rows < n_rows
        mask = is_row[:, None] & is_col[None, :]
        out = (rows * N_COLS)[:, None] + cols[None, :]
        at = (rows * dy_row_stride * UNIT)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dy2_ptr is not None:
            dy += tl.load(dy2_ptr + at, mask=mask, other=0.0).to(tl.float32)
        kept = (rows * kept_row_stride * UNIT)[:, None] + cols[None, :]
        kept = tl.load(kept_ptr + kept, mask=mask, other=0.0).to(tl.float32)
        # rows past the end have a dy of 0, so they add nothing to the sums
        rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0)
        if bias_ptr is not None:
            z_hat = (kept - bias[None, :]) * inverse[None, :]
        else:
            mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
            z_hat = (kept - mean[:, None]) * rstd[:, None]
        if K > 0:
            dweight += dy * z_hat
            dbias += dy
        dx = standardize_gradient(dy * weight[None, :], z_hat, rstd, N_COLS)
        tl.store(dz_ptr + out, dx, mask=mask)
        if state_ptr is not None:
            keys = tl.load(token_key_ptr + rows, mask=is_row, other=0)
            keep = keep_mask(state_ptr, keys, threshold, site, 0, BLOCK_N)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + out, dx, mask=mask)
        if K > 2:
            dx_bias += dx

    if K > 0:
        store_partial(partials_ptr, 0, dweight, is_col, N_COLS)
        store_partial(partials_ptr, 1, dbias, is_col, N_COLS)
    if K > 2:
        store_partial(partials_ptr, 2, dx_bias, is_col, N_COLS)
