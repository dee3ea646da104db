"""The embeddings at the sizes of BERT-base, BERT-large and a small model."""

import functools
from collections.abc import Iterator

from benchmarks.compiling.cases import DTYPES, ROWS, SM90, Case, dropout_of, floats, ids
from fastbert.ops.embedding import embedding_layer_norm


def cases() -> Iterator[Case]:
    """Training under autocast, with float32 tables; also with everything in one dtype."""
    for columns, dtype, of_tables in (
        *((columns, "bf16", "fp32") for columns in (384, 768, 1024)),
        *((768, dtype, dtype) for dtype in DTYPES),
    ):
        label = f"{columns} {dtype}, tables {of_tables}"
        tables = (floats(ROWS, columns, dtype=of_tables) for _ in range(3))
        vectors = (floats(columns, dtype=of_tables) for _ in range(2))
        tensors = (*tables, *vectors)
        call = functools.partial(embedding_layer_norm, ids(), ids(), ids(), dtype=DTYPES[dtype])
        quick = (SM90,) * (label == "768 bf16, tables fp32")
        yield Case(label, functools.partial(call, **dropout_of(0.1)), tensors, quick=quick)
        yield Case(f"{label}, inference", call, tensors, trains=False)
