"""The compaction of masks and of labels, in few blocks and in many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compiling.cases import SM90, Case
from fastbert import backend
from fastbert.ops.compact import compact


def cases() -> Iterator[Case]:
    def call(values: Tensor) -> Tensor:
        with backend.use("triton"):  # instead of the extension
            return compact(values, 0, 16).kept

    for rows in (8, 64):
        for dtype in (torch.bool, torch.int64):
            values = torch.zeros(rows, 512, dtype=dtype)
            quick = (SM90,) * (dtype == torch.bool)
            yield Case(f"{rows} x 512, {dtype}", call, (values,), trains=False, quick=quick)
