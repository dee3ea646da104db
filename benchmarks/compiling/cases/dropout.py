"""Dropout alone, at the widths of hidden states."""

from collections.abc import Iterator

import torch

from benchmarks.compiling.cases import DTYPES, ROWS, SM90, Case, floats
from fastbert import rng
from fastbert.ops.dropout import dropout


def cases() -> Iterator[Case]:
    state = rng.fresh(ROWS, torch.device("cpu"))
    for columns in (384, 768, 1024):
        for dtype in DTYPES:
            quick = (SM90,) * (columns == 768 and dtype == "bf16")
            yield Case(
                f"{columns} {dtype}",
                lambda x: dropout(x, 0.1, state),
                (floats(ROWS, columns, dtype=dtype),),
                quick=quick,
            )
