"""Dropout (Srivastava et al. 2014) by counter: `fastbert.rng` defines the random bits.

The masks here are for plain PyTorch. The Triton kernels draw the bits where they use them, mostly
fused into other operators.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import rng as random
from fastbert.backend import DTYPES, op
from fastbert.check import require, require_rows
from fastbert.ops.fused import as_rows, run, shaped
from fastbert.rng import DropoutState


class KeepMask(NamedTuple):
    """A call of `hidden_keep_mask` or `attention_keep_mask`, with the sizes of the result.

    token_key, state, site: the fields of a `DropoutState`
    """

    token_key: Tensor
    state: Tensor
    site: int
    sizes: tuple[int, ...]
    dropout_p: float


@op("ext")
def hidden_keep_mask(rng: DropoutState, num_cols: int, dropout_p: float) -> KeepMask:
    """(T, num_cols) bool, True where an element of the residual stream (T, num_cols) is kept.

    rng: with T token keys; dropout_p: the probability of dropping. Arguments are not checked.
    """
    return KeepMask(rng.token_key, rng.state, rng.site, (num_cols,), dropout_p)


@op("ext")
def attention_keep_mask(
    rng: DropoutState, num_heads: int, num_keys: int, dropout_p: float
) -> KeepMask:
    """(N, T, num_keys) bool, True where a query's attention probability for a key is kept.

    rng: with T token keys, one per query; keys are counted within a sequence; dropout_p: the
    probability of dropping. Arguments are not checked.
    """
    return KeepMask(rng.token_key, rng.state, rng.site, (num_heads, num_keys), dropout_p)


@hidden_keep_mask.plain
@attention_keep_mask.plain
def _plain(call: KeepMask) -> Tensor:
    return _keep_mask(*call[:3], list(call.sizes), call.dropout_p)


@hidden_keep_mask.fused
@attention_keep_mask.fused
def _fused(kernels: Any, call: KeepMask) -> Tensor:
    is_hidden = len(call.sizes) == 1
    mask = kernels.hidden_keep_mask if is_hidden else kernels.attention_keep_mask
    return mask(*call[:3], *call.sizes, random.threshold(call.dropout_p))


class Dropout(NamedTuple):
    """A call of `dropout`; rng: None if nothing is dropped."""

    x: Tensor
    dropout_p: float
    rng: DropoutState | None


@op("triton")
def dropout(x: Tensor, dropout_p: float, rng: DropoutState | None = None) -> Dropout:
    """Zeros elements of x (..., H) with probability dropout_p and scales up the others.

    rng: with a token key for each row of x; None draws a fresh state from torch's generator.
    Returns x.dtype; x itself if dropout_p is 0. Raises ValueError for an x without dimensions or of
    integers, a dropout_p outside [0, 4095/4096], or an rng of another size, device or dtype.
    """
    require_rows("dropout", x)
    rng = checked_rng("dropout", x.shape[:-1].numel(), x.device, dropout_p, rng)
    return Dropout(x, dropout_p, rng)


@dropout.plain
def _plain_dropout(call: Dropout) -> Tensor:
    x, dropout_p, rng = call
    return x if rng is None else dropped(x, dropout_p, rng)


@dropout.refuses
def _refusal(call: Dropout) -> str | None:
    return None if call.x.dtype in DTYPES else str(call.x.dtype)


@dropout.fused
def _dropout_fused(kernels: Any, call: Dropout) -> Tensor:
    x, dropout_p, rng = call
    if rng is None:
        return x
    return run(DropoutFunction, kernels, (x, *device_numbers(rng, dropout_p)))


class DropoutFunction(torch.autograd.Function):
    """Linear in x: its gradient is the same function of dy, and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, *numbers: Any) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(*numbers[:2])
            ctx.kernels, ctx.numbers = kernels, numbers[2:]
        return shaped(kernels.dropout(as_rows(x), *numbers), x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call = (dy, *ctx.saved_tensors, *ctx.numbers)
        return None, run(DropoutFunction, ctx.kernels, call), None, None, None, None


def dropped(x: Tensor, dropout_p: float, rng: DropoutState) -> Tensor:
    """`dropout` without a check of the arguments."""
    keep = hidden_keep_mask(rng, x.shape[-1], dropout_p)
    return kept(x, keep if x.ndim == 2 else keep.view(x.shape), dropout_p)


def kept(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """x scaled where the bool tensor `keep`, of x's shape, is True; zeros elsewhere.

    Autograd saves only the mask for the backward, one byte per element.
    """
    return x * keep * random.keep_scale(dropout_p)


def checked_rng(
    who: str, num_rows: int, device: torch.device, dropout_p: float, rng: DropoutState | None
) -> DropoutState | None:
    """`drawn`, after a check of the user's arguments.

    Raises ValueError unless dropout_p is valid and `rng` fits `num_rows` rows on `device`.
    """
    keeps_some = random.keeps_some(dropout_p)
    require(keeps_some, who, "a dropout_p in [0, 4095/4096]", dropout_p)
    if rng is not None and random.threshold(dropout_p):
        key = rng.token_key
        if key.shape != (num_rows,) or not key.device == rng.state.device == device:
            expected = f"an rng with a token_key of shape ({num_rows},), one key a row, on {device}"
            require(False, who, expected, f"{tuple(key.shape)} on {key.device}")
        dtypes = key.dtype, rng.state.dtype
        require(dtypes == (torch.int64,) * 2, who, "an rng of int64 tensors", dtypes)
        shape = tuple(rng.state.shape)
        require(shape == (2,), who, "an rng whose state has shape (2,)", shape)
    return drawn(num_rows, device, dropout_p, rng)


def drawn(
    num_rows: int, device: torch.device, dropout_p: float, rng: DropoutState | None
) -> DropoutState | None:
    """The dropout state for `num_rows` rows: `rng`, or a fresh one; None if dropout_p is 0."""
    if not random.threshold(dropout_p):
        return None
    return random.fresh(num_rows, device) if rng is None else rng


def device_numbers(
    rng: DropoutState | None, dropout_p: float
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The launchers' dropout arguments: state, token_key, site and threshold."""
    if rng is None:
        return None, None, 0, 0
    state, token_key = rng.state.contiguous(), rng.token_key.contiguous()
    return state, token_key, rng.site, random.threshold(dropout_p)


@hidden_keep_mask.traces
@attention_keep_mask.traces
def _fake(token_key: Tensor, state: Tensor, site: int, *sizes_and_limit: int) -> Tensor:
    *heads, num_cols, _ = sizes_and_limit
    return token_key.new_empty((*heads, token_key.shape[0], num_cols), dtype=torch.bool)


# Opaque, because torch 2.13's inductor computes other bits on a CPU if it fuses several of these
# masks into one loop.
@random.opaque(lambda token_key, state, site, sizes, _: _fake(token_key, state, site, *sizes, 0))
def _keep_mask(
    token_key: Tensor, state: Tensor, site: int, sizes: list[int], dropout_p: float
) -> Tensor:
    drawn = DropoutState(state, token_key, site)
    if len(sizes) == 1:
        return random.hidden_keep_mask(drawn, sizes[0], dropout_p)
    return random.attention_keep_mask(drawn, sizes[0], sizes[1], dropout_p)
