"""Launchers of the layer normalization kernels in `layer_norm_fwd` and `layer_norm_bwd`."""

import torch
from torch import Tensor

from fastbert.kernels.layer_norm_bwd import backward_block, backward_programs, layer_norm_bwd_kernel
from fastbert.kernels.layer_norm_fwd import forward_block, layer_norm_fwd_kernel
from fastbert.kernels.partial_sums import add_partials, together
from fastbert.kernels.philox import keep_scale
from fastbert.kernels.runtime import cdiv, launcher, like, stride_unit

__all__ = ["layer_norm_bwd", "layer_norm_fwd", "together"]

# Of the backward's loop: a program loads its next rows while it computes these, in as many
# registers. H200, 32,199 rows of 1,024 with dropout: 78 us, and 91 with 2 stages, 94 with one.
STAGES = 3


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
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    keep: str, low: bool,
) -> list[Tensor]:  # fmt: skip
    """Normalizes z = residual + dropout(x + x_bias), or x where there is no residual.

    x, residual: (M, N) with unit column stride; x_bias, weight, bias: (N,). Returns y (M, N) in
    residual.dtype (x.dtype without a residual), if `low` again in x.dtype, and what the backward
    reads by `keep`: nothing for ""; rstd (M,) float32 for "y"; for "z" rstd, mean (M,) float32 and
    z (M, N), which is left out where it is x. A state of None means no dropout.
    """
    outputs = _fwd_outputs(x, residual, keep, low)
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
    return outputs


def _bwd_outputs(kept, weight, state, x_dtype, num_sums):
    is_same = state is None and x_dtype == kept.dtype
    dx = kept.new_empty((0,), dtype=x_dtype) if is_same else like(kept, x_dtype)
    return like(kept), dx, weight.new_empty((num_sums, weight.shape[0]))


@launcher(lambda _, __, kept, weight, *others: _bwd_outputs(kept, weight, others[3], *others[-2:]))
def layer_norm_bwd(
    dy: Tensor, dy2: Tensor | None, kept: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor,
    state: Tensor | None, token_key: Tensor | None, site: int, threshold: int,
    x_dtype: torch.dtype, num_sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz (M, N) in kept.dtype, dx (M, N) in x_dtype, and sums (K, N) in weight.dtype.

    dy, dy2: (M, N) of the same strides, the gradients of y's two branches, whose sum is y's; dy2 is
    None without a second. kept: z, with the mean and no bias, or y, with the bias and no mean.
    num_sums: K, 3 for the gradients of weight, bias and x_bias, 2 without the last, 0 for none,
    summed in float32. dx is empty where it equals dz.
    """
    outputs = dz, dx, sums = _bwd_outputs(kept, weight, state, x_dtype, num_sums)
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
    return outputs
