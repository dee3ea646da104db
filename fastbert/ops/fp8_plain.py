"""The launchers of kernels/fp8_linear.py in plain PyTorch, for any device and size.

The casts give the same bits as the hardware's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.fused import without_autocast

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def cast_transpose(x: Tensor, scale: Tensor, amax: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    """x (M, N) times `scale` in FP8, (M, N) and (N, M); updates amax with x's largest magnitude."""
    cast = quantised(x, scale, E5M2 if e5m2 else E4M3)
    if x.numel():
        size = x.detach().abs().float()
        finite = torch.where(size.isfinite(), size, 0.0)
        torch.maximum(amax, finite.max(), out=amax)
    return cast, cast.t()


def gelu_cast_transpose(
    x: Tensor, bias: Tensor, tanh: bool, scale: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """`cast_transpose` of gelu(x + bias), in E4M3."""
    y = F.gelu(x.float() + bias.float(), approximate="tanh" if tanh else "none")
    return cast_transpose(y, scale, amax, False)


def gelu_bwd_cast_transpose(
    dy: Tensor, x: Tensor, bias: Tensor, tanh: bool, scale: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`cast_transpose` of the gradient of x, in E5M2, and its column sums in bias.dtype."""
    z = x.float() + bias.float()
    approximate = "tanh" if tanh else "none"
    dx = torch.ops.aten.gelu_backward(dy.float(), z, approximate=approximate)
    return *cast_transpose(dx, scale, amax, True), dx.sum(0).to(bias.dtype)


def product(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`a @ b.T * of_a * of_b + bias`, for a (M, K) and b (N, K), summed in float32."""
    with without_autocast(a):
        y = F.linear(a.float(), b.float()) * (of_a * of_b)
    return (y if bias is None else y + bias.float()).to(dtype)


def quantised(x: Tensor, scale: Tensor, format: torch.dtype) -> Tensor:
    """x times `scale`, cast to an FP8 format: to the nearest value, ties to even.

    Values beyond the format saturate; values that are not finite become NaN.
    """
    largest = LARGEST[format]
    y = x.float() * scale
    return torch.where(x.isfinite(), y.clamp(-largest, largest), torch.nan).to(format)
