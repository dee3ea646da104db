"""Reads attention masks in every form that users and Hugging Face pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.ops.fused import is_one_graph

# Additive masks use finfo.min, -inf, or in older scripts -10000: each makes the probability 0.
FORBIDDEN = -1e4


class Mask(NamedTuple):
    """A mask as padding or as a general mask, for B sequences of S places; at most one is set.

    padding: (B, S) bool, True at real tokens; general: bool, True = attend, or additive, broadcasts
    to (B, heads, S, S); both are None if every token attends to every other.
    """

    padding: Tensor | None = None
    general: Tensor | None = None


def read_mask(mask: Tensor | None, batch_size: int, seqlen: int) -> Mask:
    """Reads a mask in any form that Hugging Face's encoder takes.

    mask: None; (B, S) bool or 0/1; (B or 1, heads or 1, S or 1, S) bool, True = attend, or float,
    added to the scores. A 4-D mask that is the same for every query and head is padding. To find
    that out, its values are read, for which the host waits for a GPU; torch.compile's traces use
    only the shape. Raises ValueError for other shapes, for a float 2-D mask with values other than
    0 and 1 (in one graph of torch.compile this fails an assertion when the graph runs), and for an
    integer 4-D mask, which is ambiguous: Hugging Face's eager attention would add its zeros and
    ones to the scores.
    """
    if mask is None:
        return Mask()
    who, shape = "attention_mask", (batch_size, seqlen)
    if mask.ndim == 2:
        require(mask.shape == shape, who, f"shape {shape}", tuple(mask.shape))
        if mask.is_floating_point():
            is_binary = ((mask == 0) | (mask == 1)).all()
            expected = "zeros and ones in a mask of shape (batch, seqlen)"
            got, remedy = "other floating-point values", "an additive mask has four dimensions"
            if is_one_graph():
                torch._assert_async(is_binary, f"{who}: expected {expected}")
            else:
                require(bool(is_binary), who, expected, got, remedy)
        return Mask(padding=mask != 0)
    require(
        mask.ndim == 4
        and mask.shape[0] in (1, batch_size)
        and mask.shape[2] in (1, seqlen)
        and mask.shape[3] == seqlen,
        who,
        f"shape {shape} or {(batch_size, '1 or heads', '1 or seqlen', seqlen)}",
        tuple(mask.shape),
    )
    is_clear = mask.dtype == torch.bool or mask.is_floating_point()
    expected = "a 4-D mask of dtype bool (True = attend) or float (added to the scores)"
    require(is_clear, who, expected, mask.dtype, "pass mask.bool()")
    return _read_general(mask, batch_size, seqlen)


def _read_general(mask: Tensor, batch_size: int, seqlen: int) -> Mask:
    if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        return Mask(padding=mask[:, 0, 0].expand(batch_size, seqlen))
    if mask.requires_grad or torch.compiler.is_compiling():
        return Mask(general=mask)
    keep, is_general = _common_keys(mask)
    if bool(is_general):
        return Mask(general=mask)
    return Mask(padding=keep.expand(batch_size, seqlen))


def _common_keys(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of the first query under a 4-D mask, (B or 1, S) bool; and whether the mask is a
    general one, () bool: other queries have other keys, or numbers are added to their scores."""
    first = mask[:, :1, :1]
    is_general = (mask != first).any()
    keep = first
    if mask.dtype != torch.bool:
        keep = first > FORBIDDEN
        is_general |= (keep & (first != 0)).any()
    return keep[:, 0, 0], is_general


def real_tokens(mask: Tensor | None) -> Tensor | None:
    """(B or 1, S) bool, True at tokens that `read_mask` does not take for padding; no host wait.

    Only the labels of these are read. None without a mask, and for a mask of another rank, with a
    gradient, or of another class, such as flex attention's.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.requires_grad:
        return None
    if mask.ndim == 2:
        return mask != 0
    keep, is_general = _common_keys(mask)
    return keep | is_general
