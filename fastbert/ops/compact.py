"""Stream compaction: keeps some entries in order, and says where each came from and went to."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.backend import op
from fastbert.check import require


class Compacted(NamedTuple):
    """The result of `compact` for (B, S) values, N of which are kept, in C places.

    kept: (C,) values.dtype; positions: (C,) int32, the entry's flat index b * S + s, -1 in filler
    places; slots: (B * S,) int32, each entry's place in `kept` or -1; offsets: (B + 1,) int32, the
    number of kept entries before each row, and N at the end.
    """

    kept: Tensor
    positions: Tensor
    slots: Tensor
    offsets: Tensor


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class Compaction(NamedTuple):
    """A call of `compact`; is_exact: whether `capacity` is the count of kept entries."""

    values: Tensor
    ignore_index: int
    capacity: int | None = None
    is_exact: bool = False


@op("ext", "triton")
def compact(values: Tensor, ignore_index: int, capacity: int | None = None) -> Compaction:
    """Keeps the entries that differ from `ignore_index`, in row-major order.

    values: (B, S) of any integer dtype or bool. capacity: the number of places C in the result.
    Places without an entry, the filler, hold ignore_index. If more than C entries are kept, only
    the first C get a place, but offsets[B] is still the true count. If capacity is None, C is that
    count, for which the host waits for a GPU once; with a capacity it never waits.

    Raises ValueError if values is not 2-D, has a floating-point dtype or more than 2^31 - 1
    entries, if its dtype cannot hold ignore_index, or if capacity is negative.
    """
    who, dtype = "compact", values.dtype
    require(values.ndim == 2, who, "values of shape (batch, seqlen)", tuple(values.shape))
    is_integer = not dtype.is_floating_point and not dtype.is_complex
    require(is_integer, who, "values of an integer dtype or bool", dtype)
    low, high = 0, 1
    if dtype != torch.bool:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    fits = low <= ignore_index <= high
    require(fits, who, f"an ignore_index that {dtype} can hold", ignore_index)
    require(values.numel() < 2**31, who, "at most 2^31 - 1 values", values.numel())
    require(capacity is None or capacity >= 0, who, "a capacity of at least 0", capacity)
    return Compaction(values, ignore_index, capacity)


@compact.plain
def _plain(call: Compaction) -> Compacted:
    values, ignore_index = _signed(call)
    dtype, capacity, is_exact = call.values.dtype, call.capacity, call.is_exact
    entries, (batch, seqlen) = values.flatten(), values.shape
    is_kept = entries != ignore_index
    ranks = is_kept.cumsum(0, dtype=torch.int32)  # from 1 for the first kept entry
    row_ends = ranks[seqlen - 1 :: seqlen] if seqlen else ranks.new_zeros(batch)
    offsets = torch.cat([ranks.new_zeros(1), row_ends])
    if capacity is None:
        capacity, is_exact = int(offsets[-1]), True

    # the entry of rank r is the first one where `ranks` reaches r, or one past the end
    wanted = torch.arange(1, capacity + 1, dtype=torch.int32, device=values.device)
    found = torch.searchsorted(ranks, wanted, out_int32=True)
    if is_exact:
        kept, positions, has_place = entries[found], found, is_kept
    else:
        kept = torch.cat([entries, entries.new_full((1,), ignore_index)])[found]
        positions = torch.where(found < len(entries), found, -1)
        has_place = is_kept & (ranks <= capacity)
    slots = torch.where(has_place, ranks - 1, -1)
    return Compacted(kept.view(dtype), positions, slots, offsets)


def _signed(call: Compaction) -> tuple[Tensor, int]:
    """The values and ignore_index; unsigned ones of over 8 bits, which PyTorch cannot index on a
    GPU, as the same bits of a signed dtype."""
    values, ignore_index = call[:2]
    if values.dtype in _SIGNED:
        values = values.view(_SIGNED[values.dtype])
        last = torch.iinfo(values.dtype).max
        ignore_index = ignore_index - 2 * (last + 1) if ignore_index > last else ignore_index
    return values, ignore_index


@compact.fused
def _fused(kernels: Any, call: Compaction) -> Compacted:
    values, ignore_index = _signed(call)
    if values.dtype == torch.bool:
        values = values.view(torch.int8)
    kept, *others = kernels.compact(values, ignore_index, call.capacity)
    return Compacted(kept.view(call.values.dtype), *others)


@compact.traces
def _fake(values: Tensor, ignore_index: int, capacity: int | None = None) -> Compacted:
    room = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity

    def int32(size: int | torch.SymInt) -> Tensor:
        return values.new_empty((size,), dtype=torch.int32)

    return Compacted(
        kept=values.new_empty((room,)),
        positions=int32(room),
        slots=int32(values.numel()),
        offsets=int32(values.shape[0] + 1),
    )
