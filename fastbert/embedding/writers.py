"""Shards on disk: .npy and Parquet, written block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data.formats.texts import pyarrow_of

Write = Callable[[NDArray[np.float32]], object]  # takes the next rows, (n, width)


@contextmanager
def _npy(path: Path, rows: range, width: int) -> Iterator[Write]:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(rows), width)}
        )
        yield lambda block: file.write(np.ascontiguousarray(block, "<f4").data)


@contextmanager
def _parquet(path: Path, rows: range, width: int) -> Iterator[Write]:
    arrow = pyarrow_of("--format parquet")
    fields = {"row": arrow.int64(), "embedding": arrow.list_(arrow.float32(), width)}
    schema = arrow.schema(list(fields.items()))
    begin = rows.start
    with arrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:

        def write(block: NDArray[np.float32]) -> None:
            nonlocal begin
            numbers = arrow.array(np.arange(begin, begin + len(block)))
            flat = arrow.array(np.ascontiguousarray(block).ravel())
            embeddings = arrow.FixedSizeListArray.from_arrays(flat, width)
            writer.write_table(arrow.table([numbers, embeddings], schema=schema))
            begin += len(block)

        yield write


# Each opens a shard for the input's rows `rows` and vectors of this width, and yields a function to
# which the block passes the vectors, in order.
WRITERS = {"npy": _npy, "parquet": _parquet}


def holds(path: Path, rows: int, width: int) -> bool:
    """Whether the shard exists and has this many rows and, as .npy, this width."""
    try:
        if path.suffix == ".npy":
            found: NDArray[Any] = np.load(path, mmap_mode="r")
            return found.shape == (rows, width)
        metadata = pyarrow_of("--format parquet").parquet.read_metadata(path)
        count: int = metadata.num_rows
        return count == rows
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors too
        return False
