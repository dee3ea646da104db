"""The sizes of which an encoder's graphs are recorded.

T packed tokens of B sequences, M wanted rows, H hidden; a bucket has T', B' and M' of them.
"""

from typing import NamedTuple

from torch import Tensor

from fastbert.modules.sequences import Rows, Sequences


class Bucket(NamedTuple):
    """Sizes that a call is padded to, in tokens; `sequences` is a count of sequences.

    longest: an upper bound of sequence lengths; rows, longest_rows: the same for the wanted rows, 0
    where all tokens are wanted.
    """

    tokens: int
    sequences: int
    longest: int
    rows: int = 0
    longest_rows: int = 0

    @classmethod
    def of(cls, x: Tensor, sequences: Sequences, rows: Rows | None) -> "Bucket":
        """The smallest bucket for the call; at most 15 tokens or an eighth of them are filler."""
        tokens, count, longest = x.shape[0], sequences.cu_seqlens.shape[0] - 1, sequences.max_seqlen
        wanted = (0, 0)
        if rows is not None:
            wanted = rounded(rows.index.shape[0], 16), rounded(rows.max_seqlen, 64)
        return cls(
            rounded(tokens, 16), 1 << (count - 1).bit_length(), rounded(longest, 64), *wanted
        )


def rounded(size: int, least: int) -> int:
    """`size` rounded up to a multiple of `least`, or of a power of two up to size / 8 if larger."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step
