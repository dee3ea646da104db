"""Linear layers whose products are in FP8 (Micikevicius et al. 2022, arXiv:2209.05433).

One layer alone, and the two of a feed-forward, with a GELU between them that casts its results.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.backend import DTYPES, is_transformed, op
from fastbert.check import require, require_floats, require_shape
from fastbert.ops import fp8_plain
from fastbert.ops.fused import as_rows, once, result_dtype, run, without_autocast

MULTIPLE = 16  # the kernels need a weight's sizes to be multiples of it


class Fp8Linear(NamedTuple):
    """A call of `fp8_linear`; inverse: (3,), `inverse_of` the scale."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    inverse: Tensor
    amax: Tensor
    dtype: torch.dtype


class Fp8FeedForward(NamedTuple):
    """A call of `fp8_feed_forward`, with the inverses of both scales."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    output_weight: Tensor
    scale: Tensor
    inverse: Tensor
    amax: Tensor
    output_scale: Tensor
    output_inverse: Tensor
    output_amax: Tensor
    approximate: str
    dtype: torch.dtype


@op("triton")
def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, amax: Tensor
) -> Fp8Linear:
    """`x @ weight.T + bias`, whose products, including the backward's, multiply casts to FP8.

    x: (..., K); weight: (N, K); bias: (N,) or None; scale: (3,) float32, powers of two by which x,
    the weight and the gradient of the result are multiplied before their casts; amax: (3,) float32,
    the largest absolute values of these three so far: the forward updates the first two, the
    backward the third. Returns (..., N) in autocast's dtype, or x.dtype without autocast.

    x and the weight are cast to E4M3, the gradient of the result to E5M2, to the nearest value,
    ties to even. Values beyond a format saturate; values that are not finite become NaN, so that
    infinite gradients are still noticed. Products are summed in float32. Gradients have the dtypes
    of x and of the weight; the bias's is summed from the result's gradient before its cast.

    The plain body emulates the casts exactly; the kernels need compute capability 8.9, and K and N
    that are multiples of 16. Raises ValueError for other shapes and dtypes of scale and amax.
    """
    who = "fp8_linear"
    _check_layer(who, x, weight, bias, "outputs")
    _check_threes(who, scale=scale, amax=amax)
    return Fp8Linear(x, weight, bias, scale, inverse_of(scale), amax, result_dtype(x))


@op("triton")
def fp8_feed_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    output_weight: Tensor,
    scale: Tensor,
    amax: Tensor,
    output_scale: Tensor,
    output_amax: Tensor,
    *,
    approximate: str = "none",
) -> Fp8FeedForward:
    """`gelu(x @ weight.T + bias) @ output_weight.T`, whose products multiply casts to FP8.

    x: (..., K); weight: (N, K); bias: (N,); output_weight: (O, N); approximate: as in `bias_gelu`.
    Returns (..., O) in autocast's dtype, or x.dtype without autocast. scale and amax belong to the
    first layer, output_scale and output_amax to the second; they, the casts and the gradients are
    as in `fp8_linear`. GELU is computed in float32 from the first product, which has the result's
    dtype, and then cast directly; so is its gradient. Both are in memory only in FP8, which in bf16
    saves writing and reading 8 bytes per element.

    The kernels need the same as for `fp8_linear`. Raises ValueError for other shapes and dtypes.
    """
    who = "fp8_feed_forward"
    _check_layer(who, x, weight, bias, "inner")
    inner = weight.shape[:1]
    is_matrix = output_weight.ndim == 2 and output_weight.shape[1:] == inner
    expected = f"output_weight of shape (outputs, {inner[0]})"
    require(is_matrix, who, expected, tuple(output_weight.shape))
    require(approximate in ("none", "tanh"), who, 'approximate "none" or "tanh"', approximate)
    _check_threes(who, scale=scale, amax=amax, output_scale=output_scale, output_amax=output_amax)
    first = scale, inverse_of(scale), amax
    second = output_scale, inverse_of(output_scale), output_amax
    tensors = x, weight, bias, output_weight
    return Fp8FeedForward(*tensors, *first, *second, approximate, result_dtype(x))


def inverse_of(scale: Tensor) -> Tensor:
    """One over each scale, exact for powers of two; the address of each is a multiple of 16.

    From version 12.9 on cuBLAS refuses other addresses (CUBLAS_STATUS_NOT_SUPPORTED).
    """
    return scale.reciprocal()[..., None].expand(*scale.shape, 4).contiguous()[..., 0]


def _check_layer(who: str, x: Tensor, weight: Tensor, bias: Tensor | None, rows: str) -> None:
    require_floats(who, x=x)
    size = x.shape[-1] if x.ndim else 0
    is_matrix = x.ndim > 0 and weight.ndim == 2 and weight.shape[1] == size
    require(is_matrix, who, f"weight of shape ({rows}, {size})", tuple(weight.shape))
    require_shape(who, weight.shape[:1], bias=bias)


def _check_threes(who: str, **tensors: Tensor) -> None:
    for name, three in tensors.items():
        is_three = three.shape == (3,) and three.dtype == torch.float32
        require(is_three, who, f"{name} of 3 float32", f"{three.dtype} {tuple(three.shape)}")


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 products: GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@fp8_linear.plain
@fp8_feed_forward.plain
def _plain(call: Fp8Linear | Fp8FeedForward) -> Tensor:
    if is_transformed():  # a tangent would need a cast too, and has no scale
        raise RuntimeError(
            "fp8: function transforms (torch.func) and forward-mode AD do not go through casts to "
            "FP8; use torch.autograd, or turn FP8 off"
        )
    return _fused(fp8_plain, call)


@fp8_linear.refuses
@fp8_feed_forward.refuses
def _refusal(call: Fp8Linear | Fp8FeedForward) -> str | None:
    x = call.x
    if any(isinstance(t, Tensor) and t.device != x.device for t in call):
        return "tensors on several devices"
    weights = [call.weight] if isinstance(call, Fp8Linear) else [call.weight, call.output_weight]
    for name, found in (
        ("", x.dtype),
        *(("weight of ", weight.dtype) for weight in weights),
        ("result of ", call.dtype),
    ):
        if found not in DTYPES:
            return f"{name}{found}"
    for weight in weights:
        if any(size % MULTIPLE for size in weight.shape) or not weight.numel():
            return f"a weight of {tuple(weight.shape)}, whose sizes are not multiples of 16"
    if x.is_cuda and not multiplies_fp8(x.device):
        return "a GPU that does not multiply FP8"
    return None


@fp8_linear.fused
@fp8_feed_forward.fused
def _fused(kernels: Any, call: Fp8Linear | Fp8FeedForward) -> Tensor:
    function = Fp8LinearFunction if isinstance(call, Fp8Linear) else Fp8FeedForwardFunction
    return run(function, kernels, call)


def _result(y: Tensor, x: Tensor) -> Tensor:
    """y (P, N) as (..., N), without filler rows; for autograd no view, as users may change it."""
    shape = x.shape[:-1]
    result: Tensor = torch.ops.aten._unsafe_view.default(y[: shape.numel()], (*shape, y.shape[1]))
    return result


class Fp8LinearFunction(torch.autograd.Function):
    """`kernels` is the module of Triton launchers, or `fp8_plain`."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor,
        of: Tensor, amax: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows = as_rows(x)
        with without_autocast(x):
            x8, x8_t = kernels.cast_transpose(rows, scale[0], amax[0], False)
            w8, w8_t = kernels.cast_transpose(weight.contiguous(), scale[1], amax[1], False)
            y = kernels.product(
                x8, w8, of[0], of[1], None if bias is None else bias.to(dtype), dtype
            )
        y = _result(y, x)
        if ctx is None:
            return y
        ctx.save_for_backward(x8_t, w8_t, scale, of)
        ctx.amax = amax  # the backward writes to it and does not read it
        ctx.kernels, ctx.bias_dtype = kernels, None if bias is None else bias.dtype
        ctx.dtypes = x.dtype, weight.dtype
        return y

    @staticmethod
    @once("fp8_linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, w8_t, scale, of = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        rows = as_rows(dy)
        dx = dweight = dbias = None
        dy8, dy8_t = ctx.kernels.cast_transpose(rows, scale[2], ctx.amax[2], True)
        if needs_x:
            dx = ctx.kernels.product(dy8, w8_t, of[2], of[1], None, ctx.dtypes[0])
            dx = dx[: len(rows)].view(*dy.shape[:-1], w8_t.shape[0])
        if needs_weight:
            dweight = ctx.kernels.product(dy8_t, x8_t, of[2], of[0], None, ctx.dtypes[1])
        if needs_bias:
            dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return None, dx, dweight, dbias, *[None] * 4


class Fp8FeedForwardFunction(torch.autograd.Function):
    """`kernels` is the module of Triton launchers, or `fp8_plain`."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, weight: Tensor, bias: Tensor, output_weight: Tensor,
        scale: Tensor, of: Tensor, amax: Tensor, output_scale: Tensor, output_of: Tensor,
        output_amax: Tensor, approximate: str, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows, bias, tanh = as_rows(x), bias.contiguous(), approximate == "tanh"
        n = len(rows)
        with without_autocast(x):
            x8, x8_t = kernels.cast_transpose(rows, scale[0], amax[0], False)
            w8, w8_t = kernels.cast_transpose(weight.contiguous(), scale[1], amax[1], False)
            inner = kernels.product(x8, w8, of[0], of[1], None, dtype)[:n]
            g8, g8_t = kernels.gelu_cast_transpose(
                inner, bias, tanh, output_scale[0], output_amax[0]
            )
            v8, v8_t = kernels.cast_transpose(
                output_weight.contiguous(), output_scale[1], output_amax[1], False
            )
            y = kernels.product(g8, v8, output_of[0], output_of[1], None, dtype)
        y = _result(y, x)
        if ctx is None:
            return y
        ctx.save_for_backward(
            x8_t, w8_t, inner, bias, g8_t, v8_t, scale, of, output_scale, output_of
        )
        ctx.amax, ctx.output_amax = amax, output_amax  # the backward writes to them
        ctx.kernels, ctx.tanh = kernels, tanh
        ctx.dtypes = x.dtype, weight.dtype, output_weight.dtype
        return y

    @staticmethod
    @once("fp8_feed_forward")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, w8_t, inner, bias, g8_t, v8_t, scale, of, output_scale, output_of = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_output = ctx.needs_input_grad[1:5]
        x_dtype, weight_dtype, output_dtype = ctx.dtypes
        kernels, rows = ctx.kernels, as_rows(dy)
        n = len(rows)
        dx = dweight = dbias = doutput = None
        dy8, dy8_t = kernels.cast_transpose(rows, output_scale[2], ctx.output_amax[2], True)
        if needs_output:
            doutput = kernels.product(dy8_t, g8_t, output_of[2], output_of[0], None, output_dtype)
        if needs_x or needs_weight or needs_bias:
            dg = kernels.product(dy8, v8_t, output_of[2], output_of[1], None, inner.dtype)[:n]
            dh8, dh8_t, dbias = kernels.gelu_bwd_cast_transpose(
                dg, inner, bias, ctx.tanh, scale[2], ctx.amax[2]
            )
        if needs_x:
            dx = kernels.product(dh8, w8_t, of[2], of[1], None, x_dtype)[:n]
            dx = dx.view(*dy.shape[:-1], w8_t.shape[0])
        if needs_weight:
            dweight = kernels.product(dh8_t, x8_t, of[2], of[0], None, weight_dtype)
        return None, dx, dweight, dbias, doutput, *[None] * 8
