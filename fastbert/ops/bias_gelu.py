"""GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415) after adding a bias."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import DTYPES, op, place
from fastbert.check import require, require_rows
from fastbert.ops.fused import as_rows, once, run, shaped


class BiasGelu(NamedTuple):
    """A call of `bias_gelu`."""

    x: Tensor
    bias: Tensor
    approximate: str = "none"


@op("triton")
def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> BiasGelu:
    """`gelu(x + bias)`, with the error function or, for approximate="tanh", the tanh formula.

    x: (..., H); bias: (H,) of any floating-point dtype. Computed in float32 or wider without
    rounding the sum, returned in x.dtype. The kernels save only x and the bias for the backward.

    Raises ValueError for other shapes, an x of integers, or another `approximate`.
    """
    who = "bias_gelu"
    require_rows(who, x, bias=bias)
    require(approximate in ("none", "tanh"), who, 'approximate "none" or "tanh"', approximate)
    return BiasGelu(x, bias, approximate)


@bias_gelu.plain
def _plain(call: BiasGelu) -> Tensor:
    x, bias, approximate = call
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x + bias.to(wide), approximate=approximate).to(x.dtype)


@bias_gelu.refuses
def _refusal(call: BiasGelu) -> str | None:
    x, bias, _ = call
    if x.dtype not in DTYPES:
        return str(x.dtype)
    if bias.dtype not in DTYPES:
        return f"a bias of {bias.dtype}"
    if not x.shape[-1]:
        return "0 columns"
    if place(bias) != place(x):
        return f"x on {x.device} and bias on {bias.device}"
    return None


class BiasGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        rows, bias, tanh = as_rows(x), bias.contiguous(), approximate == "tanh"
        if ctx is not None:
            ctx.save_for_backward(rows, bias)
            ctx.kernels, ctx.options = kernels, (tanh, ctx.needs_input_grad[2])
        return shaped(kernels.bias_gelu_fwd(rows, bias, tanh), x.shape)

    @staticmethod
    @once("bias_gelu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, bias = ctx.saved_tensors
        dx, dbias = ctx.kernels.bias_gelu_bwd(as_rows(dy), rows, bias, *ctx.options)
        return None, shaped(dx, dy.shape), dbias if len(dbias) else None, None


bias_gelu.fused(partial(run, BiasGeluFunction))
