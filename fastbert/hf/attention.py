"""Only the attention, for any Hugging Face encoder: `attn_implementation="fastbert"`.

The rest of the model stays as it is, padding included, so `fastbert.patch` is faster for the models
that it supports. The padding mask is read once in a forward pass, when transformers makes it.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.ops.attention import attention
from fastbert.ops.unpad import Unpadding, unpad

NAME = "fastbert"
_UNPADDING = "_fastbert_unpadding"
# Arguments that change the result of attention, and that this implementation does not support.
_REFUSED = ("softcap", "s_aux", "sinks", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")


def register_attention() -> None:
    """Makes `attn_implementation="fastbert"` known to transformers (4.57 and 5).

    `from_pretrained(..., attn_implementation="fastbert")` and
    `model.set_attn_implementation("fastbert")` then accept it, for every model whose attention
    transformers lets users choose. Registering again changes nothing.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    *args: Any, attention_mask: Tensor | None = None, mask_function: Any = None, **kwargs: Any
) -> Tensor | None:
    """The mask function registered with transformers: (B, S) bool if the mask is only padding.

    None without padding. Other masks (causal, sliding windows, documents) are the (B, 1, S, S)
    masks of transformers' sdpa attention.
    """
    from transformers import masking_utils

    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)  # 4.57 has none
    if bidirectional is not None and mask_function is bidirectional:
        if attention_mask is None:
            return None
        keep = attention_mask.bool()
        if torch.compiler.is_compiling():
            return keep
        if bool(keep.all()):
            return None
        setattr(keep, _UNPADDING, unpad(keep))  # all layers get this tensor and share its Unpadding
        return keep
    kwargs |= {"attention_mask": attention_mask, "mask_function": mask_function}
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(*args, **kwargs)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, N, S_q, D), key and value (B, N or fewer, S_k, D) -> (B, S_q, N, D), None.

    attention_mask: None; (B, S_k) bool, from the mask function above; or 4-D, bool or additive;
    position_bias: added to the scores. Dropout draws its state from torch's generator, as PyTorch's
    own attention does, so activation checkpointing that preserves the generator's state draws the
    same masks. A query without a key gives zeros. Raises ValueError for softcap, attention sinks, a
    head_mask and packed documents.
    """
    for name in _REFUSED:
        require(
            kwargs.get(name) is None,
            'attn_implementation="fastbert"',
            f"no {name}",
            "one",
            'use attn_implementation="sdpa" or "eager" for this model',
        )
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    mask, padding = attention_mask, None
    if mask is None and causal and num_queries > 1:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = ones.tril()
    elif mask is not None and mask.ndim == 2:
        if position_bias is not None or torch.compiler.is_compiling():
            mask = mask[:, None, None]
        else:
            padding, mask = getattr(mask, _UNPADDING, None) or unpad(mask), None
    padding = padding or Unpadding.dense(batch, num_keys, query.device)
    if position_bias is not None:
        mask = _added(position_bias, mask)
    queries = Unpadding.dense(batch, num_queries, query.device)
    out = attention(
        queries.pack(query.transpose(1, 2)),
        padding.pack(key.transpose(1, 2)),
        padding.pack(value.transpose(1, 2)),
        queries.cu_seqlens,
        padding.cu_seqlens,
        num_queries,
        padding.max_seqlen,
        softmax_scale=scaling,
        dropout_p=dropout,
        mask=mask,
    )
    return queries.pad(out), None


def _added(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
