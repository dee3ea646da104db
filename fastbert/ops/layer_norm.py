"""Layer normalization (Ba et al. 2016, https://arxiv.org/abs/1607.06450), also after a residual."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.dropout import device_numbers, dropout, dropout_state
from fastbert.rng import DropoutState

Save = Literal["z", "y"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLS = 16384  # of the kernels, which hold a row in registers


@op("triton", dtypes=DTYPES)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    x: (..., H); weight, bias: (H,). The variance is the biased one. Computed in float32 or wider,
    returned in x.dtype, whatever autocast would do: the packed stream keeps its dtype.

    Raises ValueError for other shapes.
    """
    _check_vectors("layer_norm", x, weight=weight, bias=bias)
    return _normed(x, weight, bias, eps)


@layer_norm.refuses
def _refusal(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> str | None:
    return refusal(x, [], [weight, bias])


@layer_norm.fused
def _fused(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    _check_vectors("layer_norm", x, weight=weight, bias=bias)
    return _LayerNorm.apply(kernels, x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = as_rows(x)
        y, mean, rstd = kernels.layer_norm_fwd(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.kernels = kernels
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = ctx.kernels.layer_norm_bwd(as_rows(dy), rows, weight, mean, rstd)
        return None, dx.view(dy.shape), dweight, dbias, None


@op("triton", dtypes=DTYPES)
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    save: Save = "z",
) -> Tensor:
    """`layer_norm(residual + dropout(x + x_bias))`: the end of each half of a BERT layer.

    x, residual: (..., H); weight, bias, x_bias: (H,); the result has residual.dtype. x_bias is that
    of the linear layer before, whose gradient is then a by-product here. The sum is computed in
    float32 or wider and rounded to residual.dtype, which is kept for the backward; from there on
    as `layer_norm`. Dropout (Srivastava et al. 2014) is by counter, as `fastbert.rng` defines it:
    `rng` names the tokens, (rows,) keys of the flattened leading dimensions, and None takes fresh
    numbers from torch's generator.

    save: what the backward reads; the result is the same, but for the last bit on a GPU, where each
    is a kernel of its own. "z" keeps the sum for it. "y" keeps the result, as Apex's
    `memory_efficient=True` does, from which it rebuilds normalized values as `(y - bias) / weight`.
    The next linear layer keeps that tensor anyway, so it saves x.numel() elements. It is for
    weights that are at least 0.1 in size, as most trained ones are, but not all
    (of all-MiniLM-L6-v2's last layer, 3 of 384 are smaller): the division magnifies the rounding of
    y. Where all weights are 0.1, the RMS error of their gradient is up to 3.6 times plain
    PyTorch's; where they are normally distributed, up to 11 times. A weight of 0 leaves nothing to
    rebuild, and makes dx NaN. Nothing checks the weights, as that would make the host wait.

    Raises ValueError for other shapes, a dropout_p not in [0, 1), or another `save`.
    """
    rng = _check_sum(x, residual, weight, bias, x_bias, dropout_p, rng, save)
    dtype = residual.dtype
    if x.dtype != dtype or dtype not in _WIDE:
        x = x.to(torch.promote_types(dtype, torch.promote_types(x.dtype, torch.float32)))
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if rng is not None:
        x = dropout(x, dropout_p, rng)
    norm = _normed if save == "z" else _NormKeepingY.apply
    return norm((residual + x).to(dtype), weight, bias, eps)


_WIDE = (torch.float32, torch.float64)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` in float32 or wider, whatever autocast would do."""
    if x.dtype in _WIDE and x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


class _NormKeepingY(torch.autograd.Function):
    """The reference of layer_norm, but for what its backward reads."""

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)
        y, _, rstd = torch.native_layer_norm(
            z.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps
        )
        y = y.to(z.dtype)
        ctx.save_for_backward(y, weight, bias, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        kept, gamma, beta, rstd = ctx.saved_tensors
        dy, y, weight, bias = (t.to(rstd.dtype) for t in (dy, kept, gamma, beta))
        z_hat, dz_hat = (y - bias) / weight, dy * weight
        along_z = (dz_hat * z_hat).mean(-1, keepdim=True)
        dz = (dz_hat - dz_hat.mean(-1, keepdim=True) - z_hat * along_z) * rstd
        dgamma, dbeta = (dy * z_hat).sum_to_size(gamma.shape), dy.sum_to_size(beta.shape)
        return dz.to(kept.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None


@dropout_add_layer_norm.refuses
def _sum_refusal(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    save: Save = "z",
) -> str | None:
    vectors = [weight, bias] if x_bias is None else [weight, bias, x_bias]
    return refusal(x, [residual], vectors)


@dropout_add_layer_norm.fused
def _sum_fused(
    kernels: Any,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    save: Save = "z",
) -> Tensor:
    rng = _check_sum(x, residual, weight, bias, x_bias, dropout_p, rng, save)
    numbers = device_numbers(rng, dropout_p)
    inputs = (x, residual, x_bias, weight, bias)
    needs_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in inputs
    )
    if needs_backward:
        return _DropoutAddLayerNorm.apply(kernels, *inputs, eps, *numbers, save)
    y, *_ = kernels.dropout_add_layer_norm_fwd(
        as_rows(x), as_rows(residual), x_bias, weight, bias, eps, *numbers, keep_z=False
    )
    return y.view(x.shape)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernels, x: Tensor, residual: Tensor, x_bias: Tensor | None, weight: Tensor,
        bias: Tensor, eps: float, state: Tensor | None, token_key: Tensor | None, site: int,
        threshold: int, save: Save,
    ) -> Tensor:  # fmt: skip
        y, z, mean, rstd = kernels.dropout_add_layer_norm_fwd(
            as_rows(x), as_rows(residual), x_bias, weight, bias, eps,
            state, token_key, site, threshold, keep_z=save == "z",
        )  # fmt: skip
        y = y.view(x.shape)
        kept = (z, None, mean) if save == "z" else (y, bias, None)
        ctx.save_for_backward(weight, state, token_key, *kept, rstd)
        ctx.kernels, ctx.site, ctx.threshold = kernels, site, threshold
        ctx.x_dtype, ctx.has_x_bias = x.dtype, x_bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        weight, state, token_key, kept, bias, mean, rstd = ctx.saved_tensors
        dresidual, dx, dweight, dbias, dx_bias = ctx.kernels.dropout_add_layer_norm_bwd(
            as_rows(dy), as_rows(kept), weight, bias, mean, rstd,
            state, token_key, ctx.site, ctx.threshold, ctx.x_dtype, ctx.has_x_bias,
        )  # fmt: skip
        dresidual = dresidual.view(dy.shape)
        # Where both gradients are the same, the very same tensor goes to both, not a view of it:
        # autograd adds to a gradient in place, or makes it a leaf's .grad without a copy, only
        # while it holds the sole reference to that tensor.
        dx = dresidual if dx.ndim == 1 else dx.view(dy.shape)
        dx_bias = dx_bias if ctx.has_x_bias else None
        return None, dx, dresidual, dx_bias, dweight, dbias, *[None] * 6


def as_rows(x: Tensor) -> Tensor:
    """(..., H) -> (M, H) with unit column stride, a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def refusal(x: Tensor, others: list[Tensor], vectors: list[Tensor]) -> str | None:
    """Why the kernels cannot take x and `others` (..., H) with parameters `vectors` (H,)."""
    if not 1 <= x.shape[-1] <= MAX_COLS:
        return f"{x.shape[-1]} columns"
    if any(tensor.device != x.device for tensor in (*others, *vectors)):
        return "tensors on several devices"
    if unknown := [t.dtype for t in (*others, *vectors) if t.dtype not in DTYPES]:
        return str(unknown[0])
    if len({vector.dtype for vector in vectors}) > 1:
        return "parameters of several dtypes"
    if not all(vector.is_contiguous() for vector in vectors):
        return "parameters that are not contiguous"
    return None


def _check_vectors(who: str, x: Tensor, **vectors: Tensor) -> None:
    shape = x.shape[-1:]
    for name, vector in vectors.items():
        if vector.shape != shape:
            require(False, who, f"{name} of shape {tuple(shape)}", tuple(vector.shape))


def _check_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    rng: DropoutState | None,
    save: str,
) -> DropoutState | None:
    who = "dropout_add_layer_norm"
    require(save in ("z", "y"), who, 'a save of "z" or "y"', repr(save))
    shape = x.shape
    if residual.shape != shape:
        require(False, who, f"residual of shape {tuple(shape)}", tuple(residual.shape))
    _check_vectors(who, x, weight=weight, bias=bias)
    if x_bias is not None:
        _check_vectors(who, x, x_bias=x_bias)
    if dropout_p == 0:
        return None
    return dropout_state(who, shape[:-1].numel(), x.device, dropout_p, rng)
