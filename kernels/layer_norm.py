"""Layer normalization of x, or of residual + dropout(x + bias): each pass goes over memory once.

M rows, N columns. A program holds BLOCK_M whole rows in registers. In the backward it walks down
the matrix and, if parameters are trained, stores one row of partial sums of their gradients, which
`add_partials` adds up in a fixed order. Row strides are passed divided by UNIT, which tells the
compiler that each row starts at a multiple of UNIT elements.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.partial_sums import add_partials, store_partial
from fastbert.kernels.partial_sums import together as together
from fastbert.kernels.philox import keep_mask, keep_scale
from fastbert.kernels.runtime import begin, cdiv, kernel, launcher, like, num_sms, stride_unit

# Pipeline stages of the backward's loop: a program loads its next rows while it computes, with no
# more registers. H200, 32,199 rows of 1,024 with dropout: 78 us; 91 with 2 stages, 94 with one.
STAGES = 3


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


@functools.cache
def backward_block(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps, with 256 elements a warp, because each column needs three sums.

    In very long rows a warp takes 512, because more than 16 warps would have too few registers
    each. In short rows it takes 128, because the sums would spill with 256.
    """
    block_n = max(triton.next_power_of_2(n_cols), 8)
    block_m = min(max(1024 // block_n, 1), 16)
    per_warp = 128 if block_n <= 128 else 256 if block_n <= 2048 else 512
    return block_m, block_n, max(block_m * block_n // per_warp, 1)


def backward_programs(
    x: Tensor, n_rows: int, block: tuple[int, int, int], *, from_y: bool = False
) -> int:
    """As many programs as are resident at once, according to registers in the compile report."""
    block_m, block_n, num_warps = block
    from_z_or_y = (24, 20) if block_n <= 2048 else (16, 8)
    warps_per_sm = from_z_or_y[from_y]
    return min(cdiv(n_rows, block_m), max(warps_per_sm // num_warps, 1) * num_sms(x))


@triton.jit
def standardize_gradient(dz_hat, z_hat, rstd, N_COLS: tl.constexpr):
    """dz = rstd * (dz_hat - mean(dz_hat) - z_hat * mean(dz_hat * z_hat)), for rows [R, C].

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
    """Recomputes z_hat, which all gradients need, from z and the mean, or from y and the bias.

    K: 3 sums, 2 without the sum for x_bias, 0 if no parameters are trained.
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


def _fwd_outputs(x, residual, *others):
    keep, low = others[-2:]
    y = like(x if residual is None else residual)
    results = [y, like(y, x.dtype)] if low else [y]
    if not keep:
        return results
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if keep == "y":
        return [*results, rstd]
    mean = torch.empty_like(rstd)
    of_z = [] if residual is None else [torch.empty_like(y)]
    return [*results, rstd, mean, *of_z]


@launcher(_fwd_outputs)
def layer_norm_fwd(
    outputs: list[Tensor],
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    keep: str, low: bool,
) -> None:  # fmt: skip
    """Normalizes z = residual + dropout(x + x_bias), or x if there is no residual.

    x, residual: (M, N) with unit column stride; x_bias, weight, bias: (N,). Returns y (M, N) in
    residual.dtype (x.dtype without a residual); if `low`, y again in x.dtype; and for the backward,
    by `keep`: nothing for ""; rstd (M,) float32 for "y"; rstd, mean (M,) float32 and z (M, N) for
    "z", without z if it is x. A state of None means no dropout.
    """
    y, y_low = outputs[0], outputs[1] if low else None
    rstd, mean, z = (*outputs[1 + low :], None, None, None)[:3]
    n_rows, n_cols = x.shape
    x_stride, residual_stride = x.stride(0), 0 if residual is None else residual.stride(0)
    unit = stride_unit(x_stride, residual_stride)
    block_m, block_n, num_warps = forward_block(n_cols)
    if n_rows:
        layer_norm_fwd_kernel(
            (cdiv(n_rows, block_m),),
            x, residual, x_bias, weight, bias, state, token_key, y, y_low, z, mean, rstd,
            x_stride // unit, residual_stride // unit,
            n_rows, eps, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit,
            num_warps=num_warps,
        )  # fmt: skip


def _bwd_outputs(dy, dy2, kept, weight, bias, mean, rstd, state, *others):
    x_dtype, num_sums = others[-2:]
    is_same = state is None and x_dtype == kept.dtype
    dx = kept.new_empty((0,), dtype=x_dtype) if is_same else like(kept, x_dtype)
    return like(kept), dx, weight.new_empty((num_sums, weight.shape[0]))


@launcher(_bwd_outputs)
def layer_norm_bwd(
    outputs: tuple[Tensor, Tensor, Tensor],
    dy: Tensor, dy2: Tensor | None, kept: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, num_sums: int,
) -> None:  # fmt: skip
    """Gradients dz (M, N) in kept.dtype, dx (M, N) in x_dtype, and sums (K, N) in weight.dtype.

    dy, dy2: (M, N) of the same strides; their sum is the gradient of y; dy2 is None unless y has
    two branches. kept: z, with the mean and no bias, or y, with the bias and no mean. num_sums: K,
    3 for the gradients of weight, bias and x_bias, 2 without x_bias, 0 for none; summed in float32.
    dx is empty if it equals dz.
    """
    dz, dx, sums = outputs
    n_rows, n_cols = kept.shape
    unit = stride_unit(dy.stride(0), kept.stride(0))
    block_m, block_n, num_warps = block = backward_block(n_cols)
    n_programs = backward_programs(kept, n_rows, block, from_y=bias is not None)
    partials = None
    if num_sums:
        shape = num_sums, n_programs, n_cols
        partials = torch.empty(shape, dtype=torch.float32, device=kept.device)
    if n_rows:
        layer_norm_bwd_kernel(
            (n_programs,),
            dy, dy2, kept, weight, bias, mean, rstd, state, token_key,
            dz, dx if dx.ndim == 2 else None, partials,
            dy.stride(0) // unit, kept.stride(0) // unit,
            n_rows, threshold, site, keep_scale(threshold),
            N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit,
            K=num_sums, STAGES=STAGES, num_warps=num_warps,
        )  # fmt: skip
    if partials is not None:
        add_partials(partials, sums)
