"""A linear layer and the cross-entropy of its outputs, without a float32 copy of the logits."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import DTYPES, op
from fastbert.check import require, require_floats, require_shape
from fastbert.ops.fused import joined, once, product, result_dtype, run

MAX_LOGITS_BYTES = 1 << 30  # larger logits are computed in parts, and again in the backward
PADDING = 64  # classes are padded to a multiple of it, for wide loads and the tensor cores


class LinearCrossEntropy(NamedTuple):
    """A call of `linear_cross_entropy`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    return_correct: bool = False


@op("triton")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_correct: bool = False,
) -> LinearCrossEntropy:
    """Cross-entropy of `hidden @ weight.T + bias`, averaged or summed over rows with a target.

    hidden: (C, H); weight: (V, H); bias: (V,) or None; targets: (C,) int64, a class, or
    ignore_index for rows without a target; label_smoothing: as in `F.cross_entropy` (Szegedy et
    al. 2015); reduction: "mean", which is 0 with zero gradients if no row has a target, or "sum".
    Returns the loss, () in float32 or wider, and for return_correct=True also the number of rows
    whose target has the highest logit (the first of equal ones), () int64 without a gradient.

    The product is in hidden.dtype or autocast's dtype, the softmax in float32 or wider. A target
    out of range raises an IndexError on a CPU; the kernels, which cannot raise, make the loss NaN.
    The kernels keep the logits in the product's dtype, and the backward overwrites them; a second
    backward through the same graph computes them again. Raises ValueError for other shapes, targets
    of another dtype, a label_smoothing outside [0, 1], or another reduction.
    """
    who = "linear_cross_entropy"
    require_floats(who, hidden=hidden)
    require(hidden.ndim == 2, who, "hidden of shape (rows, hidden)", tuple(hidden.shape))
    size = hidden.shape[1]
    is_weight = weight.ndim == 2 and weight.shape[1] == size and weight.shape[0] > 0
    require(is_weight, who, f"weight of shape (classes, {size})", tuple(weight.shape))
    require_shape(who, weight.shape[:1], bias=bias)
    require_shape(who, hidden.shape[:1], targets=targets)
    require(targets.dtype == torch.int64, who, "targets of dtype int64", targets.dtype)
    require(0 <= label_smoothing <= 1, who, "label_smoothing from 0 to 1", label_smoothing)
    require(reduction in ("mean", "sum"), who, 'reduction "mean" or "sum"', reduction)
    options = (ignore_index, float(label_smoothing), reduction, return_correct)
    return LinearCrossEntropy(hidden, weight, bias, targets, *options)


@linear_cross_entropy.plain
def _plain(call: LinearCrossEntropy) -> Tensor | tuple[Tensor, Tensor]:
    hidden, weight, bias, targets, ignore_index, label_smoothing, reduction, wants_correct = call
    dtype = hidden.dtype
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    is_counted = targets != ignore_index
    loss = F.cross_entropy(
        logits.to(torch.promote_types(dtype, torch.float32)),
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if reduction == "mean":
        loss = loss / is_counted.sum().clamp(min=1)
    if not wants_correct:
        return loss
    return loss, ((logits.detach().argmax(-1) == targets) & is_counted).sum()


@linear_cross_entropy.refuses
def _refusal(call: LinearCrossEntropy) -> str | None:
    hidden = call.hidden
    if hidden.dtype not in DTYPES:
        return str(hidden.dtype)
    for name, tensor in (("weight", call.weight), ("bias", call.bias), ("targets", call.targets)):
        if tensor is not None and tensor.device != hidden.device:
            return f"hidden on {hidden.device} and {name} on {tensor.device}"
    for name, tensor in (("weight", call.weight), ("bias", call.bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"a {name} of {tensor.dtype}"
    return None


@linear_cross_entropy.fused
def _fused(kernels: Any, call: LinearCrossEntropy) -> Tensor | tuple[Tensor, Tensor]:
    call = call._replace(hidden=call.hidden.to(result_dtype(call.hidden)))
    loss, correct = run(LinearCrossEntropyFunction, kernels, call)
    return (loss, correct) if call.return_correct else loss


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, targets, ignore_index, label_smoothing, reduction, _ = fields
        options = weight.shape[0], ignore_index, label_smoothing
        dtypes = weight.dtype, None if bias is None else bias.dtype
        weight = _padded(weight, hidden.dtype)
        # the product's epilogue adds the bias for free; else both kernels would have to read it
        bias = None if bias is None else _padded(bias, hidden.dtype)
        rows = _rows_of_a_part(hidden, weight)
        parts = []
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = None  # frees the previous part's logits before the next are computed
            logits = _scores(some, weight, bias)
            parts.append(
                kernels.cross_entropy_fwd(logits, wanted.contiguous(), *options, ctx is not None)
            )
        losses, correct, *statistics = map(joined, zip(*parts, strict=True))
        loss, count = losses.sum(), None
        if reduction == "mean":
            count = (targets != ignore_index).sum().clamp(min=1)
            loss = loss / count
        correct = correct.sum()
        if ctx is None:
            return loss, correct
        ctx.kernels, ctx.options, ctx.dtypes, ctx.rows = kernels, options, dtypes, rows
        is_whole = len(parts) == 1
        ctx.has_logits, ctx.sum_dtype = is_whole, dtypes[0] if is_whole else torch.float32
        logits = logits if is_whole else None
        ctx.save_for_backward(hidden, weight, bias, targets, *statistics, count, logits)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        has_logits, ctx.has_logits = ctx.has_logits, False  # this backward overwrites them
        hidden, weight, bias, targets, highest, total, count, logits = ctx.saved_tensors
        scale = dloss if count is None else dloss / count
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[1:4]
        weight_dtype, bias_dtype = ctx.dtypes
        dhidden: list[Tensor] = []
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            by_row = (tensor.split(ctx.rows) for tensor in (hidden, targets, highest, total))
            for some, wanted, *statistics in zip(*by_row, strict=True):
                if not has_logits:
                    logits = None
                    logits = _scores(some, weight, bias)
                column_sums = ctx.kernels.cross_entropy_bwd(
                    logits, wanted.contiguous(), *statistics, scale, *ctx.options
                )
                if wants_hidden:
                    dhidden.append(logits @ weight)
                if wants_weight:
                    dweight = _plus(dweight, product(logits.t(), some, ctx.sum_dtype))
                if wants_bias:
                    dbias = _plus(dbias, column_sums)
        classes = ctx.options[0]
        return (
            None,
            joined(dhidden) if wants_hidden else None,
            None if dweight is None else dweight[:classes].to(weight_dtype),
            None if dbias is None else dbias[:classes].to(bias_dtype),
            *(None,) * 5,
        )


def _padded(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, ...) in `dtype`, with zeros up to a multiple of PADDING rows, in at most one copy."""
    classes = parameter.shape[0]
    if classes % PADDING == 0:
        return parameter.detach().to(dtype)
    shape = (-(-classes // PADDING) * PADDING, *parameter.shape[1:])
    padded = parameter.new_zeros(shape, dtype=dtype)
    padded[:classes] = parameter
    return padded


def _rows_of_a_part(hidden: Tensor, weight: Tensor) -> int:
    """Rows per part, for the fewest parts of nearly equal size within MAX_LOGITS_BYTES."""
    most = max(MAX_LOGITS_BYTES // (weight.shape[0] * weight.element_size()), 1)
    parts = max(-(-hidden.shape[0] // most), 1)
    return max(-(-hidden.shape[0] // parts), 1)


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
