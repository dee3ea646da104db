"""Softmax attention within each sequence of a packed batch (Vaswani et al. 2017).

B sequences, T packed tokens, N heads, D head size, S the longest sequence.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert.backend import DTYPES, op, place
from fastbert.check import require, require_floats
from fastbert.ops.attention_plain import Attention, attend
from fastbert.ops.dropout import checked_rng, device_numbers
from fastbert.ops.fused import once, run
from fastbert.rng import DropoutState, keep_scale

MAX_HEAD_DIM = 128  # a limit of the kernels
MAX_SEQUENCES = 65534  # a limit of the kernels: the third axis of a grid has 16 bits


@op("triton")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    mask: Tensor | None = None,
) -> Attention:
    """Softmax attention of each query to the keys of its own sequence, and to no other key.

    q: (T_q, N, D); k, v: (T_k, N, D), of one dtype; cu_seqlens_q, cu_seqlens_k: (B + 1,) int32,
    where the sequences begin and end among queries and among keys; max_seqlen_q, max_seqlen_k:
    upper bounds of their lengths; softmax_scale: 1 / sqrt(D) if None.

    dropout_p: probability of dropping an attention probability, rounded to a multiple of 1/4096;
    rng: the dropout state, with a token key for each query; None draws one from torch's generator.

    mask: broadcasts to (B, N, max_seqlen_q, max_seqlen_k). It is boolean, True where a query
    attends to a key, or floating, added to the scaled scores. Numbers below -1e30 mean -inf; the
    kernels take others below -65536 as -65536. Rows and columns are positions within a sequence.

    Returns (T_q, N, D) in q.dtype, with zeros for queries that have no key or follow the last
    sequence. Sequences of length 0 are legal. Raises ValueError for other shapes and dtypes, and
    for a dropout_p outside [0, 4095/4096]; on a CPU the plain body also for cu_seqlens that do not
    rise from 0 and for a max_seqlen below a length. On a GPU these are not checked, because reading
    them would make the host wait: if they are wrong, results are undefined.
    """
    who = "attention"
    require_floats(who, q=q)
    shape = "of shape (tokens, heads, head_dim)"
    if q.ndim != 3:
        require(False, who, f"q {shape}", tuple(q.shape))
    expected = (k.shape[0], *q.shape[1:])
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            require(False, who, f"{name} {shape}, {expected}", tuple(x.shape))
        if x.dtype != q.dtype:
            require(False, who, f"{name} of q's dtype {q.dtype}", x.dtype)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    call = Attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        scale, dropout_p, rng, mask,
    )  # fmt: skip
    return _checked(who, call)


@op("triton")
def attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    mask: Tensor | None = None,
    qkv_bias: Tensor | None = None,
) -> Attention:
    """`attention` for queries, keys and values that are projections of the same tokens.

    qkv: (T, 3, N, D), queries, keys and values; cu_seqlens: (B + 1,) int32; max_seqlen: an upper
    bound of the lengths. The other arguments are those of `attention`. Returns (T, N, D) in
    qkv.dtype. Raises ValueError as `attention` does.

    qkv_bias: (3 N D,), the bias of the linear layer that made qkv, if that layer got it detached.
    Its values are part of qkv already and are not read. Its gradient, the sum of qkv's gradient
    over the tokens, is a by-product of the kernels. For the keys they return its exact value, 0: a
    bias of all keys adds the same number to all scores of a query, which changes no probability.
    """
    who = "attention_qkvpacked"
    require_floats(who, qkv=qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        require(False, who, "qkv of shape (tokens, 3, heads, head_dim)", tuple(qkv.shape))
    scale = qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if qkv_bias is not None:
        size = qkv.shape[1:].numel()
        fits = qkv_bias.shape == (size,) and qkv_bias.is_floating_point()
        got = f"{qkv_bias.dtype} {tuple(qkv_bias.shape)}"
        require(fits, who, f"qkv_bias of a floating dtype and shape ({size},)", got)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call = Attention(qkv, None, None, *lengths, scale, dropout_p, rng, mask, qkv_bias)
    return _checked(who, call)


def _checked(who: str, call: Attention) -> Attention:
    """Completes the call for the kernels: contiguous boundaries, dropout state, expanded mask."""
    q, boundaries, dropout_p, rng = call.q, call[3:5], call.dropout_p, call.rng
    for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), boundaries, strict=True):
        if x.dtype != torch.int32 or x.ndim != 1 or x.shape != boundaries[0].shape or not len(x):
            found = f"{x.dtype} {tuple(x.shape)}"
            require(False, who, f"{name} of dtype int32 and shape (batch + 1,)", found)
    mask = call.mask
    if mask is not None:
        shape = len(boundaries[0]) - 1, q.shape[-2], *call[5:7]
        check_mask(who, mask, shape)
        mask = mask.expand(shape)
    of_q, of_k = (x.contiguous() for x in boundaries)
    rng = checked_rng(who, len(q), q.device, dropout_p, rng)
    return call._replace(cu_seqlens_q=of_q, cu_seqlens_k=of_k, rng=rng, mask=mask)


def check_mask(who: str, mask: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the mask broadcasts to `shape`, where a str stands for any size."""
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    require(
        mask.ndim <= 4
        and all(isinstance(full, str) or size in (1, full) for size, full in sizes)
        and (mask.dtype == torch.bool or mask.is_floating_point()),
        who,
        f"a mask of dtype bool or floating, broadcasting to {shape}",
        f"{mask.dtype} {tuple(mask.shape)}",
    )


attention.plain(attend)
attention_qkvpacked.plain(attend)


@attention.refuses
@attention_qkvpacked.refuses
def _refusal(call: Attention) -> str | None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, _, scale, _, _, mask, bias = call
    if q.dtype not in DTYPES:
        return str(q.dtype)
    if bias is not None and bias.dtype not in DTYPES:
        return f"a bias of {bias.dtype}"
    device = place(q)
    for x in (k, v, cu_seqlens_q, cu_seqlens_k, mask, bias):
        if x is not None and place(x) != device:
            return "tensors on different devices"
    head_dim, sequences = q.shape[-1], cu_seqlens_q.shape[0] - 1
    if not 0 < head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim}, only for 1 to {MAX_HEAD_DIM}"
    if scale <= 0:
        return f"softmax_scale {scale}, only for positive ones"
    if sequences > MAX_SEQUENCES:
        return f"{sequences} sequences, only for up to {MAX_SEQUENCES}"
    if mask is not None and mask.requires_grad:
        return "a gradient of the mask"
    return None


@attention.describes
@attention_qkvpacked.describes
def _variant(kernels: Any, call: Attention) -> str:
    longest = max(call.max_seqlen_q, call.max_seqlen_k)
    about = {"mask": call.mask is not None, "dropout": call.rng is not None}
    return kernels.variant(call.q, longest, **about)


@attention.fused
@attention_qkvpacked.fused
def _fused(kernels: Any, call: Attention) -> Tensor:
    # call[3:] as a tuple: it may have cu_seqlens twice, and torch.compile refuses repeated tensors
    return run(AttentionFunction, kernels, (*call[:3], call.qkv_bias, call[3:-1]))


class AttentionFunction(torch.autograd.Function):
    """Attention of q, k and v, or of a packed qkv (k and v None), whose gradient is packed too.

    bias: the bias of a packed qkv, passed only to get its gradient; or None.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, q: Tensor, k: Tensor | None, v: Tensor | None,
        bias: Tensor | None, others: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        *lengths, softmax_scale, dropout_p, rng, mask = others
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v) if x is not None]
        q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(1)
        drops = (q.shape[1], *device_numbers(rng, dropout_p))
        words = _drop_words(kernels, lengths, *drops)
        scale = 1.0 if rng is None else keep_scale(dropout_p)
        out, *lse = kernels.attention_fwd(
            q, k, v, *lengths, softmax_scale, mask, words, scale, ctx is not None
        )
        if ctx is None:
            return out
        if words is not None and words.nbytes > q.nbytes + k.nbytes + v.nbytes:
            words = None  # long sequences: the backward draws the same words again
        ctx.save_for_backward(out, *lse, words, mask, *tensors)
        ctx.kernels, ctx.lengths, ctx.drops = kernels, lengths, drops
        ctx.softmax_scale, ctx.keep_scale = softmax_scale, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once("attention")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, words, mask, *tensors = ctx.saved_tensors
        kernels, lengths = ctx.kernels, ctx.lengths
        if words is None:
            words = _drop_words(kernels, lengths, *ctx.drops)
        q, k, v = tensors if len(tensors) == 3 else (*tensors, None, None)
        dq, *others = kernels.attention_bwd(
            dout, q, k, v, out, lse, *lengths, ctx.softmax_scale, mask, words, ctx.keep_scale,
            ctx.bias_dtype,
        )  # fmt: skip
        dk, dv = (None, None) if k is None else others
        dbias = others[0] if k is None and others else None
        return None, dq, dk, dv, dbias, None


def _drop_words(
    kernels: Any, lengths: list[Any], num_heads: int, state: Tensor | None,
    token_key: Tensor | None, site: int, limit: int,
) -> Tensor | None:  # fmt: skip
    if state is None:
        return None
    return kernels.attention_drop_words(token_key, state, *lengths, num_heads, site, limit)
