"""Column sums of many rows: each program sums its rows, and a second kernel adds the sums up.

There are no atomics, and the order is fixed, so that repeated runs give the same bits.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import begin, cdiv, is_traced, kernel

ADD_BLOCK = 512, 16, 8  # partial sums, columns (two sectors of memory), warps
MOST = 4  # tensors of partial sums that one launch adds up

Pairs = list[tuple[Tensor, Tensor]]


@triton.jit
def store_partial(partials_ptr, k, sums, is_col, N_COLS: tl.constexpr):
    """Stores the column sums of `sums` [R, C] as this program's row of partials[k]."""
    row = k * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    cols = tl.arange(0, sums.shape[1])
    tl.store(partials_ptr + row * N_COLS + cols, tl.sum(sums, axis=0), mask=is_col)


@triton.jit
def _add_up(
    program, partials_ptr, sums_ptr, n_partials,
    K: tl.constexpr, ROWS: tl.constexpr, N_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores one strip of one row of sums (ROWS, N), added up from partials (K, P, N)."""
    if partials_ptr is not None:
        strips: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N
        row = program // strips
        cols = program % strips * BLOCK_N + tl.arange(0, BLOCK_N)
        is_col = cols < N_COLS
        k, end = row, n_partials
        if K < ROWS:  # two sums, and zeros between them
            k, end = row // 2, tl.where(row == 1, 0, n_partials)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in tl.range(0, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            place = (k * n_partials + rows).to(tl.int64) * N_COLS
            mask = (rows < n_partials)[:, None] & is_col[None, :]
            total += tl.load(partials_ptr + place[:, None] + cols[None, :], mask=mask, other=0.0)
        tl.store(sums_ptr + row * N_COLS + cols, tl.sum(total, axis=0), mask=is_col)


@kernel(do_not_specialize=["p0", "p1", "p2", "p3"])
def add_partials_kernel(
    partials0_ptr, partials1_ptr, partials2_ptr, partials3_ptr,  # (K, P, N); None if unused
    sums0_ptr, sums1_ptr, sums2_ptr, sums3_ptr,  # (ROWS, N) each
    p0, p1, p2, p3,
    K0: tl.constexpr, ROWS0: tl.constexpr, N0: tl.constexpr,
    K1: tl.constexpr, ROWS1: tl.constexpr, N1: tl.constexpr,
    K2: tl.constexpr, ROWS2: tl.constexpr, N2: tl.constexpr,
    K3: tl.constexpr, ROWS3: tl.constexpr, N3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up to four tensors of partial sums; each program computes one strip of one row."""
    begin()
    program = tl.program_id(0)
    end0: tl.constexpr = ROWS0 * ((N0 + BLOCK_N - 1) // BLOCK_N)
    end1: tl.constexpr = end0 + ROWS1 * ((N1 + BLOCK_N - 1) // BLOCK_N)
    end2: tl.constexpr = end1 + ROWS2 * ((N2 + BLOCK_N - 1) // BLOCK_N)
    if program < end0:
        _add_up(program, partials0_ptr, sums0_ptr, p0, K0, ROWS0, N0, BLOCK_M, BLOCK_N)
    elif program < end1:
        _add_up(program - end0, partials1_ptr, sums1_ptr, p1, K1, ROWS1, N1, BLOCK_M, BLOCK_N)
    elif program < end2:
        _add_up(program - end1, partials2_ptr, sums2_ptr, p2, K2, ROWS2, N2, BLOCK_M, BLOCK_N)
    else:
        _add_up(program - end2, partials3_ptr, sums3_ptr, p3, K3, ROWS3, N3, BLOCK_M, BLOCK_N)


def add_partials(partials: Tensor, sums: Tensor) -> None:
    """Sums (K, P, N) float32 over P, in a fixed order, into `sums` (K, N), or (N,) if K is 1.

    If K is 2 and `sums` has three rows, the middle row is filled with zeros. Inside `together` the
    sums are computed at the end of its block.
    """
    waiting = getattr(_WAITING, "pairs", None)
    if waiting is None:
        _launch([(partials, sums)])
    else:
        waiting.append((partials, sums))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Postpones the `add_partials` of its block to the end of the block, `MOST` in one launch.

    Under a tracer or a dispatch mode, which need each operator complete, nothing is postponed.
    """
    before = getattr(_WAITING, "pairs", None)
    pairs: Pairs | None = None if is_traced(()) else []
    _WAITING.pairs = pairs
    try:
        yield
    finally:
        _WAITING.pairs = before
    pairs = pairs or []
    for first in range(0, len(pairs), MOST):
        _launch(pairs[first : first + MOST])


_WAITING = threading.local()  # autograd runs backwards in its own threads


def _launch(pairs: Pairs) -> None:
    shapes = tuple([(x.shape[0], sums.numel(), x.shape[2]) for x, sums in pairs])
    grid, constants = _constants(shapes, ADD_BLOCK)
    missing = MOST - len(pairs)
    none = [None] * missing
    add_partials_kernel(
        grid,
        *[partials for partials, _ in pairs], *none, *[sums for _, sums in pairs], *none,
        *[partials.shape[1] for partials, _ in pairs], *[0] * missing,
        **constants,
    )  # fmt: skip


@functools.cache
def _constants(
    shapes: tuple[tuple[int, int, int], ...], block: tuple[int, int, int]
) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the compile-time arguments; shapes: (K, elements of the sums, N) of each."""
    block_m, block_n, num_warps = block
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}
    programs = 0
    for number in range(MOST):
        k, size, columns = shapes[number] if number < len(shapes) else (0, 0, 1)
        rows = size // columns
        constants |= {f"K{number}": k, f"ROWS{number}": rows, f"N{number}": columns}
        programs += rows * cdiv(columns, block_n)
    return (programs,), constants
