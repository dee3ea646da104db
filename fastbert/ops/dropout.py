"""The masks of dropout, a function of each element's place; `fastbert.rng` defines their bits.

For plain PyTorch: Triton's kernels make the bits where they use them.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastbert import backend
from fastbert import rng as dropout_rng
from fastbert.backend import op
from fastbert.rng import DropoutState


@op("ext")
def hidden_keep_mask(rng: DropoutState, num_cols: int, dropout_p: float) -> Tensor:
    """(T, num_cols) bool, True where an element of the packed stream is kept."""
    return dropout_rng.hidden_keep_mask(rng, num_cols, dropout_p)


@hidden_keep_mask.fused
def _hidden_keep_mask_fused(
    kernels: Any, rng: DropoutState, num_cols: int, dropout_p: float
) -> Tensor:
    limit = dropout_rng.threshold(dropout_p)
    return kernels.hidden_keep_mask(rng.token_key, rng.state, rng.site, num_cols, limit)


@op("ext")
def attention_drop_words(
    rng: DropoutState, num_heads: int, num_words: int, dropout_p: float
) -> Tensor:
    """(N, T, num_words) int32: bit j of word w is set where a query drops key 32 * w + j."""
    return dropout_rng.attention_drop_words(rng, num_heads, num_words, dropout_p)


@attention_drop_words.fused
def _attention_drop_words_fused(
    kernels: Any, rng: DropoutState, num_heads: int, num_words: int, dropout_p: float
) -> Tensor:
    limit = dropout_rng.threshold(dropout_p)
    return kernels.attention_drop_words(
        rng.token_key, rng.state, rng.site, num_heads, num_words, limit
    )


def dropout(x: Tensor, dropout_p: float, rng: DropoutState | None = None) -> Tensor:
    """Zeros elements of x (..., H) with probability dropout_p and scales the others to make up.

    The rows of x are the tokens of `rng`; without one, fresh random numbers are drawn.
    """
    if dropout_rng.threshold(dropout_p) == 0:
        return x
    rows, num_cols = x.shape[:-1], x.shape[-1]
    if rng is None:
        rng = dropout_rng.fresh(rows.numel(), x.device)
    keep = hidden_keep_mask(rng, num_cols, dropout_p).view(x.shape)
    return x * keep * dropout_rng.keep_scale(dropout_p)


with contextlib.suppress(backend.BackendUnavailable):
    backend.load("ext", "hidden_keep_mask", "cpu")

    @torch.library.register_fake("fastbert::hidden_keep_mask")
    def _(token_key, state, site, num_cols, threshold):
        return token_key.new_empty((token_key.shape[0], num_cols), dtype=torch.bool)

    @torch.library.register_fake("fastbert::attention_drop_words")
    def _(token_key, state, site, num_heads, num_words, threshold):
        shape = (num_heads, token_key.shape[0], num_words)
        return token_key.new_empty(shape, dtype=torch.int32)
