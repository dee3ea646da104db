"""Layer normalization: one program normalizes one row, which must fit in registers.

M rows, N columns. Statistics are in float32; parameter gradients are per-program partial sums added
up in a fixed order, so that a backward gives the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import LAUNCH, launcher, on

MAX_COLS = 16384
MAX_PROGRAMS = 512  # of the backward: partial sums to add up, and rows in flight


def block_and_warps(n_cols: int) -> tuple[int, int]:
    """BLOCK_N covers a row; a warp takes about 256 columns of it."""
    block_n = triton.next_power_of_2(n_cols)
    return block_n, min(max(block_n // 256, 1), 16)


@triton.jit(do_not_specialize=["eps"])
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr,  # (M, N), (N,), (N,)
    y_ptr, mean_ptr, rstd_ptr,  # (M, N), (M,), (M,)
    x_row_stride, y_row_stride,
    eps,
    N_COLS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N_COLS

    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / N_COLS
    centered = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=0) / N_COLS + eps)

    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row_stride + cols, centered * rstd * weight + bias, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,  # (M, N), (M, N), (N,), (M,), (M,)
    dx_ptr, dweight_ptr, dbias_ptr,  # (M, N), (P, N), (P, N): a partial sum per program
    dy_row_stride, x_row_stride, dx_row_stride,
    n_rows, rows_per_program,
    N_COLS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)

    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, n_rows)):
        x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x_hat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        wdy = weight * dy
        # dx = rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat))
        along = tl.sum(wdy * x_hat, axis=0) / N_COLS
        dx = rstd * (wdy - tl.sum(wdy, axis=0) / N_COLS - x_hat * along)
        tl.store(dx_ptr + row * dx_row_stride + cols, dx, mask=mask)
        dweight += dy * x_hat
        dbias += dy
    tl.store(dweight_ptr + program * N_COLS + cols, dweight, mask=mask)
    tl.store(dbias_ptr + program * N_COLS + cols, dbias, mask=mask)


def _fwd_outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


@launcher(_fwd_outputs)
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) -> y (M, N) in x.dtype; mean and rstd (M,) in float32."""
    n_rows, n_cols = _check(x)
    y, mean, rstd = _fwd_outputs(x, weight, bias, eps)
    if n_rows:
        block_n, num_warps = block_and_warps(n_cols)
        with on(x):
            _layer_norm_fwd_kernel[(n_rows,)](
                x, weight, bias, y, mean, rstd, x.stride(0), y.stride(0), eps,
                N_COLS=n_cols, BLOCK_N=block_n, num_warps=num_warps, **LAUNCH,
            )  # fmt: skip
    return y, mean, rstd


def _bwd_outputs(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


@launcher(_bwd_outputs)
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, N) in x.dtype; dweight and dbias (N,) in weight.dtype, summed in float32."""
    n_rows, n_cols = _check(x)
    _check(dy)
    rows_per_program = max(triton.cdiv(n_rows, MAX_PROGRAMS), 1)
    n_programs = triton.cdiv(n_rows, rows_per_program)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty(n_programs, n_cols, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    if n_rows:
        block_n, num_warps = block_and_warps(n_cols)
        with on(x):
            _layer_norm_bwd_kernel[(n_programs,)](
                dy, x, weight, mean, rstd, dx, dweight, dbias,
                dy.stride(0), x.stride(0), dx.stride(0), n_rows, rows_per_program,
                N_COLS=n_cols, BLOCK_N=block_n, num_warps=num_warps, **LAUNCH,
            )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


def _check(x: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] > MAX_COLS:
        raise ValueError(
            f"layer_norm: expected (rows, cols <= {MAX_COLS}) with unit column stride, "
            f"got shape {tuple(x.shape)} and strides {x.stride()}"
        )
    return x.shape[0], x.shape[1]
