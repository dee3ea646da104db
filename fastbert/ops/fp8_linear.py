"""A linear layer whose three products are in FP8 (Micikevicius et al. 2022, arXiv:2209.05433)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import DTYPES, op
from fastbert.check import require
from fastbert.ops.fused import as_rows, once, run

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
MULTIPLE = 16  # which the kernels want a weight's sizes to be multiples of


class Call(NamedTuple):
    """A call of `fp8_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    amax: Tensor
    dtype: torch.dtype


@op("triton")
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, amax: Tensor) -> Call:
    """`x @ weight.T + bias`, all of whose products, in the backward too, are of FP8 casts.

    x: (..., K); weight: (N, K); bias: (N,) or None; scale: (3,) float32, powers of two by which x,
    the weight and the gradient of the result are multiplied before their casts; amax: (3,) float32,
    which is raised to the largest absolute values of these three (of the third in the backward).
    Returns (..., N) in autocast's dtype, or x.dtype without autocast.

    x and the weight are cast to E4M3, the gradient of the result to E5M2, to the nearest value,
    ties to even. Values beyond a format saturate; values that are not finite become NaN, so that a
    step with infinite gradients is still seen. Products are summed in float32, gradients are in the
    dtypes of x and of the weight, and the bias's is summed from the gradient before its cast.

    The plain body emulates the casts exactly; the kernels need compute capability 8.9, and K and N
    that are multiples of 16. Raises ValueError for other shapes and dtypes of scale and amax.
    """
    who = "fp8_linear"
    size = x.shape[-1:].numel() if x.ndim else 0
    is_matrix = weight.ndim == 2 and x.ndim > 0 and weight.shape[1] == size
    require(is_matrix, who, f"weight of shape (outputs, {size})", tuple(weight.shape))
    if bias is not None:
        require(bias.shape == weight.shape[:1], who, "bias of shape (outputs,)", tuple(bias.shape))
    for name, three in (("scale", scale), ("amax", amax)):
        is_three = three.shape == (3,) and three.dtype == torch.float32
        require(is_three, who, f"{name} of 3 float32", f"{three.dtype} {tuple(three.shape)}")
    return Call(x, weight, bias, scale, amax, result_dtype(x))


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product of x: autocast's, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 products: GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@fp8_linear.plain
def _plain(call: Call) -> Tensor:
    return run(_Fp8Linear, Emulation, call)


@fp8_linear.refuses
def _refusal(call: Call) -> str | None:
    x, weight, bias, scale, amax, dtype = call
    tensors = [t for t in (x, weight, bias, scale, amax) if t is not None]
    if any(t.device != x.device for t in tensors):
        return "tensors on several devices"
    for name, found in (("", x.dtype), ("weight of ", weight.dtype), ("result of ", dtype)):
        if found not in DTYPES:
            return f"{name}{found}"
    if any(size % MULTIPLE for size in weight.shape) or not weight.numel():
        return f"a weight of {tuple(weight.shape)}, whose sizes are not multiples of 16"
    if x.is_cuda and not multiplies_fp8(x.device):
        return "a GPU that does not multiply FP8"
    return None


@fp8_linear.fused
def _fused(kernels: Any, call: Call) -> Tensor:
    return run(_Fp8Linear, kernels, call)


class Emulation:
    """The launchers of kernels/fp8_linear.py in plain PyTorch, for any device and size."""

    @staticmethod
    def cast_transpose(x: Tensor, scale: Tensor, amax: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
        """x (M, N) times `scale` in FP8, (M, N), and transposed; raises amax to x's largest."""
        cast = quantised(x, scale, E5M2 if e5m2 else E4M3)
        if x.numel():
            size = x.detach().abs().float()
            finite = torch.where(size.isfinite(), size, 0.0)
            torch.maximum(amax, finite.max(), out=amax)
        return cast, cast.t()

    @staticmethod
    def product(
        a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """a (M, K) b (N, K)^T times both factors, plus the bias, summed in float32."""
        y = F.linear(a.float(), b.float()) * (of_a * of_b)
        return (y if bias is None else y + bias.float()).to(dtype)


def quantised(x: Tensor, scale: Tensor, format: torch.dtype) -> Tensor:
    """x times `scale` in an FP8 format: to the nearest value, ties to even.

    Values beyond the format saturate; values that are not finite become NaN.
    """
    largest = LARGEST[format]
    y = x.float() * scale
    return torch.where(x.isfinite(), y.clamp(-largest, largest), torch.nan).to(format)


class _Fp8Linear(torch.autograd.Function):
    """`kernels` is the Triton unit, or `Emulation`."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor,
        amax: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows = as_rows(x)
        of = scale.reciprocal()  # exact, as scales are powers of two
        with torch.autocast(x.device.type, enabled=False):
            x8, x8_t = kernels.cast_transpose(rows, scale[0], amax[0], False)
            w8, w8_t = kernels.cast_transpose(weight.contiguous(), scale[1], amax[1], False)
            y = kernels.product(
                x8, w8, of[0], of[1], None if bias is None else bias.to(dtype), dtype
            )
        y = y[: len(rows)].view(*x.shape[:-1], weight.shape[0])
        if ctx is None:
            return y
        ctx.save_for_backward(x8_t, w8_t, scale, of)
        ctx.amax = amax  # which the backward writes to and does not read
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
        return None, dx, dweight, dbias, None, None, None
