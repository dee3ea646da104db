"""The partial sums of a layer's backward, added up in one launch."""

from collections.abc import Iterator

from torch import Tensor

from benchmarks.compiling.cases import CAPABILITIES, ROWS, Case, floats
from fastbert.kernels.partial_sums import add_partials, together


def cases() -> Iterator[Case]:
    for hidden in (768, 1024):

        def call(*partials: Tensor, hidden: int = hidden) -> Tensor:
            rows = 3, 1, 3, 3
            sums = [floats(k, one.shape[2]) for k, one in zip(rows, partials, strict=True)]
            with together():
                for one, own in zip(partials, sums, strict=True):
                    add_partials(one, own)
            return sums[0]

        norm, gelu, qkv = (
            floats(3, ROWS, hidden),
            floats(1, ROWS, 4 * hidden),
            floats(2, ROWS, hidden),
        )
        quick = CAPABILITIES * (hidden == 1024)
        yield Case(f"{hidden} a layer's", call, (norm, gelu, norm, qkv), trains=False, quick=quick)
