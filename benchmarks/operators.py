"""Operators to measure, at a preset's sizes, each beside the plain PyTorch that it replaces."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend, rng
from fastbert.config import PRESETS
from fastbert.ops import (
    attention,
    attention_qkvpacked,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    layer_norm,
    linear_cross_entropy,
)

MASKED_SHARE = 0.15


class Workload(NamedTuple):
    """One operator at one size, beside the plain PyTorch that it replaces.

    make: draws the inputs; those of a floating-point dtype get gradients; forward, backward: the
    bytes that must be moved, or with `is_product` the floating-point operations.
    """

    operator: backend.Op
    label: str
    make: Callable[[], tuple[Tensor, ...]]
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    forward: float
    backward: float
    is_product: bool = False


def workloads(
    preset: str, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Workload]:
    """Operators with a Triton body, at the sizes that a model of this preset has."""
    hidden = PRESETS[preset].shape["hidden_size"]
    inner, vocab = PRESETS[preset].shape["intermediate_size"], 30522
    size = torch.finfo(dtype).bits // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Workload(
        layer_norm,
        f"{preset} {tokens} x {hidden}",
        lambda: (normal(tokens, hidden), normal(hidden), normal(hidden)),
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (hidden,), weight, bias, 1e-12),
        forward=2 * size * tokens * hidden,  # x; y
        backward=3 * size * tokens * hidden,  # dy, x; dx
    )
    for approximate in ("none", "tanh"):
        yield Workload(
            bias_gelu,
            f"{preset} {tokens} x {inner}{' tanh' * (approximate == 'tanh')}",
            lambda: (normal(tokens, inner), normal(inner)),
            lambda x, bias, a=approximate: bias_gelu(x, bias, approximate=a),
            lambda x, bias, a=approximate: F.gelu(x + bias, approximate=a),
            forward=2 * size * tokens * inner,  # x; y
            backward=3 * size * tokens * inner,  # dy, x; dx
        )
    numbers = rng.fresh(tokens, torch.device(device))
    for dropout_p in (0.0, 0.1):
        yield Workload(
            dropout_add_layer_norm,
            f"{preset} {tokens} x {hidden} dropout {dropout_p}",
            lambda: (normal(tokens, hidden), normal(tokens, hidden), *normal(3, hidden).unbind()),
            lambda x, residual, weight, bias, x_bias, p=dropout_p: dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, dropout_p=p, rng=numbers
            ),
            lambda x, residual, weight, bias, x_bias, p=dropout_p: F.layer_norm(
                residual + F.dropout(x + x_bias, p), (hidden,), weight, bias, 1e-12
            ),
            forward=4 * size * tokens * hidden,  # x, residual; z, y
            backward=(4 if dropout_p else 3) * size * tokens * hidden,  # dy, z; dx, dresidual
        )
    ids = torch.randint(30522, (tokens,), device=device)
    places = torch.arange(tokens, device=device) % 512
    yield Workload(
        embedding_layer_norm,
        f"{preset} {tokens} x {hidden}",
        lambda: (
            *(normal(count, hidden) for count in (30522, 512, 2)),
            *(normal(hidden) for _ in range(2)),
        ),
        lambda *tables: embedding_layer_norm(ids, places, None, *tables),
        lambda word, position, kind, weight, bias: F.layer_norm(
            F.embedding(ids, word) + F.embedding(places, position) + kind[0],
            (hidden,),
            weight,
            bias,
            1e-12,
        ),
        forward=3 * size * tokens * hidden,  # a row of each table but the last; y
        backward=size * (3 * tokens + 30522) * hidden,  # dy and both rows; the word table
    )
    for seqlen in (128, 512):
        yield from attention_workloads(preset, tokens, seqlen, device, normal)
    rows = round(tokens * MASKED_SHARE)
    yield Workload(
        linear_cross_entropy,
        f"{preset} {rows} x {hidden} x {vocab}",
        lambda: (
            normal(rows, hidden),
            normal(vocab, hidden) * hidden**-0.5,
            normal(vocab),
            torch.randint(vocab, (rows,), device=device),
        ),
        linear_cross_entropy,
        lambda x, weight, bias, y: F.cross_entropy(F.linear(x, weight, bias).float(), y),
        forward=2 * rows * hidden * vocab,
        backward=4 * rows * hidden * vocab,
        is_product=True,
    )


def attention_workloads(
    preset: str, tokens: int, seqlen: int, device: str, normal: Callable[..., Tensor]
) -> Iterator[Workload]:
    """Sequences of one length, which plain PyTorch's fused attention takes without padding."""
    heads = PRESETS[preset].shape["num_attention_heads"]
    batch = tokens // seqlen
    total = batch * seqlen
    cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32) * seqlen
    numbers = rng.for_batch(cu_seqlens, total)

    def plain(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        q, k, v = (x.view(batch, seqlen, heads, 64).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(total, heads, 64)

    for dropout_p in (0.0, 0.1):
        yield Workload(
            attention_qkvpacked,
            f"{preset} {batch} x {seqlen} dropout {dropout_p}",
            lambda: (normal(total, 3, heads, 64),),
            lambda qkv, p=dropout_p: attention_qkvpacked(
                qkv, cu_seqlens, seqlen, dropout_p=p, rng=numbers
            ),
            lambda qkv, p=dropout_p: plain(*qkv.unbind(1), p),
            forward=4 * total * seqlen * heads * 64,
            backward=10 * total * seqlen * heads * 64,
            is_product=True,
        )
        yield Workload(
            attention,
            f"{preset} {batch} x {seqlen} dropout {dropout_p}",
            lambda: tuple(normal(3, total, heads, 64).unbind()),
            lambda q, k, v, p=dropout_p: attention(
                q, k, v, cu_seqlens, cu_seqlens, seqlen, seqlen, dropout_p=p, rng=numbers
            ),
            lambda q, k, v, p=dropout_p: plain(q, k, v, p),
            forward=4 * total * seqlen * heads * 64,
            backward=10 * total * seqlen * heads * 64,
            is_product=True,
        )
