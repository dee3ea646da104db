"""Layer normalization (Ba et al. 2016, https://arxiv.org/abs/1607.06450), also with a residual."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import DTYPES, is_transformed, op, place
from fastbert.check import require, require_floats, require_rows, require_shape
from fastbert.ops.dropout import checked_rng, device_numbers, dropped
from fastbert.ops.fused import as_rows, once, run, shaped
from fastbert.rng import DropoutState

Save = Literal["z", "y"]

MAX_COLS = 16384  # a limit of the kernels, which hold a row in registers


class Norm(NamedTuple):
    """A call of `dropout_add_layer_norm`, or of `layer_norm` if the residual is None.

    rng: None without dropout. branches: whether to return the result twice, in x.dtype and in
    residual.dtype, so that the backward gets two gradients and adds them as it reads them; if both
    dtypes are the same, both results share one memory.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float = 1e-12
    x_bias: Tensor | None = None
    dropout_p: float = 0.0
    rng: DropoutState | None = None
    save: Save = "z"
    branches: bool = False


@op("triton")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Norm:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    x: (..., H); weight, bias: (H,). The variance is the biased one. Computed in float32 or wider,
    returned in x.dtype even under autocast, so that the residual stream keeps its dtype.

    Raises ValueError for other shapes, and for an x of integers.
    """
    require_rows("layer_norm", x, weight=weight, bias=bias)
    return Norm(x, None, weight, bias, eps)


@op("triton")
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
) -> Norm:
    """`layer_norm(residual + dropout(x + x_bias))`: the end of each half of a BERT layer.

    x, residual: (..., H); weight, bias, x_bias: (H,); the result has residual.dtype. x_bias is the
    bias of the preceding linear layer, added here so that its gradient is a by-product. The sum is
    computed in float32 or wider, rounded to residual.dtype, and normalized as in `layer_norm`.
    Dropout (Srivastava et al. 2014) is by counter, as `fastbert.rng` defines it: `rng` has a token
    key for each row of the flattened leading dimensions, and None draws a fresh state from torch's
    generator.

    save: what the forward saves for the backward; the result is the same, except for the last bit
    on a GPU, where each choice has its own kernel. "z" saves the rounded sum. "y" saves the result,
    as Apex's `memory_efficient=True` does, and the backward recovers the normalized values as
    `(y - bias) / weight`. The next linear layer saves y anyway, so "y" needs x.numel() elements
    less memory. It suits weights of absolute value 0.1 or more, because the division magnifies the
    rounding of y. Most trained weights are that large, but not all (in all-MiniLM-L6-v2's last
    layer, 3 of 384 are smaller). If all weights are 0.1, the RMS error of their gradient is up to
    3.6 times plain PyTorch's; if they are normally distributed, up to 11 times. A weight of 0 makes
    dx NaN. The weights are not checked, because that would make the host wait.

    Raises ValueError for other shapes, integers, a dropout_p outside [0, 4095/4096], or another
    `save`.
    """
    who = "dropout_add_layer_norm"
    require(save in ("z", "y"), who, 'a save of "z" or "y"', repr(save))
    require_rows(who, x, weight=weight, bias=bias, x_bias=x_bias)
    require_floats(who, residual=residual)
    require_shape(who, x.shape, residual=residual)
    rng = checked_rng(who, x.shape[:-1].numel(), x.device, dropout_p, rng)
    return Norm(x, residual, weight, bias, eps, x_bias, dropout_p, rng, save)


@layer_norm.plain
@dropout_add_layer_norm.plain
def _plain(call: Norm) -> Any:
    y = _plain_result(call)
    return (y.to(call.x.dtype), y) if call.branches else y


def _plain_result(call: Norm) -> Tensor:
    x, residual, weight, bias, eps, x_bias, dropout_p, rng, save, _ = call
    if residual is None:
        return plain_layer_norm(x, weight, bias, eps)
    dtype = residual.dtype
    if x.dtype != dtype or dtype not in _WIDE:
        x = x.to(torch.promote_types(dtype, torch.promote_types(x.dtype, torch.float32)))
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if rng is not None:
        x = dropped(x, dropout_p, rng)
    norm = plain_layer_norm if save == "z" or is_transformed() else _NormKeepingY.apply
    z = residual + x
    return norm(z if z.dtype == dtype else z.to(dtype), weight, bias, eps)


_WIDE = (torch.float32, torch.float64)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` in float32 or wider, even under autocast."""
    if x.dtype in _WIDE and x.dtype == weight.dtype == bias.dtype:
        return torch.layer_norm(x, weight.shape, weight, bias, eps)  # what `F.layer_norm` calls
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


class _NormKeepingY(torch.autograd.Function):
    """The reference for save="y": a layer norm whose backward reads y instead of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)
        y, _, rstd = torch.native_layer_norm(
            z.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps
        )
        if y.dtype != z.dtype:  # without the test, torch 2.11's torch.compile gets gradients wrong
            y = y.to(z.dtype)
        ctx.save_for_backward(y, weight, bias, rstd)
        return y

    @staticmethod
    @once('dropout_add_layer_norm(save="y")', 'use save="z"')
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, gamma, beta, rstd = ctx.saved_tensors
        dy, y, weight, bias = (t.to(rstd.dtype) for t in (dy, kept, gamma, beta))
        z_hat, dz_hat = (y - bias) / weight, dy * weight
        along_z = (dz_hat * z_hat).mean(-1, keepdim=True)
        dz = (dz_hat - dz_hat.mean(-1, keepdim=True) - z_hat * along_z) * rstd
        dgamma, dbeta = (dy * z_hat).sum_to_size(gamma.shape), dy.sum_to_size(beta.shape)
        return dz.to(kept.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None


@layer_norm.refuses
@dropout_add_layer_norm.refuses
def _refusal(call: Norm) -> str | None:
    x, residual, weight, bias, _, x_bias, *_ = call
    tensors = (x,) if residual is None else (x, residual)
    return refusal(tensors, (weight, bias) if x_bias is None else (weight, bias, x_bias))


def refusal(tensors: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot take `tensors` (..., H) with parameters `vectors` (H,)."""
    columns, device, dtype = tensors[0].shape[-1], place(tensors[0]), vectors[0].dtype
    if not 1 <= columns <= MAX_COLS:
        return f"{columns} columns"
    for x in tensors + vectors:
        if place(x) != device:
            return "tensors on several devices"
        if x.dtype not in DTYPES:
            return str(x.dtype)
    for vector in vectors:
        if vector.dtype != dtype:
            return "parameters of several dtypes"
        if not vector.is_contiguous():
            return "parameters that are not contiguous"
    return None


@layer_norm.fused
@dropout_add_layer_norm.fused
def _fused(kernels: Any, call: Norm) -> Any:
    if call.branches and torch.compiler.is_compiling():  # traced outputs may not be one tensor
        y = run(LayerNormFunction, kernels, call._replace(branches=False))
        return y.to(call.x.dtype), y
    return run(LayerNormFunction, kernels, call)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor,
        eps: float, x_bias: Tensor | None, dropout_p: float, rng: DropoutState | None, save: Save,
        branches: bool,
    ) -> Any:  # fmt: skip
        rows = as_rows(x)
        has_low = branches and residual is not None and residual.dtype != x.dtype
        y, *more = kernels.layer_norm_fwd(
            rows, None if residual is None else as_rows(residual), x_bias, weight, bias, eps,
            *(numbers := device_numbers(rng, dropout_p)), "" if ctx is None else save, has_low,
        )  # fmt: skip
        y = shaped(y, x.shape)
        low = shaped(more.pop(0), x.shape) if has_low else y
        if ctx is None:
            return (low, y) if branches else y
        rstd, *of_z = more
        state, token_key, *ctx.numbers = numbers
        if save == "y":
            ctx.save_for_backward(weight, state, token_key, rstd, y, bias, None)
        else:  # without a residual, z is x itself
            mean, z = of_z if residual is not None else (*of_z, rows)
            ctx.save_for_backward(weight, state, token_key, rstd, z, None, mean)
        ctx.kernels, ctx.x_dtype = kernels, x.dtype
        ctx.has_residual, needs = residual is not None, ctx.needs_input_grad
        are_trained = needs[3] or needs[4] or needs[6]
        ctx.num_sums = 2 + (x_bias is not None) if are_trained else 0
        if not branches:
            return y
        ctx.set_materialize_grads(False)  # the gradient of an unused branch is None
        return low, y if has_low else y.detach()

    @staticmethod
    @once("layer_norm")
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *rest = [g for g in gradients if g is not None]  # of one branch, or of both
        rows, others = as_rows(dy), as_rows(rest[0]) if rest else None
        if others is not None and others.stride() != rows.stride():
            rows, others = rows + others, None
        weight, state, token_key, rstd, kept, bias, mean = ctx.saved_tensors
        dz, dx, sums = ctx.kernels.layer_norm_bwd(
            rows, others, as_rows(kept), weight, bias, mean, rstd,
            state, token_key, *ctx.numbers, ctx.x_dtype, ctx.num_sums,
        )  # fmt: skip
        dz = shaped(dz, dy.shape)
        # Where dx equals dz, both gradients are the same tensor object, not views of it: autograd
        # adds to a gradient in place, or makes it a leaf's .grad without a copy, only while it
        # holds the sole reference to that tensor.
        dx = dz if dx.ndim == 1 else shaped(dx, dy.shape)
        dresidual = dz if ctx.has_residual else None
        dweight, dbias, dx_bias = (*sums.unbind(), None, None, None)[:3]
        return None, dx, dresidual, dweight, dbias, None, dx_bias, None, None, None, None
