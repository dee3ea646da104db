"""One place that reads an attention mask: what users and Hugging Face pass becomes key padding."""

import torch
from torch import Tensor

from fastbert.check import require


def key_padding_mask(mask: Tensor | None, batch_size: int, seqlen: int) -> Tensor | None:
    """(B, S) bool, True at real tokens, or None where every token is real.

    mask: None; (B, S) bool or 0/1; (B or 1, heads or 1, S or 1, S) bool, True = attend, or
    additive float, 0 = attend, as Hugging Face expands it. A 4-D mask must mean key padding: the
    same for every query and head. An integer 4-D mask is refused, because it is ambiguous:
    Hugging Face's eager attention would add its zeros and ones to the scores.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        require(
            mask.shape == (batch_size, seqlen),
            "attention_mask",
            f"shape {(batch_size, seqlen)}",
            tuple(mask.shape),
        )
        if mask.is_floating_point():
            require(
                bool(((mask == 0) | (mask == 1)).all()),
                "attention_mask",
                "zeros and ones in a mask of shape (batch, seqlen)",
                "other floating-point values",
                "an additive mask has four dimensions",
            )
        return mask != 0
    require(
        mask.ndim == 4 and mask.shape[-1] == seqlen and mask.shape[0] in (1, batch_size),
        "attention_mask",
        f"shape {(batch_size, seqlen)} or {(batch_size, 1, '1 or seqlen', seqlen)}",
        tuple(mask.shape),
    )
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        "attention_mask",
        "a 4-D mask of dtype bool (True = attend) or float (added to the scores)",
        mask.dtype,
        "pass mask.bool()",
    )
    if mask.dtype != torch.bool:
        forbidden = mask <= -1e4  # finfo.min, -inf, and the -10000 of older scripts: all give p = 0
        require(
            bool((forbidden | (mask == 0)).all()),
            "attention_mask",
            "an additive mask of zeros and very large negative numbers",
            "a bias",
            "the packed encoder has no attention bias",
        )
        mask = ~forbidden
    first = mask[:, :1, :1]
    require(
        mask.shape[1:3] == (1, 1) or bool((mask == first).all()),
        "attention_mask",
        "key padding, the same for every query and head",
        f"a general mask of shape {tuple(mask.shape)}",
        "the packed encoder runs no causal or block mask",
    )
    return first[:, 0, 0].expand(batch_size, seqlen)
