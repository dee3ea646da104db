"""From Hugging Face's arguments to a packed batch."""

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.modules.masks import read_mask
from fastbert.ops.unpad import Unpadding, unpad
from fastbert.packing import PackedBatch


def pack_inputs(
    input_ids: Tensor | PackedBatch | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    next_sentence_label: Tensor | None = None,
) -> tuple[PackedBatch, Unpadding | None]:
    """The batch without its padding, and how to restore the padded form (None for a PackedBatch).

    Without `position_ids`, a token's position is its column, as Hugging Face counts it, also where
    the padding is on the left. Labels at padded positions are dropped with their tokens.
    """
    if isinstance(input_ids, PackedBatch):
        others = (attention_mask, token_type_ids, position_ids, inputs_embeds, labels)
        require(
            all(other is None for other in (*others, next_sentence_label)),
            "model",
            "a PackedBatch alone",
            "other tensors beside it",
            "they are fields of the batch",
        )
        return input_ids, None

    given = input_ids if inputs_embeds is None else inputs_embeds
    require(
        given is not None and (input_ids is None or inputs_embeds is None),
        "model",
        "exactly one of input_ids and inputs_embeds",
        "neither" if given is None else "both",
    )
    assert given is not None
    require(
        given.ndim == (2 if inputs_embeds is None else 3),
        "model",
        "input_ids (batch, seqlen) or inputs_embeds (batch, seqlen, hidden)",
        tuple(given.shape),
    )
    shape = batch_size, seqlen = given.shape[0], given.shape[1]
    mask, general_mask = read_mask(attention_mask, batch_size, seqlen)
    if mask is None:
        padding = Unpadding.dense(batch_size, seqlen, device=given.device)
    else:
        padding = unpad(mask)

    def packed(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        try:
            tensor = tensor.expand(shape)
        except RuntimeError:
            require(False, "model", f"{name} of shape {tuple(shape)}", tuple(tensor.shape))
        return padding.pack(tensor)

    if position_ids is None:
        position_ids = torch.arange(seqlen, device=given.device)
    batch = PackedBatch(
        input_ids=packed("input_ids", input_ids),
        inputs_embeds=None if inputs_embeds is None else padding.pack(inputs_embeds),
        cu_seqlens=padding.cu_seqlens,
        max_seqlen=padding.max_seqlen,
        position_ids=packed("position_ids", position_ids),  # type: ignore[arg-type]
        token_type_ids=packed("token_type_ids", token_type_ids),
        labels=packed("labels", labels),
        attention_mask=general_mask,
        next_sentence_label=None if next_sentence_label is None else next_sentence_label.view(-1),
    )
    return batch, padding
