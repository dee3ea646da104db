"""The gather of rows at the widths of hidden states, and of ids, for elements of each size."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compiling.cases import DTYPES, ROWS, SM90, Case, floats
from fastbert import backend
from fastbert.ops.gather_rows import gather_rows


def cases() -> Iterator[Case]:
    index = torch.zeros(ROWS, dtype=torch.int32)

    def call(src: Tensor) -> Tensor:
        with backend.use("triton"):  # instead of the extension
            return gather_rows(src, index, index)

    for columns in (1, 384, 768, 1024):
        for dtype in DTYPES:
            quick = (SM90,) * (columns == 768 and dtype == "bf16")
            yield Case(
                f"{columns} {dtype}", call, (floats(ROWS, columns, dtype=dtype),), quick=quick
            )
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    yield Case("ids", call, (ids,), trains=False)
