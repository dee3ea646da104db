"""The tables of block shapes that `tune` sweeps, and the entries that it tries in each."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of block shapes, and the entries to try instead.

    unit, name: the attribute of a module of fastbert.kernels; backward: whether it is for the
    backward; candidates: returns the entries to try for a row width; where: text in the labels of
    the workloads that use the table, because short and long sequences have different kernels.
    """

    unit: str
    name: str
    backward: bool
    candidates: Callable[[int], Iterable[Any]]
    where: str = ""


def whole_rows(columns: int) -> Iterator[tuple[int, int, int]]:
    """Rows, columns as a power of 2, and warps, each with 128 to 2048 elements."""
    block_n = 1 << (columns - 1).bit_length()
    for block_m, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if 128 <= block_m * block_n // warps <= 2048:
            yield block_m, block_n, warps


def sum_rows(columns: int) -> Iterator[tuple[int, int]]:
    yield from ((block_n, warps) for block_m, block_n, warps in whole_rows(columns) if block_m == 1)


def casts(columns: int) -> Iterator[tuple[int, ...]]:
    """Candidates for the kernels that cast to FP8."""
    return itertools.product((64, 128, 256), (32, 64, 128), (4, 8))


def grid(*choices: Iterable[int]) -> Callable[[int], Iterator[tuple[int, ...]]]:
    """All combinations as candidates, for any row width."""
    return lambda columns: itertools.product(*choices)


def stages(columns: int) -> Iterator[int]:
    """Candidates for loops without a matrix product, which Triton pipelines only on request."""
    yield from (1, 2, 3, 4)


def tiles(columns: int) -> Iterator[Any]:
    """Also varies the stages, because Triton pipelines loops with a matrix product."""
    from fastbert.kernels.attention_common import Tile

    for rows, cols in itertools.product((64, 128), (32, 64, 128)):
        for warps, stages in itertools.product((4, 8), (1, 2, 3, 4, 5)):
            doubles_work = warps == 8 and rows == 64  # for each score
            fills_memory = stages > 3 and cols == 128  # shared memory, 32 KiB a stage
            if not (doubles_work or fills_memory):
                yield Tile(rows, cols, warps, stages)


def dq_tiles(columns: int) -> Iterator[Any]:
    """Also varies maxnreg, so that four or five programs share a multiprocessor."""
    for tile in tiles(columns):
        yield tile
        if tile[:1] + tile[2:4] == (64, 4, 3):
            yield from (tile._replace(maxnreg=most) for most in (96, 128))


def single_tiles(columns: int) -> Iterator[Any]:
    from fastbert.kernels.attention_common import Tile

    yield from (Tile(size, size, warps, 1) for size in (64, 128) for warps in (4, 8))


ADD_PARTIALS = Table(
    "partial_sums", "ADD_BLOCK", True, grid((128, 256, 512, 1024), (16, 32), (4, 8, 16))
)
ATTENTION = (
    Table(
        "dropout",
        "words_block",
        False,
        grid((16, 32, 64), (4, 8, 16), (2, 4, 8)),
        "dropout 0.1",
    ),
    Table("attention", "fwd_tile", False, tiles),
    Table("attention", "dq_tile", True, dq_tiles, "x 512 "),
    Table("attention", "dkdv_tile", True, tiles, "x 512 "),
    Table("attention", "single_tile", True, single_tiles, "x 128 "),
)
LAYER_NORM = (
    Table("layer_norm", "forward_block", False, whole_rows),
    Table("layer_norm", "backward_block", True, whole_rows),
    Table("layer_norm", "STAGES", True, stages),
    ADD_PARTIALS,
)
TABLES: dict[str, tuple[Table, ...]] = {
    "attention": ATTENTION,
    "attention_qkvpacked": ATTENTION,
    "bias_gelu": (
        Table("bias_gelu", "FWD_BLOCK", False, grid((4, 8, 16), (128, 256, 512), (4, 8))),
        Table("bias_gelu", "backward_block", True, grid((2, 4, 8), (128, 256, 512), (2, 4, 8))),
        Table("bias_gelu", "STAGES", True, stages),
    ),
    "compact": (Table("compact", "block", False, grid((1024, 2048, 4096), (4, 8))),),
    "dropout": (Table("dropout", "BLOCK", False, grid((2, 4, 8), (128, 256, 512), (2, 4, 8))),),
    "dropout_add_layer_norm": LAYER_NORM,
    "embedding_layer_norm": (
        Table("embedding", "forward_block", False, whole_rows),
        Table("embedding", "backward_block", True, whole_rows),
        Table("table_gradients", "chunk_size", True, lambda columns: (8, 16, 32, 64, 128)),
        Table("table_gradients", "sum_block", True, sum_rows),
        Table("table_gradients", "JOIN_BLOCK", True, grid((8, 16, 32), (128, 256), (4, 8))),
    ),
    "fp8_feed_forward": (
        Table("fp8_linear", "GELU_CAST_BLOCK", False, casts),
        Table("fp8_linear", "GELU_BWD_CAST_BLOCK", True, casts),
    ),
    "fp8_linear": (Table("fp8_linear", "CAST_BLOCK", False, casts),),
    "gather_rows": (
        Table("gather_rows", "BLOCK", False, grid((1024, 2048, 4096), (128, 256, 512), (4, 8))),
    ),
    "layer_norm": LAYER_NORM,
    "linear_cross_entropy": (
        Table(
            "linear_cross_entropy", "FWD_BLOCK", False, grid((2, 4, 8), (512, 1024, 2048), (4, 8))
        ),
        Table("linear_cross_entropy", "BWD_BLOCK", True, grid((4, 8, 16), (128, 256), (2, 4, 8))),
    ),
}
