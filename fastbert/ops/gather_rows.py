"""Gathers rows by an index with a known inverse, so that the gradient is a gather too."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.fused import run


class Gather(NamedTuple):
    """A call of `gather_rows`."""

    src: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not needed here
    inverse: Tensor


@op("ext", "triton")
def gather_rows(src: Tensor, index: Tensor, inverse: Tensor) -> Gather:
    """`out[i] = src[index[i]]`, and zeros where index[i] is -1.

    src: (R, H) of any dtype; index: (M,) int32 in [-1, R), which names no row twice; inverse: (R,)
    int32, the output row of each row of src: inverse[index[i]] == i, and -1 for rows that index
    leaves out. Returns (M, H) in src.dtype. The gradient is gather_rows(grad, inverse, index): each
    row is written once, without atomics, so it is deterministic. It can be differentiated again.

    Raises ValueError for a wrong shape, dtype or device. For an entry of index outside [-1, R) it
    raises IndexError on a CPU and fails a device assertion on a GPU; Triton's kernel, for which
    raising would make the host wait, returns a row of NaN, or of -1 for integers.
    """
    who = "gather_rows"
    require(src.ndim == 2, who, "src of shape (rows, hidden)", tuple(src.shape))
    is_index = index.ndim == 1 and index.dtype == torch.int32
    require(is_index, who, "index of shape (M,) and dtype int32", _described(index))
    is_inverse = inverse.shape == src.shape[:1] and inverse.dtype == torch.int32
    expected = f"inverse of shape (rows,) = ({src.shape[0]},) and dtype int32"
    require(is_inverse, who, expected, _described(inverse))
    are_there = index.device == src.device == inverse.device
    got = f"{index.device} and {inverse.device}"
    require(are_there, who, f"index and inverse on {src.device}", got)
    return Gather(src, index, inverse)


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


@gather_rows.plain
def _plain(call: Gather) -> Tensor:
    src, index, _ = call
    if src.shape[0] == 0:  # only -1 is in range: it reads a row of zeros that depends on src
        return src.sum(0, keepdim=True).to(src.dtype).index_select(0, index + 1)
    # autograd's own gradient is right: zero for rows left out, one row for each of the others
    is_spare = index == -1
    rows = src.index_select(0, index.masked_fill(is_spare, 0))
    return torch.where(is_spare[:, None], rows.new_zeros(()), rows)  # masked_fill lacks some dtypes


class GatherRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, src: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(index, inverse)
            ctx.kernels = kernels
        return kernels.gather_rows(src, index, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        return None, run(GatherRowsFunction, ctx.kernels, (dy, inverse, index)), None, None


gather_rows.fused(partial(run, GatherRowsFunction))


@gather_rows.traces
def _fake(src: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return src.new_empty((index.shape[0], src.shape[1]))
