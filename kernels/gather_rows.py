"""Gathers rows of bits, so that one kernel serves all dtypes of a size."""

import torch
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import begin, cdiv, kernel, launcher

BLOCK = 2048, 256, 4  # elements and columns of a tile, and warps

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@kernel(do_not_specialize=["n_rows", "n_sources"])
def _gather_rows_kernel(
    src_ptr, index_ptr, out_ptr,  # (R, N), (M,) int32, (M, N)
    src_row_stride,
    n_rows, n_sources,
    N_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    program = tl.program_id(0)
    rows = (program // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = program % strips * COLS + tl.arange(0, COLS)
    is_row, is_col = rows < n_rows, cols < N_COLS

    sources = tl.load(index_ptr + rows, mask=is_row, other=-1).to(tl.int64)
    is_source = (sources >= 0) & (sources < n_sources)
    places = src_ptr + sources[:, None] * src_row_stride + cols[None, :]
    x = tl.load(places, mask=is_source[:, None] & is_col[None, :], other=0)
    # all bits set for an index out of range, because raising would make the host wait
    x = tl.where((is_source | (sources == -1))[:, None], x, -1)
    tl.store(out_ptr + rows[:, None] * N_COLS + cols[None, :], x, is_row[:, None] & is_col[None, :])


@launcher(lambda src, index, _: src.new_empty((index.shape[0], src.shape[1])))
def gather_rows(out: Tensor, src: Tensor, index: Tensor, inverse: Tensor) -> None:
    """src (R, N), index (M,) int32 -> (M, N): zeros for -1, all bits set for an index out of range.

    `inverse` is not read; the body in the extension has the same arguments.
    """
    if out.numel():
        dtype = _BITS[min(src.element_size(), 8)]  # 16 bytes (complex128) are copied as two of 8
        src = src if src.stride(1) == 1 else src.contiguous()
        bits = src.view(dtype)
        n_cols = bits.shape[1]
        elements, cols, num_warps = BLOCK
        cols = min(cols, 1 << (n_cols - 1).bit_length())
        rows = elements // cols
        _gather_rows_kernel(
            (cdiv(len(out), rows) * cdiv(n_cols, cols),),
            bits, index.contiguous(), out.view(dtype), bits.stride(0), len(out), len(src),
            N_COLS=n_cols, ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
