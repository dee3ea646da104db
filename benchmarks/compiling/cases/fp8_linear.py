"""Casts to FP8 for the linear layers of BERT-base and BERT-large: inputs, weights, gradients."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compiling.cases import ROWS, SM90, Case, floats
from fastbert.ops.fp8_linear import fp8_feed_forward, fp8_linear


def cases() -> Iterator[Case]:
    for columns, dtype in ((768, "bf16"), (1024, "bf16"), (4096, "bf16"), (768, "fp32")):
        # as under autocast: weights and their gradients are in float32
        yield Case(
            f"{columns} {dtype}",
            functools.partial(_product, scale=floats(3), amax=floats(3)),
            (floats(ROWS, columns, dtype=dtype), floats(ROWS, columns)),
            quick=(SM90,) * (columns == 1024),
            since=SM90,
        )
    for columns in (768, 1024):
        for dtype, approximate in (("bf16", "none"), ("bf16", "tanh"), ("fp32", "none")):
            yield Case(
                f"{columns} {dtype} GELU {approximate}",
                functools.partial(_feed_forward, approximate=approximate),
                (
                    floats(ROWS, columns, dtype=dtype),
                    floats(4 * columns, columns),
                    floats(4 * columns),
                    floats(columns, 4 * columns),
                ),
                quick=(SM90,) * (columns == 1024 and dtype == "bf16" and approximate == "none"),
                since=SM90,
            )


def _product(x: Tensor, weight: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    return fp8_linear(x, weight, None, scale, amax)


def _feed_forward(
    x: Tensor, weight: Tensor, bias: Tensor, output_weight: Tensor, approximate: str
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return fp8_feed_forward(
            x, weight, bias, output_weight, *(floats(3) for _ in range(4)), approximate=approximate
        )
