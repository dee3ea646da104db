"""The arguments of a model's forward, in Hugging Face's form, and their packed batch."""

from collections.abc import Collection
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.modules.request import read_layout
from fastbert.ops.unpad import Unpadding
from fastbert.packing import PackedBatch


class Inputs(NamedTuple):
    """The first arguments of every model's forward, in Hugging Face's order; see `BertModel`."""

    input_ids: Tensor | PackedBatch | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None

    @property
    def given(self) -> Tensor | PackedBatch:
        """The tokens or their embeddings; raises ValueError unless exactly one is given."""
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        is_one = (self.input_ids is None) != (self.inputs_embeds is None)
        expected = "exactly one of input_ids and inputs_embeds"
        require(is_one, "model", expected, "neither" if given is None else "both")
        assert given is not None
        return given


class ForwardOptions(TypedDict, total=False):
    """Keyword arguments of every model's forward; None in the first three means the config's.

    output_hidden_states: True for the embeddings and each layer's output; or indices of these,
        negative ones counted from the end, for some of them and None for the others
    output_attentions: True raises ValueError, because the probabilities are never formed
    return_dict: False for a tuple of the fields that are not None
    num_items_in_batch: what the summed loss is divided by, instead of the number of labels in this
        batch: the number in all batches of an optimizer step, as Hugging Face's Trainer counts it
    cu_seq_lens_q, max_length_q: boundaries (documents + 1,) int32 and longest length of the
        documents packed into the one row of a batch (1, S); _k: the same values, or None
    """

    output_hidden_states: bool | Collection[int] | None
    output_attentions: bool | None
    return_dict: bool | None
    num_items_in_batch: int | Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None


def pack_inputs(
    inputs: Inputs, documents: dict[str, Any], hidden_size: int | None
) -> tuple[PackedBatch, Unpadding | None]:
    """The batch without its padding, and how to restore the padded form (None for a PackedBatch).

    Without position_ids, a token's position is its column, as in Hugging Face, even if the padding
    is on the left; if a row holds several documents, positions begin at 0 in each document.
    Raises ValueError for inputs that do not fit together.
    """
    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = inputs
    given = inputs.given
    if isinstance(given, PackedBatch):
        require(
            all(other is None for other in (*inputs[1:], *documents.values())),
            "model",
            "a PackedBatch without other tensors",
            "one with other tensors",
            "make them fields of the batch",
        )
        return given, None

    require(
        given.ndim == (2 if inputs_embeds is None else 3),
        "model",
        "input_ids (batch, seqlen) or inputs_embeds (batch, seqlen, hidden)",
        tuple(given.shape),
    )
    padding, general_mask = read_layout(
        given, attention_mask, position_ids, hidden_size=hidden_size, **documents
    )
    if position_ids is None:
        position_ids = _positions(padding, given)
    batch = PackedBatch(
        input_ids=packed(padding, "input_ids", input_ids),
        inputs_embeds=None if inputs_embeds is None else padding.pack(inputs_embeds),
        position_ids=packed(padding, "position_ids", position_ids),
        token_type_ids=packed(padding, "token_type_ids", token_type_ids),
        cu_seqlens=padding.cu_seqlens,
        max_seqlen=padding.max_seqlen,
        attention_mask=general_mask,
    )
    return batch, padding


def _positions(padding: Unpadding, given: Tensor) -> Tensor:
    """(S,): each token's column, or its index in its own document."""
    seqlen = given.shape[1]
    columns = torch.arange(seqlen, device=given.device)
    if padding.is_by_row:
        return columns
    starts = padding.cu_seqlens
    number = torch.searchsorted(starts, columns.int(), right=True) - 1
    return columns - starts[number]


def packed(padding: Unpadding, name: str, tensor: Any, spare: int = 0) -> Any:
    """(B, S), or what broadcasts to it, -> (T,), with `spare` for filler; None stays None."""
    if tensor is None:
        return None
    try:
        tensor = tensor.expand(padding.batch_shape)
    except RuntimeError:
        require(False, "model", f"{name} of shape {padding.batch_shape}", tuple(tensor.shape))
    return padding.pack(tensor, spare)
