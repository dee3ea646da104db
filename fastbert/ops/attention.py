"""Softmax attention within each sequence of a packed batch (Vaswani et al. 2017).

B sequences, T packed tokens, N heads, D head size, S the longest sequence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.unpad import Unpadding
from fastbert.rng import (
    RESOLUTION,
    DropoutState,
    attention_drop_words,
    attention_keep_mask,
    fresh,
    keep_scale,
    threshold,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128  # of the kernels, as is the number of sequences
MAX_SEQUENCES = 65534
MASKED = -1e30  # addends of a mask that are lower count as -inf


class _Call(NamedTuple):
    """The arguments of one call beside queries, keys and values, checked and completed."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    dropout_p: float
    rng: DropoutState | None  # None where nothing is dropped
    mask: Tensor | None  # (B, N, S_q, S_k), expanded
    num_heads: int

    @property
    def keep_scale(self) -> float:
        return 1.0 if self.rng is None else keep_scale(self.dropout_p)


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
    if not _reads_lengths(call):
        return _attend_padded(q, k, v, call)
    lengths_q, lengths_k = _lengths(cu_seqlens_q, q), _lengths(cu_seqlens_k, k)
    rows = zip((q, k, v), (lengths_q, lengths_k, lengths_k), strict=True)
    split = (x.transpose(0, 1).split(lengths, dim=1) for x, lengths in rows)
    return _attend_by_sequence(list(zip(*split, strict=True)), call)


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
    if not _reads_lengths(call):
        return _attend_padded(*qkv.unbind(1), call)
    # one split, whose backward is one concatenation: slices would each zero a whole gradient
    sequences = qkv.permute(1, 2, 0, 3).split(_lengths(cu_seqlens, qkv), dim=2)
    return _attend_by_sequence([one.unbind() for one in sequences], call)


def _reads_lengths(call: _Call) -> bool:
    """A CPU reads the lengths for nothing and does no work on padding; elsewhere the host would
    wait for them, and one call for all sequences is what keeps a GPU busy."""
    return call.cu_seqlens_q.is_cpu and not torch.compiler.is_compiling()


def _lengths(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    """Of the sequences, and of what is behind the last one."""
    return cu_seqlens.diff(append=cu_seqlens.new_tensor([len(x)])).tolist()


def _attend_by_sequence(sequences: list[tuple[Tensor, ...]], call: _Call) -> Tensor:
    """sequences: q (N, n_q, D), k and v (N, n_k, D) of each; the last is what is behind them."""
    q, k, v = sequences[-1]
    sequences = [*sequences[:-1], (q, k[:, :0], v[:, :0])]
    keeps = _keep_mask(call).split([q.shape[1] for q, _, _ in sequences], 1) if call.rng else None
    outputs = []
    for number, (q, k, v) in enumerate(sequences):
        num_queries, num_keys = q.shape[1], k.shape[1]
        if num_keys and call.mask is None and keeps is None:
            # four dimensions, because with three PyTorch's own fused kernel is not taken
            scale = call.softmax_scale
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        else:
            keep = None if keeps is None else keeps[number][..., :num_keys]
            mask = None
            if call.mask is not None and num_keys:
                mask = call.mask[number, :, :num_queries, :num_keys]
            out = _attend(q, k, v, call, mask, keep)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
    of_queries = Unpadding.from_cu_seqlens(call.cu_seqlens_q, call.max_seqlen_q, len(q))
    of_keys = Unpadding.from_cu_seqlens(call.cu_seqlens_k, call.max_seqlen_k, len(k))
    q = of_queries.pad(q).transpose(1, 2)  # (B, N, S, D)
    k, v = (of_keys.pad(x).transpose(1, 2) for x in (k, v))
    column = torch.arange(call.max_seqlen_k, device=k.device)
    is_key = (column < call.cu_seqlens_k.diff()[:, None])[:, None, None]
    if call.mask is None and call.rng is None and call.cu_seqlens_q is call.cu_seqlens_k:
        scale = call.softmax_scale  # here only padding is without a key
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key, scale=scale)
    else:
        keep = None
        if call.rng is not None:
            keep = of_queries.pad(_keep_mask(call).transpose(0, 1)).transpose(1, 2)
        mask = is_key
        if call.mask is not None:
            without = False if call.mask.dtype == torch.bool else float("-inf")
            mask = call.mask.masked_fill(~is_key, without)
        out = _attend(q, k, v, call, mask, keep)
    return of_queries.pack(out.transpose(1, 2))


def _keep_mask(call: _Call) -> Tensor:
    """(N, T_q, S_k) bool"""
    assert call.rng is not None
    num_words = -(-call.max_seqlen_k // 32)
    num_heads = call.num_heads
    words = attention_drop_words(call.rng, num_heads, num_words, call.dropout_p)
    return attention_keep_mask(words, call.max_seqlen_k)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, mask: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Softmax attention written out; leading dimensions of all are alike."""
    scores = q @ k.mT * call.softmax_scale
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.masked_fill(mask < MASKED, float("-inf"))
        is_dead = (scores == float("-inf")).all(-1, keepdim=True)  # a row without a key
        scores = scores.masked_fill(is_dead, 0.0)
        p = scores.softmax(-1).masked_fill(is_dead, 0.0)
    else:
        p = scores.softmax(-1)
    if keep is not None:
        p = p * keep * call.keep_scale
    return p.to(v.dtype) @ v


def _checked(
    who, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, dropout_p, rng, mask,
) -> _Call:  # fmt: skip
    shape = "of shape (tokens, heads, head_dim)"
    require(q.ndim == 3, who, f"q {shape}", tuple(q.shape))
    for name, x in (("k", k), ("v", v)):
        expected = (k.shape[0], *q.shape[1:])
        require(x.shape == expected, who, f"{name} {shape}, {expected}", tuple(x.shape))
        require(x.dtype == q.dtype, who, f"{name} of q's dtype {q.dtype}", x.dtype)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require(
            x.dtype == torch.int32 and x.ndim == 1 and x.shape == cu_seqlens_q.shape and len(x) > 0,
            who,
            f"{name} of dtype int32 and shape (batch + 1,)",
            f"{x.dtype} {tuple(x.shape)}",
        )
    require(
        dropout_p >= 0 and threshold(dropout_p) < RESOLUTION,
        who,
        f"dropout_p from 0 to {(RESOLUTION - 1) / RESOLUTION:.4f}",
        dropout_p,
    )
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
    return _Call(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, dropout_p, rng, mask, q.shape[1],
    )  # fmt: skip


def _checked_packed(
    qkv, cu_seqlens, max_seqlen, softmax_scale=None, dropout_p=0.0, rng=None, mask=None
) -> _Call:
    require(
        qkv.ndim == 4 and qkv.shape[1] == 3,
        "attention_qkvpacked",
        "qkv of shape (tokens, 3, heads, head_dim)",
        tuple(qkv.shape),
    )
    return _checked(
        "attention_qkvpacked", *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
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
    def forward(ctx, kernels, call: _Call, *tensors: Tensor) -> Tensor:
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


def _drop_words(kernels: Any, call: _Call) -> Tensor | None:
    if call.rng is None:
        return None
    return kernels.attention_drop_words(
        call.rng.token_key, call.rng.state, *call[:4], call.num_heads,
        call.rng.site, threshold(call.dropout_p),
    )  # fmt: skip
