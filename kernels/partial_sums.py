"""Column sums of many rows: each program sums its rows, and a second kernel adds the sums up.

There are no atomics, and the order is fixed, so that repeated runs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import cdiv, kernel

ADD_BLOCK = 512, 16, 8  # partial sums, columns (two sectors of memory), warps


@triton.jit
def store_partial(partials_ptr, k, sums, is_col, N_COLS: tl.constexpr):
    """Stores the column sums of `sums` [R, C] as this program's row of partials[k]."""
    row = k * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    cols = tl.arange(0, sums.shape[1])
    tl.store(partials_ptr + row * N_COLS + cols, tl.sum(sums, axis=0), mask=is_col)


@kernel(do_not_specialize=["n_partials"])
def _add_partials_kernel(
    partials_ptr, out0_ptr, out1_ptr, out2_ptr,  # (K, P, N), (N,), (N,) or None, (N,) or None
    n_partials,
    N_SUMS: tl.constexpr, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1)
    is_col = cols < N_COLS
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(0, tl.where(k < N_SUMS, n_partials, 0), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        place = (k * n_partials + rows).to(tl.int64) * N_COLS
        mask = (rows < n_partials)[:, None] & is_col[None, :]
        sums += tl.load(partials_ptr + place[:, None] + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    if k == 0:
        tl.store(out0_ptr + cols, total, mask=is_col)
    elif out1_ptr is not None:
        if k == 1:
            tl.store(out1_ptr + cols, total, mask=is_col)
        elif out2_ptr is not None:
            tl.store(out2_ptr + cols, total, mask=is_col)


def add_partials(partials: Tensor, *outputs: Tensor) -> None:
    """Sums (K, P, N) float32 over P, in a fixed order, into K = 1, 2 or 3 outputs (N,).

    A third output beside two sums is filled with zeros.
    """
    n_sums, n_partials, n_cols = partials.shape
    n_outputs = len(outputs)
    block_m, block_n, num_warps = ADD_BLOCK
    _add_partials_kernel(
        (cdiv(n_cols, block_n), n_outputs),
        partials, *outputs, *[None] * (3 - n_outputs), n_partials,
        N_SUMS=n_sums, N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
