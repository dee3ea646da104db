"""Stream compaction in one launch, without atomics, so entries keep their order.

Each program compacts a block of entries. It first reads all earlier ones to count those kept: a
batch has so few entries that this takes less time than a second launch.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import begin, cdiv, kernel, launcher


def block(n_values: int) -> tuple[int, int]:
    """Entries of a block, and warps: small blocks if 16 of them suffice, else large ones."""
    return (1024, 4) if n_values <= 16384 else (4096, 8)


@kernel(do_not_specialize=["n_cols", "n_values", "capacity", "ignore_index"])
def _compact_kernel(
    values_ptr, kept_ptr, positions_ptr,  # (B * S,), (C,), (C,)
    slots_ptr, offsets_ptr,  # (B * S,), (B + 1,)
    n_cols, n_values, capacity, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    begin()
    program = tl.program_id(0)
    start = program * BLOCK
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, start, BLOCK):
        counts += (tl.load(values_ptr + first + lanes) != ignore_index).to(tl.int32)
    before = tl.sum(counts, axis=0)

    places = start + lanes
    is_value = places < n_values
    values = tl.load(values_ptr + places, mask=is_value, other=0)
    is_kept = is_value & (values != ignore_index)
    ranks = before + tl.cumsum(is_kept.to(tl.int32), axis=0)  # from 1 for the first kept entry
    slots = ranks - 1
    has_place = is_kept & (slots < capacity)
    tl.store(slots_ptr + places, tl.where(has_place, slots, -1), mask=is_value)
    tl.store(kept_ptr + slots, values, mask=has_place)
    tl.store(positions_ptr + slots, places, mask=has_place)
    is_end = is_value & ((places + 1) % n_cols == 0)
    tl.store(offsets_ptr + (places + 1) // n_cols, ranks, mask=is_end)

    if program == 0:
        tl.store(offsets_ptr, 0)
    if program == tl.num_programs(0) - 1:
        total = before + tl.sum(is_kept.to(tl.int32), axis=0)
        for first in range(total, capacity, BLOCK):
            spare = first + lanes
            tl.store(kept_ptr + spare, ignore_index, mask=spare < capacity)
            tl.store(positions_ptr + spare, -1, mask=spare < capacity)


def _outputs(values: Tensor, ignore_index: int, capacity: int) -> list[Tensor]:
    sizes = capacity, values.numel(), values.shape[0] + 1
    kept = values.new_empty((capacity,))
    return [kept, *(values.new_empty((size,), dtype=torch.int32) for size in sizes)]


@launcher(_outputs)
def compacted(outputs: list[Tensor], values: Tensor, ignore_index: int, capacity: int) -> None:
    """values (B, S) of a signed dtype or uint8 -> kept (C,), positions (C,), slots (B S,), offsets
    (B + 1,), as `fastbert.ops.compact` defines them."""
    kept, positions, slots, offsets = outputs
    n_values = values.numel()
    if n_values:
        size, num_warps = block(n_values)
        _compact_kernel(
            (cdiv(n_values, size),),
            values.contiguous(), kept, positions, slots, offsets,
            values.shape[1], n_values, capacity, ignore_index,
            BLOCK=size, num_warps=num_warps,
        )  # fmt: skip
    else:
        kept.fill_(ignore_index)
        positions.fill_(-1)
        offsets.zero_()


def compact(values: Tensor, ignore_index: int, capacity: int | None) -> list[Tensor]:
    """Calls `compacted`; if capacity is None, the host waits for the number of kept entries."""
    if capacity is None:
        capacity = int((values != ignore_index).sum())
    return compacted(values, ignore_index, capacity)
