"""Layer normalization (Ba et al. 2016, https://arxiv.org/abs/1607.06450), also after a residual."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require


@op("triton", dtypes=(torch.float32, torch.float16, torch.bfloat16))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    x: (..., H); weight, bias: (H,). The variance is the biased one. Computed in float32 or wider,
    returned in x.dtype, whatever autocast would do: the packed stream keeps its dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return normed.to(x.dtype)


@layer_norm.fused
def _fused(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(
            tensor.shape == x.shape[-1:],
            "layer_norm",
            f"{name} of shape {tuple(x.shape[-1:])}",
            tuple(tensor.shape),
        )
    return _LayerNorm.apply(kernels, x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, mean, rstd = kernels.layer_norm_fwd(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.kernels = kernels
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, weight, mean, rstd = ctx.saved_tensors
        dy_rows = dy.reshape(rows.shape)
        dx, dweight, dbias = ctx.kernels.layer_norm_bwd(dy_rows, rows, weight, mean, rstd)
        return None, dx.view(dy.shape), dweight, dbias, None


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """`layer_norm(residual + dropout(x))`: the end of each half of a BERT layer.

    x, residual: (..., H); the result has residual.dtype.
    """
    x = F.dropout(x, dropout_p, training=dropout_p > 0)
    return layer_norm((residual + x).to(residual.dtype), weight, bias, eps)
