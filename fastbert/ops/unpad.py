"""Converts between a padded batch (B, S, ...) and its T real tokens packed end to end (T, ...)."""

import dataclasses
import math
from typing import Self

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.ops.compact import Compaction, compact
from fastbert.ops.gather_rows import Gather, gather_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Unpadding:
    """Where the T real tokens of a padded (B, S) batch are.

    positions: (T,) int32, each token's flat index b * S + s; slots: (B * S,) int32, the token at
    each place of the batch, -1 at padding; both None for a batch without padding, whose packed and
    padded forms are the same memory. cu_seqlens: (B + 1,) int32, where each sequence begins, and T
    at the end; max_seqlen: length of the longest sequence, or an upper bound of it; batch_shape:
    (B, S); has_filler: whether some of the T tokens may be filler, with no place and position -1.
    """

    positions: Tensor | None
    slots: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    batch_shape: tuple[int, int]
    has_filler: bool = False

    @classmethod
    def dense(cls, batch: int, seqlen: int, device: torch.device | str | None = None) -> Self:
        """A batch without padding, for which `pack` and `pad` only reshape."""
        if seqlen:  # one launch on a GPU instead of two
            end = batch * seqlen + 1
            cu_seqlens = torch.arange(0, end, seqlen, dtype=torch.int32, device=device)
        else:
            cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        return cls(None, None, cu_seqlens, seqlen, (batch, seqlen))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Self:
        """The padded form (B, max_seqlen) of sequences that are already packed.

        cu_seqlens: (B + 1,) int32; num_tokens: at least its last entry. Tokens from that entry on
        are left out of the padded form, and `pack` gives zeros for them. The caller gives all
        sizes, so the host does not wait.
        """
        ends = cu_seqlens[1:]
        batch = ends.shape[0]
        token = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
        column = torch.arange(max_seqlen, dtype=torch.int32, device=cu_seqlens.device)
        sequence = torch.searchsorted(ends, token, right=True, out_int32=True)
        positions = token - cu_seqlens[sequence] + sequence * max_seqlen
        positions = torch.where(sequence < batch, positions, -1)
        slots = cu_seqlens[:-1, None] + column
        slots = torch.where(slots < ends[:, None], slots, -1).flatten()
        return cls(positions, slots, cu_seqlens, max_seqlen, (batch, max_seqlen), has_filler=True)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.batch_shape) if self.positions is None else len(self.positions)

    @property
    def is_by_row(self) -> bool:
        """Whether each row is one sequence; False if documents share rows."""
        return self.cu_seqlens.shape[0] - 1 == self.batch_shape[0]

    @property
    def seqlen(self) -> int:
        """The length of all sequences if each fills a row, else 0."""
        return self.batch_shape[1] if self.slots is None and self.is_by_row else 0

    @property
    def is_real(self) -> Tensor | None:
        """(B, S) bool, False at padding; None for a batch without padding."""
        return None if self.slots is None else (self.slots >= 0).view(self.batch_shape)

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, 1, S) bool, True at tokens, for attention; None for a batch without padding."""
        is_real = self.is_real
        return None if is_real is None else is_real[:, None, None]

    def pack(self, padded: Tensor, spare: int = 0) -> Tensor:
        """(B, S, ...) -> (T, ...), of any dtype; raises ValueError for another shape.

        spare: the number that filler tokens get, for `padded` of shape (B, S).
        """
        if padded.shape[:2] != self.batch_shape:
            expected = f"shape {self.batch_shape} and further dimensions"
            require(False, "Unpadding.pack", expected, tuple(padded.shape))
        if self.positions is not None and not (self.has_filler or padded.is_floating_point()):
            return padded.flatten(0, 1).index_select(0, self.positions)  # one launch, not four
        packed = _move(padded.flatten(0, 1), self.positions, self.slots)
        if spare and self.has_filler and self.positions is not None:
            packed = packed.masked_fill(self.positions < 0, spare)
        return packed

    def pad(self, packed: Tensor, spare: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...), `spare` at padding; raises ValueError for another shape."""
        if packed.shape[:1] != (self.num_tokens,):
            expected = f"shape {(self.num_tokens,)} and further dimensions"
            require(False, "Unpadding.pad", expected, tuple(packed.shape))
        padded = _move(packed, self.slots, self.positions).unflatten(0, self.batch_shape)
        return filled(padded, self.is_real, spare) if spare else padded


def filled(padded: Tensor, is_real: Tensor | None, spare: float) -> Tensor:
    """(B, S, ...) with `spare` where is_real (B, S) bool is False; None means no padding."""
    if is_real is None:
        return padded
    is_padding = (~is_real).view(is_real.shape + (1,) * (padded.ndim - 2))
    return padded.masked_fill(is_padding, spare)


def _move(tokens: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    if index is None or inverse is None:
        return tokens
    shape = tokens.shape[1:]
    tokens = tokens.reshape(len(tokens), math.prod(shape))
    rows = gather_rows.run(Gather(tokens, index, inverse))
    return rows.reshape(len(index), *shape)


def unpad(attention_mask: Tensor, capacity: int | None = None) -> Unpadding:
    """Finds the real tokens of a batch: those where the mask is not 0.

    attention_mask: (B, S) bool or of an integer dtype. Padding may be on either side or between
    tokens, and a row may be all padding; a batch without padding needs no copy. The host waits for
    a GPU once. With a `capacity`, which must be at least the number of real tokens, it does not: T
    is then the capacity, with filler after the real tokens. Raises ValueError for another shape or
    dtype, or a negative capacity.
    """
    is_integer = not (attention_mask.is_floating_point() or attention_mask.is_complex())
    require(
        attention_mask.ndim == 2 and is_integer,
        "unpad",
        "attention_mask of shape (batch, seqlen) and dtype bool or an integer",
        f"{tuple(attention_mask.shape)} {attention_mask.dtype}",
    )
    require(capacity is None or capacity >= 0, "unpad", "a capacity of at least 0", capacity)
    batch, seqlen = attention_mask.shape
    is_token = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if capacity is not None:
        _, positions, slots, cu_seqlens = compact.run(Compaction(is_token, 0, capacity))
        return Unpadding(positions, slots, cu_seqlens, seqlen, (batch, seqlen), has_filler=True)
    lengths = is_token.sum(1)
    if torch.compiler.is_compiling():  # read two numbers, not one for each sequence
        lengths = torch.cat([lengths, lengths.new_zeros(1)])  # max() needs an element if B is 0
        total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
        _, positions, slots, cu_seqlens = compact(attention_mask, 0, attention_mask.numel())
        return Unpadding(positions[:total], slots, cu_seqlens, longest, (batch, seqlen))
    on_host = lengths.tolist()
    total, longest = sum(on_host), max(on_host, default=0)
    if 0 < total == batch * seqlen:
        return Unpadding.dense(batch, seqlen, attention_mask.device)
    _, positions, slots, cu_seqlens = compact.run(Compaction(is_token, 0, total, is_exact=True))
    return Unpadding(positions, slots, cu_seqlens, longest, (batch, seqlen))
