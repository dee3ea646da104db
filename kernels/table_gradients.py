"""The gradients of the three embedding tables: sums of the rows of dz (T, N) that share an id.

Each id has a key, numbered consecutively over all three tables. The keys are sorted once, and runs
of equal keys are summed in that order, chunk by chunk. So there are no atomics, the host reads no
ids, and repeated runs give the same bits, however many tokens share an id.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import begin, capability, cdiv, kernel

JOIN_BLOCK = 16, 256, 8  # chunks and columns that a program of the join adds at once; warps


def chunk_size(capability: int) -> int:
    """How many sorted keys one program sums."""
    # H200, bf16, 24152 x 1024, backward of the embeddings: 239 us; 268 us with 32
    return 64 if capability == 90 else 32


@functools.cache
def sum_block(n_cols: int) -> tuple[int, int]:
    """BLOCK_N, which covers a whole row, and warps."""
    block_n = triton.next_power_of_2(n_cols)
    return block_n, min(max(block_n // 256, 1), 16)


@triton.jit
def _store_row(
    key, sums, cols, is_col, dword_ptr, dposition_ptr, dtoken_type_ptr,
    n_words, n_positions, n_types, padding_id, N_COLS: tl.constexpr,
):  # fmt: skip
    """Stores `sums` in the table row that `key` stands for; the padding row stays zero."""
    word = key.to(tl.int64)
    position = word - n_words
    token_type = position - n_positions
    # branches, because the interpreter of Triton 3.9 cannot combine a block and a number in a mask
    if position < 0:
        if word != padding_id:
            tl.store(dword_ptr + word * N_COLS + cols, sums, mask=is_col)
    elif token_type < 0:
        tl.store(dposition_ptr + position * N_COLS + cols, sums, mask=is_col)
    elif token_type < n_types:
        tl.store(dtoken_type_ptr + token_type * N_COLS + cols, sums, mask=is_col)


@kernel(do_not_specialize=["n_keys", "n_rows", "n_words", "n_positions", "n_types",
                               "padding_id"])  # fmt: skip
def _sum_chunks_kernel(
    dz_ptr, keys_ptr, order_ptr,  # (T, N); (3T,) sorted keys, and their places before sorting
    dword_ptr, dposition_ptr, dtoken_type_ptr,  # (V, N), (P, N), (S, N), zeroed
    heads_ptr, tails_ptr,  # (chunks, N)
    n_keys, n_rows, n_words, n_positions, n_types, padding_id,
    N_COLS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums the runs of equal keys in one chunk of sorted keys.

    If a run began in an earlier chunk, its sum is stored as this chunk's head; if it begins here
    and continues in the next chunk, as this chunk's tail; otherwise in its table.
    """
    begin()
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, n_keys)
    cols = tl.arange(0, BLOCK_N)
    is_col = cols < N_COLS
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(keys_ptr + end, mask=end < n_keys, other=-1)
    key = tl.load(keys_ptr + first)
    tables = (
        cols, is_col, dword_ptr, dposition_ptr, dtoken_type_ptr, n_words, n_positions, n_types,
        padding_id,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for place in tl.range(first, end):
        next_key = tl.load(keys_ptr + place)
        if next_key != key:
            if key == before:
                tl.store(heads_ptr + chunk * N_COLS + cols, sums, mask=is_col)
            else:
                _store_row(key, sums, *tables, N_COLS)
            sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
            key = next_key
        row = tl.load(order_ptr + place) % n_rows
        sums += tl.load(dz_ptr + row * N_COLS + cols, mask=is_col, other=0.0).to(tl.float32)
    if key == before:
        tl.store(heads_ptr + chunk * N_COLS + cols, sums, mask=is_col)
    elif key == after:
        tl.store(tails_ptr + chunk * N_COLS + cols, sums, mask=is_col)
    else:
        _store_row(key, sums, *tables, N_COLS)


@kernel(do_not_specialize=["n_keys", "n_words", "n_positions", "n_types", "padding_id"])
def _join_chunks_kernel(
    keys_ptr, heads_ptr, tails_ptr,  # (3T,), (chunks, N), (chunks, N)
    dword_ptr, dposition_ptr, dtoken_type_ptr,  # (V, N), (P, N), (S, N)
    n_keys, n_words, n_positions, n_types, padding_id,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """If a run starts in this chunk and continues, stores its tail plus the heads that follow."""
    begin()
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    end = first + CHUNK
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(keys_ptr + end, mask=end < n_keys, other=-1)
    key = tl.load(keys_ptr + tl.minimum(end, n_keys) - 1)
    if (key == after) & (key != before):
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_col = cols < N_COLS
        heads = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        chunks = chunk + 1 + tl.arange(0, BLOCK_M)
        goes_on = 1
        while goes_on == 1:
            places = chunks * CHUNK
            is_same = tl.load(keys_ptr + places, mask=places < n_keys, other=-1) == key
            heads += tl.load(
                heads_ptr + (chunks * N_COLS)[:, None] + cols[None, :],
                mask=is_same[:, None] & is_col[None, :],
                other=0.0,
            )
            chunks += BLOCK_M
            goes_on = tl.min(is_same.to(tl.int32))
        tail = tl.load(tails_ptr + chunk * N_COLS + cols, mask=is_col, other=0.0)
        _store_row(
            key, tail + tl.sum(heads, axis=0), cols, is_col, dword_ptr, dposition_ptr,
            dtoken_type_ptr, n_words, n_positions, n_types, padding_id, N_COLS,
        )  # fmt: skip


def add_to_tables(
    dz: Tensor, keys: Tensor, dword: Tensor, dposition: Tensor, dtoken_type: Tensor, padding_id: int
) -> None:
    """Fills the tables' gradients, which must be zero before, with sums of rows of dz (T, N).

    keys: (3, T) int32, each token's word id, position id + V, and type id + V + P. Keys beyond the
    last table and the word `padding_id` are left out.
    """
    n_rows, n_cols = dz.shape
    sizes = dword.shape[0], dposition.shape[0], dtoken_type.shape[0]
    chunk = chunk_size(capability(dz))
    n_chunks = cdiv(keys.numel(), chunk)
    heads, tails = torch.empty(2, n_chunks, n_cols, dtype=torch.float32, device=dz.device)
    sorted_keys, order = torch.sort(keys.view(-1), stable=True)
    block_n, num_warps = sum_block(n_cols)
    _sum_chunks_kernel(
        (n_chunks,),
        dz, sorted_keys, order, dword, dposition, dtoken_type, heads, tails,
        keys.numel(), n_rows, *sizes, padding_id,
        N_COLS=n_cols, BLOCK_N=block_n, CHUNK=chunk, num_warps=num_warps,
    )  # fmt: skip
    block_m, block_n, num_warps = JOIN_BLOCK
    _join_chunks_kernel(
        (n_chunks, cdiv(n_cols, block_n)),
        sorted_keys, heads, tails, dword, dposition, dtoken_type,
        keys.numel(), *sizes, padding_id,
        N_COLS=n_cols, BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=chunk,
        num_warps=num_warps,
    )  # fmt: skip
