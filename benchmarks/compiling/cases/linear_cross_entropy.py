"""Cross-entropy over BERT's vocabulary, padded from 30,522 to 30,528 columns."""

import functools
from collections.abc import Iterator

from benchmarks.compiling.cases import CAPABILITIES, DTYPES, ROWS, Case, floats, ids
from fastbert.ops.linear_cross_entropy import linear_cross_entropy

CLASSES, HIDDEN = 30522, 16  # hidden is small, because the product is not our kernel


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        # the weight and bias are float32 parameters, as under autocast
        tensors = floats(ROWS, HIDDEN, dtype=dtype), floats(CLASSES, HIDDEN), floats(CLASSES)
        for label, smoothing, trains in (
            (dtype, 0.0, True),
            (f"{dtype} smoothed", 0.1, True),
            (f"{dtype} inference", 0.0, False),
        ):
            call = functools.partial(linear_cross_entropy, targets=ids(), label_smoothing=smoothing)
            yield Case(label, call, tensors, trains, CAPABILITIES * (label == "bf16"))
