"""What the attention kernels share: tiles, loads with padding, the mask and the drop words.

B sequences, T packed tokens, N heads, D head size, S the longest sequence. Queries and keys may be
packed differently, each with its own cu_seqlens `cu`: sequence b has the rows cu[b] to cu[b + 1].
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastbert.kernels.runtime import IS_INTERPRETED

# A float32 matrix product is computed as three tf32 products, which run on the tensor cores and
# together are as accurate. Tests may set "ieee". Other dtypes have only one precision.
FLOAT32_PRECISION = "tf32x3"

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e30)  # numbers of an additive mask below this mean -inf
# Other numbers below this are raised to it. No probability shows the difference, and in a row of
# only such numbers the scores keep their digits, on which the backward's probabilities depend.
FAR = tl.constexpr(-65536.0)
LOWEST = tl.constexpr(-1.0e30)  # start of a running maximum; finite, because -inf - -inf is NaN
_HAS_ASM = tl.constexpr(not IS_INTERPRETED)


class Tile(NamedTuple):
    """Queries (block_m) and keys (block_n) that a program's step computes, warps, pipeline stages.

    maxnreg: a limit on the registers of a thread; None leaves their number to the compiler
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def generation(capability: int) -> int:
    """Generation of the tensor cores: 80, 90 or 100; sm_120 (small Blackwells) counts as 80."""
    if 100 <= capability < 120:
        return 100
    return 90 if capability == 90 else 80


@functools.cache
def block_d(head_dim: int) -> int:
    """Columns of a tile: a power of two, and at least 16, the least that a matrix product takes."""
    return max(triton.next_power_of_2(head_dim), 16)


def sums_by_dot(capability: int, itemsize: int, block_d: int) -> bool:
    """Whether `store_sums` adds up a tile with a matrix product, which saves registers.

    Not on Ampere: there, a product after the loop changes how Triton lays out the products in the
    loop, and registers spill.
    """
    gpu = generation(capability)
    return itemsize == 2 and gpu >= 90 and (gpu == 90 or block_d > 32)


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` for tensors of this dtype."""
    return FLOAT32_PRECISION if dtype == torch.float32 else "ieee"


@triton.jit
def tile_ptrs(
    ptr, row_stride, rows,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers [R, BLOCK_D] to `rows` [R]; `ptr` points to row 0, at the head's first column."""
    return ptr + rows[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(ptrs, rows_in, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """[R, BLOCK_D], zero beyond HEAD_DIM and, if MASK_ROWS, where `rows_in` [R] is False."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(ptrs, mask=rows_in[:, None], other=0.0) if MASK_ROWS else tl.load(ptrs)
    else:
        dims_in = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if MASK_ROWS:
            tile = tl.load(ptrs, mask=rows_in[:, None] & dims_in, other=0.0)
        else:
            tile = tl.load(ptrs, mask=dims_in, other=0.0)
    return tile


@triton.jit
def store_tile(ptrs, tile, rows_in, HEAD_DIM: tl.constexpr):
    """Stores a tile [R, BLOCK_D] where `rows_in` [R] is True, up to HEAD_DIM."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    if HEAD_DIM == BLOCK_D:
        tl.store(ptrs, tile, mask=rows_in[:, None])
    else:
        tl.store(ptrs, tile, mask=rows_in[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM))


@triton.jit
def zero_rows(
    ptr, row_stride, first, end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes zeros to rows `first` to `end`, divided among the programs of grid axis 0."""
    zero = tl.zeros((BLOCK, BLOCK_D), dtype=ptr.dtype.element_ty)
    step = tl.num_programs(0) * BLOCK
    for start in range(first + tl.program_id(0) * BLOCK, end, step):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        store_tile(tile_ptrs(ptr, row_stride, rows, BLOCK_D), zero, rows < end, HEAD_DIM)


@triton.jit
def store_sums(ptr, k, tile, HEAD_DIM: tl.constexpr, BY_DOT: tl.constexpr):
    """Stores the column sums of a tile [R, BLOCK_D] in its program's row of the k-th partial sums.

    ptr: (K, B * P, N, D) float32, for a grid of P tiles, N heads and B + 1 slices. The last slice,
    which is not a sequence, has no row.
    """
    sequences = tl.num_programs(2).to(tl.int64) - 1
    row = (k * sequences + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
    first = (row * tl.num_programs(1) + tl.program_id(1)) * HEAD_DIM
    cols = tl.arange(0, tile.shape[1])
    if not BY_DOT:
        tl.store(ptr + first + cols, tl.sum(tile.to(tl.float32), axis=0), mask=cols < HEAD_DIM)
    else:  # a product with ones, whose 16 result rows are alike: tl.sum takes more instructions
        alike = tl.arange(0, 16)[:, None]
        sums = tl.dot(tl.full((16, tile.shape[0]), 1.0, tile.dtype), tile)
        ptrs = ptr + first + cols[None, :] + alike * 0
        tl.store(ptrs, sums, mask=(alike == 0) & (cols < HEAD_DIM)[None, :])


@triton.jit
def add_mask(
    scores, mask_ptrs, mask_col_stride, cols, rows_in, cols_in, mask_scale,
    MASK_COLS: tl.constexpr,
):  # fmt: skip
    """Applies a mask to raw scores [M, N]: booleans (True = attend) or numbers to add.

    mask_ptrs: [M, 1], the first column of each row. An additive mask is meant for scores times
    softmax_scale, so it is multiplied by `mask_scale` = 1 / softmax_scale for the raw scores.
    """
    if mask_ptrs is not None:
        ptrs = mask_ptrs + cols.to(tl.int64)[None, :] * mask_col_stride
        if MASK_COLS:
            mask = tl.load(ptrs, mask=rows_in[:, None] & cols_in[None, :], other=0)
        else:
            mask = tl.load(ptrs, mask=rows_in[:, None], other=0)
        if mask.dtype.is_floating():
            mask = mask.to(tl.float32)
            mask = tl.where(mask < FAR, tl.where(mask < MASKED, float("-inf"), FAR), mask)
            scores += mask * mask_scale
        else:
            scores = tl.where(mask != 0, scores, float("-inf"))
    return scores


@triton.jit
def load_words(word_ptrs, rows_in, start, BLOCK_N: tl.constexpr):
    """[M, BLOCK_N]: for each score from column `start` on, the drop word that holds its bit.

    word_ptrs: [M], the first word of each row.
    """
    ptrs = word_ptrs + start // 32
    cols = tl.arange(0, BLOCK_N)[None, :]
    words = tl.load(ptrs, mask=rows_in, other=0)[:, None]
    for place in tl.static_range(1, BLOCK_N // 32):
        word = tl.load(ptrs + place, mask=rows_in, other=0)[:, None]
        words = tl.where(cols < 32 * place, words, word)
    return words


@triton.jit
def drop(p, words):
    """`p` with zeros where the bit in `words` [M, N] is set: one LOP3 and one FSEL per score."""
    bits = (1 << (tl.arange(0, p.shape[1]) & 31))[None, :]
    if _HAS_ASM:  # tl.where would compile to up to five instructions
        kept = tl.inline_asm_elementwise(
            "{ .reg .pred %dropped; .reg .b32 %bit; and.b32 %bit, $2, $3;"
            " setp.ne.s32 %dropped, %bit, 0; selp.f32 $0, 0f00000000, $1, %dropped; }",
            "=f,f,r,r", [p, words, bits], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = tl.where((words & bits) != 0, 0.0, p)
    return kept
