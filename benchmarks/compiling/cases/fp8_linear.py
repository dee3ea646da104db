"""Casts to FP8 for the linear layers of BERT-base and BERT-large: inputs, weights, gradients."""

import functools
from collections.abc import Iterator

from torch import Tensor

from benchmarks.compiling.cases import ROWS, SM90, Case, floats
from fastbert.ops.fp8_linear import fp8_linear


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


def _product(x: Tensor, weight: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    return fp8_linear(x, weight, None, scale, amax)
