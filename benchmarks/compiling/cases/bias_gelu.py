"""Bias and GELU at the widths of the feed-forward layers of BERT-base and BERT-large."""

import functools
from collections.abc import Iterator

from benchmarks.compiling.cases import CAPABILITIES, ROWS, Case, floats
from fastbert.ops.bias_gelu import bias_gelu


def cases() -> Iterator[Case]:
    for columns, dtype, approximate in (
        (3072, "bf16", "none"),
        (4096, "bf16", "none"),
        (4096, "bf16", "tanh"),
        (3072, "fp16", "none"),
        (3072, "fp32", "none"),
        (3072, "fp32", "tanh"),
    ):
        # activations in `dtype`, the bias a float32 parameter as under autocast
        yield Case(
            f"{columns} {dtype}{' tanh' * (approximate == 'tanh')}",
            functools.partial(bias_gelu, approximate=approximate),
            (floats(ROWS, columns, dtype=dtype), floats(columns)),
            quick=CAPABILITIES * ((columns, dtype, approximate) == (4096, "bf16", "none")),
        )
    frozen = floats(4096)
    yield Case(
        "4096 bf16 frozen", lambda x: bias_gelu(x, frozen), (floats(ROWS, 4096, dtype="bf16"),)
    )
