"""GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415) after adding a bias."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@op("triton", dtypes=_DTYPES)
def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """`gelu(x + bias)`, by the error function or, for approximate="tanh", by the tanh formula.

    x: (..., H); bias: (H,) of any floating-point dtype. Computed in float32 or wider without
    rounding the sum, returned in x.dtype. The kernels keep x and the bias for the backward and
    nothing else.
    """
    _check(x, bias, approximate)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x + bias.to(wide), approximate=approximate).to(x.dtype)


@bias_gelu.refuses
def _refusal(x: Tensor, bias: Tensor, *, approximate: str = "none") -> str | None:
    if bias.dtype not in _DTYPES:
        return f"a bias of {bias.dtype}"
    return f"x on {x.device} and bias on {bias.device}" if bias.device != x.device else None


@bias_gelu.fused
def _fused(kernels: Any, x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    _check(x, bias, approximate)
    return _BiasGelu.apply(kernels, x, bias, approximate == "tanh")


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        rows, bias = _rows(x), bias.contiguous()
        ctx.save_for_backward(rows, bias)
        ctx.kernels, ctx.tanh = kernels, tanh
        return kernels.bias_gelu_fwd(rows, bias, tanh).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, bias = ctx.saved_tensors
        dx, dbias = ctx.kernels.bias_gelu_bwd(_rows(dy), rows, bias, ctx.tanh)
        return None, dx.view(dy.shape), dbias, None


def _rows(x: Tensor) -> Tensor:
    """(..., H) -> (M, H) whose columns lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(x: Tensor, bias: Tensor, approximate: str) -> None:
    require(x.ndim > 0, "bias_gelu", "x of shape (..., hidden)", "()")
    if bias.shape != x.shape[-1:]:
        require(False, "bias_gelu", f"bias of shape {tuple(x.shape[-1:])}", tuple(bias.shape))
    require(
        approximate in ("none", "tanh"), "bias_gelu", 'approximate "none" or "tanh"', approximate
    )
