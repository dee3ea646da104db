"""Softmax attention within each sequence of a packed batch (Vaswani et al. 2017).

B sequences, T packed tokens, N heads, D head size, S the longest sequence.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.attention_plain import (
    Call,
    attend_alike,
    attend_by_sequence,
    attend_padded,
    lengths_of,
    reads_lengths,
)
from fastbert.rng import RESOLUTION, DropoutState, fresh, threshold

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128  # of the kernels, as is the number of sequences
MAX_SEQUENCES = 65534


@op("triton", dtypes=DTYPES)
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
) -> Tensor:
    """Each query attends to the keys of its own sequence and to no other.

    q: (T_q, N, D); k, v: (T_k, N, D), of one dtype; cu_seqlens_q, cu_seqlens_k: (B + 1,) int32,
    where the sequences begin and end among queries and among keys; max_seqlen_q, max_seqlen_k:
    upper bounds of their lengths; softmax_scale: 1 / sqrt(D) if None.

    dropout_p: of the attention probabilities, in steps of 1/4096; rng: where its bits come from,
    with a token key for each query; a fresh state of torch's generator if None.

    mask: broadcasts to (B, N, max_seqlen_q, max_seqlen_k); boolean, True where a query attends to a
    key, or what is added to the scaled scores, where less than -1e30 counts as -inf. Rows and
    columns are places within a sequence.

    Returns (T_q, N, D) in q.dtype; zeros for a query without a key, and behind the last sequence.
    Sequences of length 0 are legal. Raises ValueError for other shapes and dtypes.
    """
    call = _checked(
        "attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, dropout_p, rng, mask,
    )  # fmt: skip
    if not reads_lengths(call):
        return attend_padded(q, k, v, call)
    lengths_q, lengths_k = lengths_of(cu_seqlens_q, q), lengths_of(cu_seqlens_k, k)
    rows = zip((q, k, v), (lengths_q, lengths_k, lengths_k), strict=True)
    split = (x.transpose(0, 1).split(lengths, dim=1) for x, lengths in rows)
    return attend_by_sequence(list(zip(*split, strict=True)), call)


@op("triton", dtypes=DTYPES)
def attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: DropoutState | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`attention` of tokens that attend to the tokens of their own sequence.

    qkv: (T, 3, N, D), queries, keys and values; cu_seqlens: (B + 1,) int32; max_seqlen: an upper
    bound of the lengths. The rest is as in `attention`. Returns (T, N, D) in qkv.dtype.
    """
    call = _checked_packed(
        qkv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale, dropout_p=dropout_p, rng=rng,
        mask=mask,
    )  # fmt: skip
    if not reads_lengths(call):
        q, k, v = qkv.unbind(1)
        return attend_padded(q, k, v, call)
    lengths = lengths_of(cu_seqlens, qkv)
    is_plain = call.mask is None and call.rng is None
    if is_plain and lengths[-1] == 0 < lengths[0] and len({*lengths[:-1]}) == 1:
        return attend_alike(qkv, len(lengths) - 1, call)
    # one split, whose backward is one concatenation: slices would each zero a whole gradient
    sequences = qkv.permute(1, 2, 0, 3).split(lengths, dim=2)
    return attend_by_sequence([one.unbind() for one in sequences], call)


def _checked(
    who, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, dropout_p, rng, mask,
) -> Call:  # fmt: skip
    shape = "of shape (tokens, heads, head_dim)"
    if q.ndim != 3:
        require(False, who, f"q {shape}", tuple(q.shape))
    expected = (k.shape[0], *q.shape[1:])
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected:
            require(False, who, f"{name} {shape}, {expected}", tuple(x.shape))
        if x.dtype != q.dtype:
            require(False, who, f"{name} of q's dtype {q.dtype}", x.dtype)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dtype != torch.int32 or x.ndim != 1 or x.shape != cu_seqlens_q.shape or not len(x):
            found = f"{x.dtype} {tuple(x.shape)}"
            require(False, who, f"{name} of dtype int32 and shape (batch + 1,)", found)
    if dropout_p < 0 or threshold(dropout_p) >= RESOLUTION:
        most = (RESOLUTION - 1) / RESOLUTION
        require(False, who, f"dropout_p from 0 to {most:.4f}", dropout_p)
    if not threshold(dropout_p):
        rng = None
    elif rng is None:
        rng = fresh(len(q), q.device)
    else:
        got = tuple(rng.token_key.shape)
        require(got == (len(q),), who, f"rng with a token key a query, {len(q)}", got)
    if mask is not None:
        mask = _expanded(who, mask, (len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q, max_seqlen_k))
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    return Call(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, dropout_p, rng, mask, q.shape[1],
    )  # fmt: skip


def _checked_packed(
    qkv, cu_seqlens, max_seqlen, softmax_scale=None, dropout_p=0.0, rng=None, mask=None
) -> Call:
    require(
        qkv.ndim == 4 and qkv.shape[1] == 3,
        "attention_qkvpacked",
        "qkv of shape (tokens, 3, heads, head_dim)",
        tuple(qkv.shape),
    )
    q, k, v = qkv.unbind(1)
    return _checked(
        "attention_qkvpacked", q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        softmax_scale, dropout_p, rng, mask,
    )  # fmt: skip


def _expanded(who: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    require(
        mask.ndim <= 4
        and all(size in (1, full) for size, full in sizes)
        and (mask.dtype == torch.bool or mask.is_floating_point()),
        who,
        f"mask of dtype bool or floating, broadcasting to {shape}",
        f"{mask.dtype} {tuple(mask.shape)}",
    )
    return mask.expand(shape)


@attention.refuses
def _refusal(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    *, softmax_scale=None, dropout_p=0.0, rng=None, mask=None,
) -> str | None:  # fmt: skip
    return _refused((q, k, v, cu_seqlens_q, cu_seqlens_k), softmax_scale, rng, mask)


@attention_qkvpacked.refuses
def _refusal_packed(
    qkv, cu_seqlens, max_seqlen, *, softmax_scale=None, dropout_p=0.0, rng=None, mask=None
) -> str | None:
    return _refused((qkv, cu_seqlens), softmax_scale, rng, mask)


def _refused(tensors, softmax_scale, rng, mask) -> str | None:
    first = tensors[0]
    others = tensors[1:] + (() if mask is None else (mask,))
    if rng is not None:
        others += (rng.token_key, rng.state)
    if any(x.device != first.device for x in others):
        return "tensors on different devices"
    if not 0 < first.shape[-1] <= MAX_HEAD_DIM:
        return f"head_dim {first.shape[-1]}, only for 1 to {MAX_HEAD_DIM}"
    if softmax_scale is not None and softmax_scale <= 0:
        return f"softmax_scale {softmax_scale}, only for positive ones"
    if len(tensors[-1]) - 1 > MAX_SEQUENCES:
        return f"{len(tensors[-1]) - 1} sequences, only for up to {MAX_SEQUENCES}"
    if mask is not None and mask.requires_grad:
        return "a gradient of the mask"
    return None


@attention.describes
def _variant(
    kernels: Any, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    *, softmax_scale=None, dropout_p=0.0, rng=None, mask=None,
) -> str:  # fmt: skip
    longest = max(max_seqlen_q, max_seqlen_k)
    return kernels.variant(q, longest, mask=mask is not None, dropout=threshold(dropout_p) > 0)


@attention_qkvpacked.describes
def _variant_packed(kernels: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options):
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _variant(kernels, *qkv.unbind(1), *lengths, **options)


@attention.fused
def _fused(
    kernels: Any, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    *, softmax_scale=None, dropout_p=0.0, rng=None, mask=None,
) -> Tensor:  # fmt: skip
    call = _checked(
        "attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, dropout_p, rng, mask,
    )  # fmt: skip
    return _Attention.apply(kernels, call, q, k, v)


@attention_qkvpacked.fused
def _fused_packed(kernels: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options):
    return _Attention.apply(kernels, _checked_packed(qkv, cu_seqlens, max_seqlen, **options), qkv)


class _Attention(torch.autograd.Function):
    """Of q, k and v, or of one tensor of all three, whose gradient is then one tensor too."""

    @staticmethod
    def forward(ctx, kernels, call: Call, *tensors: Tensor) -> Tensor:
        tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(1)
        words = _drop_words(kernels, call)
        out, lse = kernels.attention_fwd(
            q, k, v, *call[:4], call.softmax_scale, call.mask, words, call.keep_scale
        )
        if words is not None and words.nbytes > q.nbytes + k.nbytes + v.nbytes:
            words = None  # long sequences: the backward makes them again, the same
        ctx.save_for_backward(out, lse, words, *tensors)
        ctx.kernels, ctx.call = kernels, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        out, lse, words, *tensors = ctx.saved_tensors
        kernels, call = ctx.kernels, ctx.call
        if words is None:
            words = _drop_words(kernels, call)
        options = (call.softmax_scale, call.mask, words, call.keep_scale)
        if len(tensors) == 3:
            gradients = kernels.attention_bwd(dout, *tensors, out, lse, *call[:4], *options)
            return None, None, *gradients
        lengths = (call.cu_seqlens_q, call.max_seqlen_q)
        return None, None, kernels.attention_qkvpacked_bwd(
            dout, *tensors, out, lse, *lengths, *options
        )  # fmt: skip


def _drop_words(kernels: Any, call: Call) -> Tensor | None:
    if call.rng is None:
        return None
    return kernels.attention_drop_words(
        call.rng.token_key, call.rng.state, *call[:4], call.num_heads,
        call.rng.site, threshold(call.dropout_p),
    )  # fmt: skip
