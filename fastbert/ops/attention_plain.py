"""Attention in plain PyTorch: the reference for the kernels of `fastbert.ops.attention`.

B sequences, T packed tokens, N heads, D head size, S the longest sequence.
"""

import itertools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.backend import forced, is_transformed
from fastbert.check import require
from fastbert.ops.dropout import attention_keep_mask, kept
from fastbert.ops.fused import without_autocast
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState

MASKED = -1e30  # numbers of an additive mask below this mean -inf
# On a CPU, short sequences are padded and attend all at once, because calling operators for each
# would take longer than computing them. With one thread this was faster for up to SHORT_ALIKE
# scores per sequence (of all heads) if lengths are equal, else up to SHORT, from MANY sequences on.
SHORT_ALIKE, SHORT, MANY = 2**15, 2**12, 8


class Attention(NamedTuple):
    """A call of `attention`, or, if k and v are None, of `attention_qkvpacked`.

    In the latter q is qkv (T, 3, N, D), and qkv_bias (3 N D,) a bias that is part of it already,
    passed only to get its gradient. rng: None without dropout; mask: (B, N, S_q, S_k).
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    dropout_p: float
    rng: DropoutState | None
    mask: Tensor | None
    qkv_bias: Tensor | None = None


def attend(call: Attention) -> Tensor:
    """The plain body of both operators."""
    with without_autocast(call.q):  # the result has q's dtype
        return _attend_all(call)


def _attend_all(call: Attention) -> Tensor:
    q, k, v, cu_seqlens_q, cu_seqlens_k = call[:5]
    if call.qkv_bias is not None:  # adds 0, with the derivative 1 with respect to the bias
        bias = call.qkv_bias
        q = q + (bias - bias.detach()).to(q.dtype).view(q.shape[1:])
    tensors = (q,) if k is None or v is None else (q, k, v)
    # cu_seqlens, max_seqlen and number of tokens: of queries, then of keys if theirs differ
    sides = [(cu_seqlens_q, call.max_seqlen_q, len(q))]
    if k is not None:
        keys = cu_seqlens_k, call.max_seqlen_k, len(k)
        if cu_seqlens_k is not cu_seqlens_q or keys[1:] != sides[0][1:]:
            sides.append(keys)
    if not reads_lengths(call):
        return attend_padded(tensors, [Unpadding.from_cu_seqlens(*side) for side in sides], call)
    lengths = [_lengths(*side) for side in sides]
    padded = _paddings(lengths, [side[0] for side in sides], call)
    if padded is not None:
        return attend_padded(tensors, padded, call)
    return attend_by_sequence(_sequences(tensors, lengths), call)


def reads_lengths(call: Attention) -> bool:
    """Whether to read the lengths, so that long sequences attend one by one, without padding.

    That is free on a CPU. A GPU would make the host wait, and is not kept busy by one sequence.
    """
    return call.cu_seqlens_q.is_cpu and not torch.compiler.is_compiling()


def _lengths(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> list[int]:
    """The lengths of the sequences, then the number of tokens after the last one.

    Raises ValueError for boundaries that do not rise from 0, or a sequence above max_seqlen.
    """
    bounds = [*cu_seqlens.tolist(), num_tokens]
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    if bounds[0] or min(lengths) < 0:
        got = f"{bounds[:-1]} for {num_tokens} tokens"
        require(False, "attention", "cu_seqlens that rise from 0 to at most the tokens", got)
    longest = max(lengths[:-1], default=0)
    if longest > max_seqlen:
        require(False, "attention", f"a max_seqlen of at least {longest}", max_seqlen)
    return lengths


def _paddings(
    lengths: list[list[int]], boundaries: list[Tensor], call: Attention
) -> list[Unpadding] | None:
    """The padded forms of queries and keys, or None if one sequence at a time is faster.

    Padding is faster for short sequences, and for equal lengths if PyTorch has a fused kernel.
    """
    count = len(lengths[0]) - 1
    if count < 2:
        return None
    longest = [max(own[:-1]) for own in lengths]
    scores = call.q.shape[-2] * longest[0] * longest[-1]
    are_dense = all(own == [most] * count + [0] for own, most in zip(lengths, longest, strict=True))
    pays = count >= MANY and scores <= SHORT
    if are_dense:
        pays = scores <= SHORT_ALIKE or (call.mask is None and call.rng is None)
    if not scores or not pays:
        return None
    found = []
    for own, most, bounds in zip(lengths, longest, boundaries, strict=True):
        if are_dense:
            found.append(Unpadding(None, None, bounds, most, (count, most)))
        else:
            found.append(Unpadding.from_cu_seqlens(bounds, most, sum(own)))
    return found


def _sequences(tensors: tuple[Tensor, ...], lengths: list[list[int]]) -> list[tuple[Tensor, ...]]:
    """q, k and v (N, n, D) of each sequence; tokens after the last form one more, without keys."""
    found: list[tuple[Tensor, ...]]
    # one split, whose backward is one concatenation: each slice's would zero a whole gradient
    if len(tensors) > 1:
        sizes = lengths[0], lengths[-1], lengths[-1]
        rows = zip(tensors, sizes, strict=True)
        found = [
            *zip(*(x.transpose(0, 1).split_with_sizes(n, dim=1) for x, n in rows), strict=True)
        ]
    else:
        packed, own = tensors[0].permute(1, 2, 0, 3), lengths[0]
        if len(own) == 2 and not own[1]:
            return [packed.unbind()]
        found = [one.unbind() for one in packed.split_with_sizes(own, dim=2)]
    q, k, v = found.pop()
    return [*found, (q, k[:, :0], v[:, :0])] if q.shape[1] or not found else found


def attend_by_sequence(sequences: list[tuple[Tensor, ...]], call: Attention) -> Tensor:
    """Attention of one sequence at a time; sequences: q (N, n_q, D), k and v (N, n_k, D) each."""
    drawn: list[DropoutState] = []
    if call.rng is not None:
        keys = call.rng.token_key.split([q.shape[1] for q, _, _ in sequences])
        drawn = [DropoutState(call.rng.state, key, call.rng.site) for key in keys]
    outputs = []
    for number, (q, k, v) in enumerate(sequences):
        num_queries, num_keys = q.shape[1], k.shape[1]
        if num_keys and call.mask is None and not drawn:
            # PyTorch uses its fused kernel only for four dimensions
            out = _sdpa(q[None], k[None], v[None], call)[0]
        else:
            keep = None
            if drawn:
                keep = attention_keep_mask(drawn[number], len(q), num_keys, call.dropout_p)
            mask = None
            if call.mask is not None and num_keys:
                mask = call.mask[number, :, :num_queries, :num_keys]
            out = _attend(q, k, v, call, mask, keep)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_padded(
    tensors: tuple[Tensor, ...], paddings: list[Unpadding], call: Attention
) -> Tensor:
    """Attention of all sequences at once; paddings: of queries, then of keys if theirs differ."""
    of_queries, of_keys = paddings[0], paddings[-1]
    if len(tensors) == 1:
        q, k, v = of_queries.pad(tensors[0]).permute(2, 0, 3, 1, 4).unbind()  # (B, N, S, D)
    else:
        q = of_queries.pad(tensors[0]).transpose(1, 2)
        k, v = (of_keys.pad(x).transpose(1, 2) for x in tensors[1:])
    mask = of_keys.mask
    if call.mask is None and call.rng is None and of_queries is of_keys:
        out = _sdpa(q, k, v, call, mask)  # only padding has no key here, and `pack` drops padding
    else:
        keep = None
        if call.rng is not None:
            keep = attention_keep_mask(call.rng, q.shape[1], k.shape[2], call.dropout_p)
            keep = of_queries.pad(keep.transpose(0, 1)).transpose(1, 2)
        if call.mask is not None:
            without = False if call.mask.dtype == torch.bool else float("-inf")
            own = call.mask[:, :, : q.shape[2], : k.shape[2]]
            mask = own if mask is None else own.masked_fill(~mask, without)
        out = _attend(q, k, v, call, mask, keep)
    return of_queries.pack(out.transpose(1, 2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Attention, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own attention, in the implementation that has the derivatives it may need."""
    if is_transformed():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=call.softmax_scale)
    if forced() == "reference" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Sdpa.apply(q, k, v, mask, call.softmax_scale)  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=call.softmax_scale)


class _Sdpa(torch.autograd.Function):
    """PyTorch's attention, twice differentiable; PyTorch's fast kernels are only once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the caller wants to differentiate the gradient
        kernel = sdpa_kernel(SDPBackend.MATH) if again else nullcontext()
        with torch.enable_grad(), without_autocast(dout), kernel:
            # autograd.grad needs distinct inputs, and q, k and v may be one tensor
            q, k, v = views = [
                x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs
            ]
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=ctx.scale)
            return *torch.autograd.grad(out, views, dout, create_graph=again), None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: Attention, mask: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Softmax attention written out; all tensors have the same leading dimensions."""
    # matmul would reshape its arguments to three dimensions first; bmm takes them as they are
    product = torch.bmm if q.ndim == 3 else torch.matmul
    scores = product(q * call.softmax_scale, k.mT)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.masked_fill(mask < MASKED, float("-inf"))
        is_dead = (scores == float("-inf")).all(-1, keepdim=True)  # queries without a key
        scores = scores.masked_fill(is_dead, 0.0)
        p = scores.softmax(-1).masked_fill(is_dead, 0.0)
    else:
        p = scores.softmax(-1)
    if keep is not None:
        p = kept(p, keep, call.dropout_p)
    return product(p if p.dtype == v.dtype else p.to(v.dtype), v)
