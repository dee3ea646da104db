"""The sequences of a packed batch, and the tokens whose output is wanted."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.ops.attention import check_mask
from fastbert.ops.compact import Compaction, compact
from fastbert.ops.dropout import checked_rng
from fastbert.ops.gather_rows import Gather, gather_rows
from fastbert.rng import DropoutState

# The least tokens times hidden size squared for which the last layer computes first tokens alone if
# nothing else is read. Finding their rows takes a CPU as long as it saves at 2^17. It takes a GPU's
# host 46 launches, which cost time unless the GPU is slower than its host: from 14,600 tokens on at
# hidden size 768 on an H200, whose host was measured to take 0.4 ms for a layer.
FIRST_ALONE = {"cpu": 2**17}
FIRST_ALONE_ON_A_GPU = 2**33
# The same if labelled tokens, which are more, are read too. A last layer of their rows is no longer
# one operator: the host of the CUDA stand-in of the tests takes 1 ms more for a step. By its
# arithmetic an H200 saves that from some thousand tokens on at hidden size 768 (not measured).
LABELLED_ALONE = {"cpu": 0}
LABELLED_ALONE_ON_A_GPU = 2**31
# The least places times hidden size squared for which, in inference, the host waits for the GPU to
# count the real tokens, so that the layers compute no others. With fewer places the launches of the
# layers are thought to take as long as their arithmetic (not measured), so the layers compute as
# many tokens as there are places.
LEAST_COUNTED = 2**30


def pays_to_count(num_places: int, hidden_size: int) -> bool:
    """Whether a GPU saves more without padding than its host loses by waiting for the count."""
    return num_places * hidden_size**2 >= LEAST_COUNTED


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The M of T packed tokens whose output is wanted, in order.

    index: (M,) int32, each row's token, -1 for a filler row; inverse: (T,) int32, each token's row
    or -1; cu_seqlens: (B + 1,) int32, where each sequence's rows begin; max_seqlen: an upper bound
    of the rows of a sequence.
    """

    index: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def where(cls, wanted: Tensor, cu_seqlens: Tensor, max_seqlen: int, capacity: int) -> "Rows":
        """The first `capacity` tokens that `wanted` (T,) bool marks; the host does not wait."""
        kept = compact.run(Compaction(wanted[None], 0, capacity))
        before = torch.cat([wanted.new_zeros(1), wanted]).cumsum(0, dtype=torch.int32)
        begins = before.index_select(0, cu_seqlens).clamp(max=capacity)
        return cls(kept.positions, kept.slots, begins, max_seqlen)

    @staticmethod
    def pay(
        num_tokens: int, hidden_size: int, device: torch.device, *, labelled: bool = False
    ) -> bool:
        """Whether it saves time if the last layer computes each sequence's first token alone.

        labelled: the labelled tokens instead, with or without the first ones
        """
        if labelled:
            least = LABELLED_ALONE.get(device.type, LABELLED_ALONE_ON_A_GPU)
        else:
            least = FIRST_ALONE.get(device.type, FIRST_ALONE_ON_A_GPU)
        return num_tokens * hidden_size**2 >= least

    @classmethod
    def read_by_losses(
        cls, tokens: Any, *, first: bool, has_label: Tensor | None = None, num_labels: int = 0
    ) -> "Rows":
        """Each sequence's first token if `first`, and the tokens that (T,) bool `has_label` marks.

        tokens: the sequences, a `PackedBatch` or an `Unpadding`; num_labels: the number of marked
        tokens, or an upper bound. The host does not wait.
        """
        cu_seqlens, num_tokens = tokens.cu_seqlens, tokens.num_tokens
        wanted = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
        capacity = num_labels
        if first:  # an empty sequence marks its successor's first token, or the place after all
            # assignment through an index would copy the value from the host, and wait
            wanted.index_fill_(0, cu_seqlens[:-1].long(), True)
            capacity += cu_seqlens.shape[0] - 1
        wanted = wanted[:-1]
        if has_label is not None:
            wanted = wanted | has_label
        longest = min(tokens.max_seqlen, 1) if has_label is None else tokens.max_seqlen
        return cls.where(wanted, cu_seqlens, longest, min(capacity, num_tokens))

    def of(self, x: Tensor) -> Tensor:
        """(T, H) -> (M, H), zeros in filler rows."""
        return gather_rows.run(Gather(x, self.index, self.inverse))

    def take(self, values: Tensor, spare: int) -> Tensor:
        """(T,) -> (M,), `spare` in filler rows."""
        return torch.where(self.index >= 0, values[self.index.clamp(min=0)], spare)


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of the T packed tokens of one forward pass.

    cu_seqlens: (B + 1,) int32, where each sequence begins, and where the last one ends, after which
    there may be filler tokens; max_seqlen: an upper bound of the sequences' lengths; mask: limits
    attention within each sequence, as in `attention`, None for no limit; rng: the dropout state,
    None without dropout; rows: the tokens whose output is wanted, None for all; rows_rng: the
    dropout state of these tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    mask: Tensor | None = None
    rng: DropoutState | None = None
    rows: Rows | None = None
    rows_rng: DropoutState | None = None

    def check(self, num_tokens: int) -> None:
        """Raises ValueError unless shapes and dtypes fit `num_tokens` packed tokens.

        Called once in a forward pass, because layers call operators without their checks.
        """
        cu_seqlens, mask, rng = self.cu_seqlens, self.mask, self.rng
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            require(False, "attention", "cu_seqlens of dtype int32 and shape (batch + 1,)", got)
        if not cu_seqlens.is_contiguous():
            require(False, "attention", "contiguous cu_seqlens", cu_seqlens.stride())
        if mask is not None:
            batch, longest = len(cu_seqlens) - 1, self.max_seqlen
            check_mask("attention", mask, (batch, "heads", longest, longest))
        if rng is not None:
            checked_rng("dropout", num_tokens, cu_seqlens.device, 0.5, rng)

    def at(self, site: int) -> "Sequences":
        """The same sequences, with dropout at another site of the model."""
        if self.rng is None:
            return self
        rng = self.rng.at(site)
        return Sequences(self.cu_seqlens, self.max_seqlen, self.mask, rng).only(self.rows)

    def only(self, rows: Rows | None) -> "Sequences":
        """The same sequences, with `rows` as the wanted rows."""
        if rows is self.rows:
            return self
        of_rows = None if rows is None or self.rng is None else self.rng.rows(rows.index)
        return Sequences(self.cu_seqlens, self.max_seqlen, self.mask, self.rng, rows, of_rows)

    def wanted(self, x: Tensor) -> Tensor:
        """(T, H) -> (M, H), the wanted rows; x itself if all are wanted."""
        return x if self.rows is None else self.rows.of(x)

    def wanted_rng(self, offset: int) -> DropoutState | None:
        """The dropout state of the wanted rows, at the site `offset` after the present one."""
        rng = self.rng if self.rows is None else self.rows_rng
        return None if rng is None else rng.at(rng.site + offset)


def first_tokens(hidden_states: Tensor, cu_seqlens: Tensor, seqlen: int = 0) -> Tensor:
    """(T, H) -> (B, H): each sequence's first token, zeros for a sequence of length 0.

    seqlen: the length of all sequences, which saves a GPU four launches; 0 if their lengths differ
    """
    if seqlen:
        return hidden_states.unflatten(0, (-1, seqlen))[:, 0]
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if not hidden_states.shape[0]:  # the sum over no rows is zeros that stay in autograd's graph
        return hidden_states.sum(0, keepdim=True).expand(starts.shape[0], -1)
    rows = hidden_states.index_select(0, starts.clamp(max=hidden_states.shape[0] - 1))
    return rows.masked_fill((ends <= starts)[:, None], 0.0)
