"""Launchers of attention whose queries, keys and values are one tensor (T, 3, N, D).

The forward is that of `attention`, with three views; the backward writes one gradient, which no
copy has to put together.
"""

from torch import Tensor

from fastbert.kernels.attention import attention_drop_words, attention_fwd, launch_bwd
from fastbert.kernels.runtime import launcher

__all__ = ["attention_drop_words", "attention_fwd", "attention_qkvpacked_bwd"]


def _bwd_outputs(dout, qkv, *_):
    return qkv.new_empty(qkv.shape)


@launcher(_bwd_outputs)
def attention_qkvpacked_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    mask: Tensor | None,
    drop_words: Tensor | None,
    keep_scale: float,
) -> Tensor:
    """dout (T, N, D), qkv (T, 3, N, D) -> dqkv (T, 3, N, D); the rest is as in `attention_fwd`."""
    dqkv = _bwd_outputs(dout, qkv)
    launch_bwd(
        dout, *qkv.unbind(1), out, lse, *dqkv.unbind(1), cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, softmax_scale, mask, drop_words, keep_scale,
    )  # fmt: skip
    return dqkv
