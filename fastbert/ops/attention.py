"""Softmax attention within each sequence of a packed batch (Vaswani et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import op
from fastbert.check import require
from fastbert.ops.unpad import Unpadding


@op()
def attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Each token attends to the tokens of its own sequence and to no other.

    qkv: (T, 3, N, D), queries, keys and values of T packed tokens, N heads, head size D;
    cu_seqlens: (B + 1,) int32, where the sequences begin and end; max_seqlen: an upper bound of
    their lengths; softmax_scale: 1 / sqrt(D) if None; dropout_p: of the attention probabilities.
    Returns (T, N, D) in qkv.dtype. A sequence of length 0 is legal.
    """
    require(
        qkv.ndim == 4 and qkv.shape[1] == 3,
        "attention_qkvpacked",
        "qkv of shape (tokens, 3, heads, head_dim)",
        tuple(qkv.shape),
    )
    # A CPU reads the lengths for nothing and does no work on padding; elsewhere reading them would
    # make the host wait, and one call for all sequences is what keeps a GPU busy.
    by_sequence = cu_seqlens.is_cpu and not torch.compiler.is_compiling()
    attend = _attend_by_sequence if by_sequence else _attend_padded
    return attend(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p)


def _attend_by_sequence(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    # one split, whose backward is one concatenation: slices would each zero a whole gradient
    sequences = qkv.permute(1, 2, 0, 3).split(lengths, dim=2)  # each (3, N, n, D)
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = [
        _attend_one(q, k, v, scale, dropout_p).transpose(0, 1)
        for q, k, v in sequences
        if q.shape[1]
    ]
    return torch.cat(outputs) if outputs else qkv[:, 0]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """(N, n, D) each -> (N, n, D)"""
    if not dropout_p:  # four dimensions, because with three PyTorch's own fused kernel is not taken
        return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
    # PyTorch's fused CPU kernel has no dropout, and its fallback computes bf16 in float32: forward
    # and backward of 8 sequences of up to 512 tokens, 12 heads, took 123 ms on 2 cores, this 70 ms
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def _attend_padded(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p) -> Tensor:
    padding = Unpadding.from_cu_seqlens(cu_seqlens, max_seqlen, num_tokens=qkv.shape[0])
    q, k, v = padding.pad(qkv).permute(2, 0, 3, 1, 4)  # each (B, N, S, D)
    lengths = cu_seqlens.diff()
    is_real = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=is_real[:, None, None], dropout_p=dropout_p, scale=softmax_scale
    )
    return padding.pack(output.transpose(1, 2))
