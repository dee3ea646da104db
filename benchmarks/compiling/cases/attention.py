"""Attention at BERT's head_dim (64), at smaller and larger ones, and at one that is padded."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compiling.cases import ROWS, SM90, Case, dropout_of, floats
from fastbert.ops.attention import attention_qkvpacked

HEADS, LONGEST = 12, 512
SHORT = 64, 128  # lengths up to which a sequence can be a single tile


def cases() -> Iterator[Case]:
    for head_dim, dtype, dropout_p in (
        *((head_dim, "bf16", p) for head_dim in (32, 64, 80, 128) for p in (0.0, 0.1)),
        *((64, dtype, 0.1) for dtype in ("fp16", "fp32")),
    ):
        for longest in (LONGEST, *SHORT):
            yield _case(head_dim, dtype, dropout_p, longest)
            yield _case(head_dim, dtype, dropout_p, longest, bias=True)
        if not dropout_p:
            yield _case(head_dim, dtype, dropout_p, trains=False)
    # masks of the keys only, like a padding mask
    for bias in (False, True):
        yield _case(64, "bf16", 0.0, mask=torch.ones(LONGEST, dtype=torch.bool), bias=bias)
        yield _case(64, "bf16", 0.1, mask=floats(LONGEST, dtype="bf16"), bias=bias)


def _case(
    head_dim: int, dtype: str, dropout_p: float, longest: int = LONGEST, *,
    mask: Tensor | None = None, trains: bool = True, bias: bool = False,
) -> Case:  # fmt: skip
    options = {
        "mask": mask is not None, "dropout": dropout_p > 0, "bias": bias, "inference": not trains,
    }  # fmt: skip
    label = " ".join([f"{dtype} {head_dim} x {longest}", *filter(options.get, options)])
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
    drops = dropout_of(dropout_p)

    def call(qkv: Tensor, qkv_bias: Tensor | None = None) -> Tensor:
        return attention_qkvpacked(qkv, cu_seqlens, longest, mask=mask, qkv_bias=qkv_bias, **drops)

    is_quick = label in ("bf16 64 x 512 dropout bias", "bf16 64 x 64 dropout bias")
    tensors = floats(ROWS, 3, HEADS, head_dim, dtype=dtype), floats(3 * HEADS * head_dim)
    return Case(label, call, tensors[: 1 + bias], trains, (SM90,) * is_quick)
