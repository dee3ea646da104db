"""Dropout, residual and layer normalization, in one pass over memory each way.

M rows, N columns. A program holds BLOCK_M whole rows in registers. Statistics are in float32. The
gradients of parameters are partial sums, one row of them a program, which are added up in a fixed
order. Row strides come divided by UNIT, which tells the compiler that each row starts at a multiple
of UNIT elements.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.partial_sums import add_partials, store_partial
from fastbert.kernels.philox import keep_mask
from fastbert.kernels.runtime import LAUNCH, launcher, num_sms, on

MAX_COLS = 16384


def forward_block(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, warps: a warp takes up to 1024 elements, and short rows come together."""
    block_n = max(triton.next_power_of_2(n_cols), 8)
    block_m = min(max(1024 // block_n, 1), 16)
    return block_m, block_n, 1 if block_n <= 1024 else min(block_n // 512, 16)


def backward_block(n_cols: int) -> tuple[int, int, int]:
    """The same for the backward, which keeps three sums a column: a warp takes 256 elements.

    Very long rows give it 512, as more than 16 warps leave too few registers to each.
    """
    block_n = max(triton.next_power_of_2(n_cols), 8)
    block_m = min(max(1024 // block_n, 1), 16)
    per_warp = 256 if block_n <= 2048 else 512
    return block_m, block_n, max(block_m * block_n // per_warp, 1)


def backward_programs(x: Tensor, n_rows: int, block: tuple[int, int, int]) -> int:
    """As many as stay on the device at once, by the registers that the compile report shows."""
    block_m, block_n, num_warps = block
    warps_per_sm = 24 if block_n <= 2048 else 16
    return min(triton.cdiv(n_rows, block_m), max(warps_per_sm // num_warps, 1) * num_sms(x))


@triton.jit
def standardize(z, is_col, eps, N_COLS: tl.constexpr):
    """Of rows z [R, C]: (z - mean) * rstd, and mean and rstd [R]; is_col [C] is False outside."""
    mean = tl.sum(z, axis=1) / N_COLS
    centered = tl.where(is_col[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / N_COLS + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def standardize_gradient(dz_hat, z_hat, rstd, N_COLS: tl.constexpr):
    """dz = rstd * (dz_hat - mean(dz_hat) - z_hat * mean(dz_hat * z_hat)), by rows [R, C].

    dz_hat is 0 outside the columns, which makes z_hat there immaterial.
    """
    along_one = tl.sum(dz_hat, axis=1) / N_COLS
    along_z = tl.sum(dz_hat * z_hat, axis=1) / N_COLS
    return (dz_hat - along_one[:, None] - z_hat * along_z[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=[
    "x_row_stride", "residual_row_stride", "n_rows", "eps", "threshold", "site", "keep_scale",
])  # fmt: skip
def _forward_kernel(
    x_ptr, residual_ptr, x_bias_ptr,  # (M, N), (M, N) or None, (N,) or None
    weight_ptr, bias_ptr, state_ptr, token_key_ptr,  # (N,), (N,), (2,) or None, (M,)
    y_ptr, z_ptr, mean_ptr, rstd_ptr,  # (M, N), (M, N) or None, (M,), (M,)
    x_row_stride, residual_row_stride,
    n_rows, eps, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
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
        # normalize exactly what the backward will read
        z = z.to(residual_ptr.dtype.element_ty).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + out, z, mask=mask)

    z_hat, mean, rstd = standardize(z, is_col, eps, N_COLS)
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, z_hat * weight[None, :] + bias[None, :], mask=mask)
    tl.store(mean_ptr + rows, mean, mask=is_row)
    tl.store(rstd_ptr + rows, rstd, mask=is_row)


@triton.jit(do_not_specialize=[
    "dy_row_stride", "z_row_stride", "n_rows", "threshold", "site", "keep_scale",
])  # fmt: skip
def _backward_kernel(
    dy_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr,  # (M, N), (M, N), (N,), (M,), (M,)
    state_ptr, token_key_ptr,  # (2,) or None, (M,)
    dz_ptr, dx_ptr,  # (M, N), (M, N) or None
    partials_ptr,  # (2 or 3, P, N): of weight, bias and x_bias, one row a program
    dy_row_stride, z_row_stride,
    n_rows, threshold, site, keep_scale,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
):  # fmt: skip
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    is_col = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dx_bias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for first in tl.range(program * BLOCK_M, n_rows, n_programs * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        is_row = rows < n_rows
        mask = is_row[:, None] & is_col[None, :]
        out = (rows * N_COLS)[:, None] + cols[None, :]
        dy = (rows * dy_row_stride * UNIT)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + dy, mask=mask, other=0.0).to(tl.float32)
        z = (rows * z_row_stride * UNIT)[:, None] + cols[None, :]
        z = tl.load(z_ptr + z, mask=mask, other=0.0).to(tl.float32)
        # rows past the end have a dy of 0, and so add nothing to any sum
        rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)

        z_hat = (z - mean[:, None]) * rstd[:, None]
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
        if HAS_X_BIAS:
            dx_bias += dx

    store_partial(partials_ptr, 0, dweight, is_col, N_COLS)
    store_partial(partials_ptr, 1, dbias, is_col, N_COLS)
    if HAS_X_BIAS:
        store_partial(partials_ptr, 2, dx_bias, is_col, N_COLS)


def keep_scale(threshold: int) -> float:
    return 4096 / (4096 - threshold)


def stride_unit(*strides: int) -> int:
    return math.gcd(8, *strides)


def _forward_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


def _fwd_outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    return _forward_outputs(x, x.dtype)


@launcher(_fwd_outputs)
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) -> y (M, N) in x.dtype; mean and rstd (M,) in float32."""
    y, mean, rstd = _fwd_outputs(x, weight, bias, eps)
    _launch_forward(x, None, None, weight, bias, None, None, y, None, mean, rstd, eps, 0, 0)
    return y, mean, rstd


def _add_fwd_outputs(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, save: bool,
):  # fmt: skip
    y, mean, rstd = _forward_outputs(x, residual.dtype)
    return y, y.new_empty(y.shape if save else (0,)), mean, rstd


@launcher(_add_fwd_outputs)
def dropout_add_layer_norm_fwd(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and z (M, N) in residual.dtype; mean and rstd (M,) in float32.

    z = residual + dropout(x + x_bias) is what is normalized; it is empty unless `save`. A state of
    None means no dropout.
    """
    y, z, mean, rstd = _add_fwd_outputs(
        x, residual, x_bias, weight, bias, eps, state, token_key, site, threshold, save
    )
    _launch_forward(
        x, residual, x_bias, weight, bias, state, token_key, y, z if save else None, mean, rstd,
        eps, site, threshold,
    )  # fmt: skip
    return y, z, mean, rstd


def _launch_forward(
    x, residual, x_bias, weight, bias, state, token_key, y, z, mean, rstd, eps, site, threshold
) -> None:  # fmt: skip
    n_rows, n_cols = _check(x)
    residual_stride = 0 if residual is None else residual.stride(0)
    if residual is not None:
        _check(residual)
    unit = stride_unit(x.stride(0), residual_stride)
    block_m, block_n, num_warps = forward_block(n_cols)
    if n_rows:
        with on(x):
            _forward_kernel[(triton.cdiv(n_rows, block_m),)](
                x, residual, x_bias, weight, bias, state, token_key, y, z, mean, rstd,
                x.stride(0) // unit, residual_stride // unit,
                n_rows, eps, threshold, site, keep_scale(threshold),
                N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit,
                num_warps=num_warps, **LAUNCH,
            )  # fmt: skip


def _bwd_outputs(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


@launcher(_bwd_outputs)
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, N) in x.dtype; dweight and dbias (N,) in weight.dtype, summed in float32."""
    dx, dweight, dbias = _bwd_outputs(dy, x, weight, mean, rstd)
    _launch_backward(dy, x, weight, mean, rstd, None, None, dx, None, dweight, dbias, None, 0, 0)
    return dx, dweight, dbias


def _add_bwd_outputs(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, has_x_bias: bool,
):  # fmt: skip
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    is_same = state is None and x_dtype == z.dtype
    dx = torch.empty((0,) if is_same else z.shape, dtype=x_dtype, device=z.device)
    dx_bias = weight.new_empty(weight.shape if has_x_bias else (0,))
    return dz, dx, torch.empty_like(weight), torch.empty_like(weight), dx_bias


@launcher(_add_bwd_outputs)
def dropout_add_layer_norm_bwd(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, has_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dresidual (M, N) in z.dtype, dx (M, N) in x_dtype; dweight, dbias, dx_bias in weight.dtype.

    dx is empty where it is dresidual, and dx_bias unless `has_x_bias`.
    """
    dz, dx, dweight, dbias, dx_bias = _add_bwd_outputs(
        dy, z, weight, mean, rstd, state, token_key, site, threshold, x_dtype, has_x_bias
    )
    _launch_backward(
        dy, z, weight, mean, rstd, state, token_key,
        dz, dx if dx.ndim == 2 else None, dweight, dbias, dx_bias if has_x_bias else None,
        site, threshold,
    )  # fmt: skip
    return dz, dx, dweight, dbias, dx_bias


def _launch_backward(
    dy, z, weight, mean, rstd, state, token_key, dz, dx, dweight, dbias, dx_bias, site, threshold
) -> None:  # fmt: skip
    n_rows, n_cols = _check(z)
    _check(dy)
    unit = stride_unit(dy.stride(0), z.stride(0))
    block_m, block_n, num_warps = block = backward_block(n_cols)
    n_programs = backward_programs(z, n_rows, block)
    sums = [dweight, dbias] if dx_bias is None else [dweight, dbias, dx_bias]
    partials = torch.empty(len(sums), n_programs, n_cols, dtype=torch.float32, device=z.device)
    with on(z):
        if n_rows:
            _backward_kernel[(n_programs,)](
                dy, z, weight, mean, rstd, state, token_key, dz, dx, partials,
                dy.stride(0) // unit, z.stride(0) // unit,
                n_rows, threshold, site, keep_scale(threshold),
                N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, UNIT=unit,
                HAS_X_BIAS=dx_bias is not None, num_warps=num_warps, **LAUNCH,
            )  # fmt: skip
        add_partials(partials, *sums)


def _check(x: Tensor) -> tuple[int, int]:
    n_cols = x.shape[-1]
    if x.ndim != 2 or not 1 <= n_cols <= MAX_COLS or (x.stride(1) != 1 and n_cols > 1):
        raise ValueError(
            f"layer_norm: expected (rows, 1 <= cols <= {MAX_COLS}) with unit column stride, "
            f"got shape {tuple(x.shape)} and strides {x.stride()}"
        )
    return x.shape[0], n_cols
