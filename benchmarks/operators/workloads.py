"""Operators to measure at a preset's sizes, each with the plain PyTorch code that it replaces."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.attention import attention_workloads
from benchmarks.operators.bodies import EAGER, Body, Workload
from fastbert import rng
from fastbert.config.presets import PRESETS
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.compact import compact
from fastbert.ops.dropout import dropout
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.fp8_linear import fp8_feed_forward, fp8_linear, multiplies_fp8
from fastbert.ops.gather_rows import gather_rows
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastbert.ops.linear_cross_entropy import linear_cross_entropy

MASKED_SHARE = 0.15


def workloads(
    preset: str, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Workload]:
    """Operators with a faster body, at the sizes of a preset's model, over `tokens` tokens.

    The comments beside `forward` and `backward` name the tensors read; the tensors written.
    """
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
        {
            EAGER: Body(lambda x, weight, bias: F.layer_norm(x, (hidden,), weight, bias, 1e-12)),
            "Liger": Body(_liger_layer_norm),
        },
        forward=2 * size * tokens * hidden,  # x; y
        backward=3 * size * tokens * hidden,  # dy, x; dx
    )
    for approximate in ("none", "tanh"):
        yield Workload(
            bias_gelu,
            f"{preset} {tokens} x {inner}{' tanh' * (approximate == 'tanh')}",
            lambda: (normal(tokens, inner), normal(inner)),
            lambda x, bias, a=approximate: bias_gelu(x, bias, approximate=a),
            {EAGER: Body(lambda x, bias, a=approximate: F.gelu(x + bias, approximate=a))},
            forward=2 * size * tokens * inner,  # x; y
            backward=3 * size * tokens * inner,  # dy, x; dx
        )
    numbers = rng.fresh(tokens, torch.device(device))
    yield Workload(
        dropout,
        f"{preset} {tokens} x {hidden} dropout 0.1",
        lambda: (normal(tokens, hidden),),
        lambda x: dropout(x, 0.1, numbers),
        {EAGER: Body(lambda x: F.dropout(x, 0.1))},
        forward=2 * size * tokens * hidden,  # x; y
        backward=2 * size * tokens * hidden,  # dy; dx
    )
    for dropout_p in (0.0, 0.1):
        yield Workload(
            dropout_add_layer_norm,
            f"{preset} {tokens} x {hidden} dropout {dropout_p}",
            lambda: (normal(tokens, hidden), normal(tokens, hidden), *normal(3, hidden).unbind()),
            lambda x, residual, weight, bias, x_bias, p=dropout_p: dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, dropout_p=p, rng=numbers
            ),
            {
                EAGER: Body(
                    lambda x, residual, weight, bias, x_bias, p=dropout_p: F.layer_norm(
                        residual + F.dropout(x + x_bias, p), (hidden,), weight, bias, 1e-12
                    )
                )
            },
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
        {
            EAGER: Body(
                lambda word, position, kind, weight, bias: F.layer_norm(
                    F.embedding(ids, word) + F.embedding(places, position) + kind[0],
                    (hidden,),
                    weight,
                    bias,
                    1e-12,
                )
            )
        },
        forward=3 * size * tokens * hidden,  # word and position rows; y
        backward=size * (3 * tokens + 30522) * hidden,  # dy and both kinds of rows; the word table
    )
    yield from attention_workloads(preset, tokens, device, dtype)
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
        {
            EAGER: Body(
                lambda x, weight, bias, y: F.cross_entropy(F.linear(x, weight, bias).float(), y)
            ),
            "Liger": Body(_liger_cross_entropy),
        },
        forward=2 * rows * hidden * vocab,
        backward=4 * rows * hidden * vocab,
        is_product=True,
    )
    if device == "cpu" or multiplies_fp8(torch.device(device)):
        scale, amax = (
            torch.tensor([16.0, 256.0, 2.0**15], device=device),
            torch.zeros(3, device=device),
        )
        yield Workload(
            fp8_linear,
            f"{preset} {tokens} x {hidden} x {inner}",
            lambda: (normal(tokens, hidden), normal(inner, hidden) * hidden**-0.5, normal(inner)),
            lambda x, weight, bias: fp8_linear(x, weight, bias, scale, amax),
            {EAGER: Body(F.linear)},
            forward=2 * tokens * hidden * inner,
            backward=4 * tokens * hidden * inner,
            is_product=True,
        )
        yield Workload(
            fp8_feed_forward,
            f"{preset} {tokens} x {hidden} x {inner}",
            lambda: (
                normal(tokens, hidden),
                normal(inner, hidden) * hidden**-0.5,
                normal(inner),
                normal(hidden, inner) * inner**-0.5,
            ),
            lambda *tensors: fp8_feed_forward(*tensors, scale, amax, scale, amax),
            {
                EAGER: Body(
                    lambda x, weight, bias, output_weight: F.linear(
                        F.gelu(F.linear(x, weight, bias)), output_weight
                    )
                )
            },
            forward=4 * tokens * hidden * inner,
            backward=8 * tokens * hidden * inner,
            is_product=True,
        )
    labels = torch.full((1, tokens), -100, device=device)
    labels[:, torch.randperm(tokens, device=device)[:rows]] = 1
    kept = compact(labels, -100, rows)
    yield Workload(
        compact,
        f"{tokens} labels",
        lambda: (labels.clone(),),
        lambda labels: compact(labels, -100, rows).positions,
        {EAGER: Body(lambda labels: (labels.flatten() != -100).nonzero()[:, 0].int(), waits=True)},
        forward=8.0 * tokens + 4 * tokens + 12 * rows,  # labels; slots; kept and their positions
        backward=0.0,
    )
    yield Workload(
        gather_rows,
        f"{preset} {rows} of {tokens} x {hidden}",
        lambda: (normal(tokens, hidden),),
        lambda x: gather_rows(x, kept.positions, kept.slots),
        {EAGER: Body(lambda x: x[kept.positions.long()])},
        forward=2.0 * size * rows * hidden,  # the wanted rows; y
        backward=float(size * (rows + tokens) * hidden),  # dy of the rows; dx of all tokens
    )


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-12)


def _liger_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, y, bias)[0]
