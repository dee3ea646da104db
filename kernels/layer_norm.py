"""Launchers of layer normalization, with the kernels of `layer_norm_fwd` and `layer_norm_bwd`."""

import torch
import triton
from torch import Tensor

from fastbert.kernels.layer_norm_bwd import backward_block, backward_programs, layer_norm_bwd_kernel
from fastbert.kernels.layer_norm_fwd import forward_block, layer_norm_fwd_kernel
from fastbert.kernels.partial_sums import add_partials
from fastbert.kernels.philox import keep_scale
from fastbert.kernels.runtime import LAUNCH, launcher, on, stride_unit

MAX_COLS = 16384


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
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, keep_z: bool,
):  # fmt: skip
    y, mean, rstd = _forward_outputs(x, residual.dtype)
    if not keep_z:
        return y, y.new_empty(0), mean.new_empty(0), rstd
    return y, torch.empty_like(y), mean, rstd


@launcher(_add_fwd_outputs)
def dropout_add_layer_norm_fwd(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int, keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and z (M, N) in residual.dtype; mean and rstd (M,) in float32.

    z = residual + dropout(x + x_bias) is what is normalized; z and mean are empty unless `keep_z`,
    and y is the same either way. A state of None means no dropout.
    """
    y, z, mean, rstd = _add_fwd_outputs(
        x, residual, x_bias, weight, bias, eps, state, token_key, site, threshold, keep_z
    )
    _launch_forward(
        x, residual, x_bias, weight, bias, state, token_key,
        y, z if keep_z else None, mean if keep_z else None, rstd, eps, site, threshold,
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
            layer_norm_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
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
    _launch_backward(
        dy, x, weight, None, mean, rstd, None, None, dx, None, dweight, dbias, None, 0, 0
    )
    return dx, dweight, dbias


def _add_bwd_outputs(
    dy: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, has_x_bias: bool,
):  # fmt: skip
    dz = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
    is_same = state is None and x_dtype == kept.dtype
    dx = torch.empty((0,) if is_same else kept.shape, dtype=x_dtype, device=kept.device)
    dx_bias = weight.new_empty(weight.shape if has_x_bias else (0,))
    return dz, dx, torch.empty_like(weight), torch.empty_like(weight), dx_bias


@launcher(_add_bwd_outputs)
def dropout_add_layer_norm_bwd(
    dy: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, has_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dresidual (M, N) in kept.dtype, dx (M, N) in x_dtype; the rest (N,) in weight.dtype.

    kept: z, with the mean and no bias, or y, with the bias and no mean.
    dx is empty where it is dresidual, and dx_bias unless `has_x_bias`.
    """
    dz, dx, dweight, dbias, dx_bias = _add_bwd_outputs(
        dy, kept, weight, bias, mean, rstd, state, token_key, site, threshold, x_dtype, has_x_bias
    )
    _launch_backward(
        dy, kept, weight, bias, mean, rstd, state, token_key,
        dz, dx if dx.ndim == 2 else None, dweight, dbias, dx_bias if has_x_bias else None,
        site, threshold,
    )  # fmt: skip
    return dz, dx, dweight, dbias, dx_bias


def _launch_backward(
    dy, kept, weight, bias, mean, rstd, state, token_key, dz, dx, dweight, dbias, dx_bias,
    site, threshold,
) -> None:  # fmt: skip
    n_rows, n_cols = _check(kept)
    _check(dy)
    unit = stride_unit(dy.stride(0), kept.stride(0))
    block_m, block_n, num_warps = block = backward_block(n_cols)
    n_programs = backward_programs(kept, n_rows, block, from_y=bias is not None)
    sums = [dweight, dbias] if dx_bias is None else [dweight, dbias, dx_bias]
    partials = torch.empty(len(sums), n_programs, n_cols, dtype=torch.float32, device=kept.device)
    with on(kept):
        if n_rows:
            layer_norm_bwd_kernel[(n_programs,)](
                dy, kept, weight, bias, mean, rstd, state, token_key, dz, dx, partials,
                dy.stride(0) // unit, kept.stride(0) // unit,
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
