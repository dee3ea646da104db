"""Attention in plain PyTorch: the reference of the kernels of `fastbert.ops.attention`.

B sequences, T packed tokens, N heads, D head size, S the longest sequence.
"""

import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.backend import forced, is_transformed
from fastbert.ops.dropout import attention_keep_mask, kept
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState

MASKED = -1e30  # numbers of an additive mask below this mean -inf


class Call(NamedTuple):
    """A call of `attention`, or of `attention_qkvpacked` where k and v are None.

    q is then qkv (T, 3, N, D), and qkv_bias (3 N D,) a bias that is part of it, for the bias's
    gradient alone. rng: None without dropout; mask: (B, N, S_q, S_k).
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


def attend(call: Call) -> Tensor:
    """The plain body of both operators."""
    q, k, v, cu_seqlens_q, cu_seqlens_k = call[:5]
    bias = call.qkv_bias
    if bias is not None:  # adds 0, whose derivative by the bias is 1
        q = q + (bias - bias.detach()).to(q.dtype).view(q.shape[1:])
    if k is not None and v is not None:
        if not reads_lengths(call):
            return attend_padded((q, k, v), call)
        lengths_k = lengths_of(cu_seqlens_k, k)
        rows = zip((q, k, v), (lengths_of(cu_seqlens_q, q), lengths_k, lengths_k), strict=True)
        split = (x.transpose(0, 1).split_with_sizes(lengths, dim=1) for x, lengths in rows)
        return attend_by_sequence(_last_without_keys(zip(*split, strict=True)), call)
    if not reads_lengths(call):
        return attend_padded(q.unbind(1), call)
    lengths = lengths_of(cu_seqlens_q, q)
    is_plain = call.mask is None and call.rng is None
    if is_plain and lengths[-1] == 0 < lengths[0] and len({*lengths[:-1]}) == 1:
        return attend_alike(q, len(lengths) - 1, call)
    packed = q.permute(1, 2, 0, 3)
    if len(lengths) == 2 and not lengths[1]:
        return attend_by_sequence([packed.unbind()], call)
    # one split, whose backward is one concatenation: slices would each zero a whole gradient
    sequences = (one.unbind() for one in packed.split_with_sizes(lengths, dim=2))
    return attend_by_sequence(_last_without_keys(sequences), call)


def reads_lengths(call: Call) -> bool:
    """Whether to read the lengths and attend sequence by sequence, without work on padding.

    On a CPU reading them is free. On a GPU the host would wait, and only one call for all sequences
    keeps the GPU busy.
    """
    return call.cu_seqlens_q.is_cpu and not torch.compiler.is_compiling()


def lengths_of(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    """The lengths of the sequences, then the number of tokens behind the last one."""
    bounds = [*cu_seqlens.tolist(), x.shape[0]]
    return [end - begin for begin, end in itertools.pairwise(bounds)]


def _last_without_keys(found: Iterable[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The sequences; the tokens behind the last one become a sequence without keys."""
    *sequences, (q, k, v) = found
    if q.shape[1] or not sequences:
        sequences.append((q, k[:, :0], v[:, :0]))
    return sequences


def attend_alike(qkv: Tensor, count: int, call: Call) -> Tensor:
    """Attention of qkv (T, 3, N, D) for `count` sequences of equal length, without a copy."""
    q, k, v = qkv.view(count, -1, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
    return _sdpa(q, k, v, call).transpose(1, 2).flatten(0, 1)


def attend_by_sequence(sequences: list[tuple[Tensor, ...]], call: Call) -> Tensor:
    """Attention of one sequence at a time; sequences: q (N, n_q, D), k and v (N, n_k, D) each."""
    drawn: list[DropoutState] = []
    if call.rng is not None:
        keys = call.rng.token_key.split([q.shape[1] for q, _, _ in sequences])
        drawn = [DropoutState(call.rng.state, key, call.rng.site) for key in keys]
    outputs = []
    for number, (q, k, v) in enumerate(sequences):
        num_queries, num_keys = q.shape[1], k.shape[1]
        if num_keys and call.mask is None and not drawn:
            # PyTorch takes its fused kernel only for four dimensions
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


def attend_padded(tensors: tuple[Tensor, ...], call: Call) -> Tensor:
    """Attention of all sequences at once, padded; the host does not wait for their lengths."""
    q, k, v = tensors
    of_queries = Unpadding.from_cu_seqlens(call.cu_seqlens_q, call.max_seqlen_q, len(q))
    of_keys = Unpadding.from_cu_seqlens(call.cu_seqlens_k, call.max_seqlen_k, len(k))
    q = of_queries.pad(q).transpose(1, 2)  # (B, N, S, D)
    k, v = (of_keys.pad(x).transpose(1, 2) for x in (k, v))
    column = torch.arange(call.max_seqlen_k, device=k.device)
    is_key = (column < call.cu_seqlens_k.diff()[:, None])[:, None, None]
    if call.mask is None and call.rng is None and call.cu_seqlens_q is call.cu_seqlens_k:
        out = _sdpa(q, k, v, call, is_key)  # here only padding has no key, and `pack` drops that
    else:
        keep = None
        if call.rng is not None:
            sizes = q.shape[1], call.max_seqlen_k
            keep = attention_keep_mask(call.rng, *sizes, call.dropout_p)
            keep = of_queries.pad(keep.transpose(0, 1)).transpose(1, 2)
        mask = is_key
        if call.mask is not None:
            without = False if call.mask.dtype == torch.bool else float("-inf")
            mask = call.mask.masked_fill(~is_key, without)
        out = _attend(q, k, v, call, mask, keep)
    return of_queries.pack(out.transpose(1, 2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own attention, by the body that allows the derivatives that may be asked for."""
    if is_transformed():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=call.softmax_scale)
    if forced() == "reference" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Sdpa.apply(q, k, v, mask, call.softmax_scale)  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=call.softmax_scale)


class _Sdpa(torch.autograd.Function):
    """PyTorch's attention, twice differentiable; its fast kernels are only once."""

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
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if again else nullcontext():
            # autograd.grad needs distinct inputs, and q, k and v may be one tensor
            q, k, v = views = [
                x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs
            ]
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=ctx.scale)
            return *torch.autograd.grad(out, views, dout, create_graph=again), None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, mask: Tensor | None, keep: Tensor | None
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
