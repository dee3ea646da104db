"""Attention at head sizes of BERT (64), of smaller and larger models, and of one that is padded."""

import functools
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
        if not dropout_p:
            yield _case(head_dim, dtype, dropout_p, trains=False)
    # of the keys alone, as a padding mask is
    yield _case(64, "bf16", 0.0, mask=torch.ones(LONGEST, dtype=torch.bool))
    yield _case(64, "bf16", 0.1, mask=floats(LONGEST, dtype="bf16"))


def _case(
    head_dim: int, dtype: str, dropout_p: float, longest: int = LONGEST, *,
    mask: Tensor | None = None, trains: bool = True,
) -> Case:  # fmt: skip
    options = {"mask": mask is not None, "dropout": dropout_p > 0, "inference": not trains}
    label = " ".join([f"{dtype} {head_dim} x {longest}", *filter(options.get, options)])
    call = functools.partial(
        attention_qkvpacked, cu_seqlens=torch.tensor([0, ROWS], dtype=torch.int32),
        max_seqlen=longest, mask=mask, **dropout_of(dropout_p),
    )  # fmt: skip
    is_quick = label in ("bf16 64 x 512 dropout", "bf16 64 x 64 dropout")
    qkv = floats(ROWS, 3, HEADS, head_dim, dtype=dtype)
    return Case(label, call, (qkv,), trains, (SM90,) * is_quick)
