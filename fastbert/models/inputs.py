"""Reads Hugging Face's arguments of a forward pass into a request with a packed batch."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Self, TypedDict

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.models.losses import Scored, without_padding
from fastbert.modules.graphs.buckets import off_by
from fastbert.modules.request import (
    DOCUMENTS,
    asked,
    read_layout,
    refuse_attentions,
    refuse_unknown,
    require_values,
)
from fastbert.modules.sequences import Rows
from fastbert.ops.unpad import Unpadding
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.rng import DropoutState, for_batch


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
    """Keyword arguments of every model's forward; for the first three None means the config's.

    output_hidden_states: True for the embeddings and each layer's output; places among these, from
        the end where negative, for some of them with None for the others
    output_attentions: True raises ValueError, because the probabilities are never formed
    return_dict: False for a tuple of the fields that are not None
    num_items_in_batch: the divisor of the summed loss instead of the number of labels in this
        batch: the number in all batches of an optimizer step, as Hugging Face's Trainer counts it
    cu_seq_lens_q, max_length_q: boundaries (documents + 1,) int32 and longest length of the
        documents in the one row of a batch (1, S); _k: the same values, or None
    """

    output_hidden_states: bool | Collection[int] | None
    output_attentions: bool | None
    return_dict: bool | None
    num_items_in_batch: int | Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None


@dataclasses.dataclass(eq=False)
class Request:
    """One call of a model. T packed tokens of B sequences, M rows whose output is wanted.

    inputs, documents: as they were given; hidden_size: the model's; has_graphs: whether its layers
    may replay CUDA graphs; output_hidden_states, return_dict, num_items: see `ForwardOptions`;
    rows: the only tokens whose last hidden state is read, None for all; reads: what is read of the
    bare model's output, hidden states in the input's form, packed ones, or pooled ones alone.
    """

    inputs: Inputs
    documents: dict[str, Any]
    hidden_size: int
    has_graphs: bool
    output_hidden_states: bool | Collection[int]
    return_dict: bool
    num_items: int | Tensor | None
    rows: Rows | None = None
    reads: Literal["as given", "packed", "pooled"] = "as given"
    packed: tuple[PackedBatch, Unpadding | None] | None = None  # what `batch` and `padding` give

    @classmethod
    def read(cls, model: Any, inputs: Inputs, options: dict[str, Any]) -> Self:
        """Reads a call; raises ValueError for arguments that do not fit together or are unknown."""
        config = model.config
        layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
        documents = {name: options.get(name) for name in DOCUMENTS}
        others = {name: x for name, x in options.items() if name not in DOCUMENTS}
        refuse_unknown(type(model).__name__, others)
        refuse_attentions(asked(config, options, "output_attentions"))
        expected, is_decoder = "a configuration of an encoder", getattr(config, "is_decoder", False)
        require(not is_decoder, type(model).__name__, expected, "is_decoder=True")
        is_padded = inputs.attention_mask is not None
        require(
            not (torch.jit.is_tracing() or (torch.compiler._is_exporting_flag and is_padded)),
            type(model).__name__,
            "a call with values, as the lengths of a batch are read",
            "one that is traced or exported",
            "`fastbert export` writes files of a model, or use one patched by fastbert.patch",
        )
        return cls(
            inputs,
            documents,
            config.hidden_size,
            layers is not None and not off_by(layers),  # None inside a wrapper
            asked(config, options, "output_hidden_states"),
            asked(config, options, "return_dict"),
            options.get("num_items_in_batch"),
        )

    @property
    def batch(self) -> PackedBatch:
        """The tokens, which are packed when they are first read, because a graph may pack them."""
        return self._layout[0]

    @property
    def padding(self) -> Unpadding | None:
        """How to restore the padded form; None for packed input and output."""
        return self._layout[1]

    @property
    def _layout(self) -> tuple[PackedBatch, Unpadding | None]:
        if self.packed is None:
            size = self.hidden_size if self.has_graphs else None
            self.packed = pack_inputs(self.inputs, self.documents, size)
        return self.packed

    def labelled(self, labels: Tensor | None) -> Self:
        """This request with `labels` (B, S) packed into the batch, and with num_labels counted.

        Labels at padding are dropped. Raises ValueError for labels beside a PackedBatch.
        """
        (batch, padding), num_items = self._layout, self.num_items
        if labels is not None:
            require(
                padding is not None,
                "labels",
                "None beside a PackedBatch, whose labels are a field of it",
                tuple(labels.shape),
            )
            assert padding is not None
            shape = padding.batch_shape
            require(labels.shape == shape, "labels", f"shape {shape}", tuple(labels.shape))
            packed = _packed(padding, "labels", labels, IGNORE_INDEX)
            batch = dataclasses.replace(batch, labels=packed)
        if batch.labels is not None and batch.num_labels is None:
            # the only place where the host waits for the number of labels
            require_values("labels", batch.labels)
            count = int((batch.labels != IGNORE_INDEX).sum())
            batch = dataclasses.replace(batch, num_labels=count)
        is_padded = padding is not None and padding.slots is not None
        if labels is not None and is_padded and batch.num_labels is not None:
            num_items = without_padding(num_items, labels, batch.num_labels)
        return dataclasses.replace(self, packed=(batch, padding), num_items=num_items)

    def labelled_pairs(self, next_sentence_label: Tensor | None) -> Self:
        """This request with next-sentence labels, (B,) or (B, 1), in its batch.

        Raises ValueError if the batch has some already.
        """
        if next_sentence_label is None:
            return self
        batch, padding = self._layout
        require(
            batch.next_sentence_label is None,
            "next_sentence_label",
            "None beside a PackedBatch that has the field",
            tuple(next_sentence_label.shape),
        )
        batch = dataclasses.replace(batch, next_sentence_label=next_sentence_label.view(-1))
        return dataclasses.replace(self, packed=(batch, padding))

    @property
    def pair_labels(self) -> Tensor | None:
        """The next-sentence labels of the batch, (B,); None without."""
        is_packed = self.packed is not None or isinstance(self.inputs.given, PackedBatch)
        return self.batch.next_sentence_label if is_packed else None

    def only(self, *, first: bool = False, labelled: bool = False) -> Self:
        """This request for the tokens of `wanted_rows` only, where that saves time.

        Not where hidden states are wanted.
        """
        batch = self.batch
        pays = Rows.pay(batch.num_tokens, self.hidden_size, batch.device, labelled=labelled)
        if self.output_hidden_states or not pays:
            return self
        return dataclasses.replace(self, rows=wanted_rows(batch, first=first, labelled=labelled))

    def output(self, kind: Any, encoded: Any, logits: Tensor | None, scored: Scored | None) -> Any:
        """The output of class `kind`: the loss normalised, None without a score; logits; states."""
        return kind(
            loss=None if scored is None else scored.loss(self.num_items),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )

    def padded(self, tokens: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...) with zeros at padding; unchanged if the input was packed."""
        return tokens if self.padding is None else self.padding.pad(tokens)


def drawn(batch: PackedBatch) -> DropoutState:
    """The dropout state of a batch, its own or one from torch's generator."""
    return for_batch(
        batch.cu_seqlens,
        batch.num_tokens,
        sequence_ids=batch.sequence_ids,
        state=batch.dropout_state,
    )


def wanted_rows(batch: PackedBatch, *, first: bool, labelled: bool) -> Rows:
    """The rows for the last layer: each sequence's first token, the labelled tokens, or both.

    The host does not wait if the batch has num_labels.
    """
    has_label, num_labels = None, 0
    if labelled:
        assert batch.labels is not None
        has_label = batch.labels != IGNORE_INDEX
        num_labels = int(has_label.sum()) if batch.num_labels is None else batch.num_labels
    return Rows.read_by_losses(batch, first=first, has_label=has_label, num_labels=num_labels)


def pack_inputs(
    inputs: Inputs, documents: dict[str, Any], hidden_size: int | None
) -> tuple[PackedBatch, Unpadding | None]:
    """The batch without its padding, and how to restore the padded form (None for a PackedBatch).

    Without position_ids, a token's position is its column, as in Hugging Face, even if the padding
    is on the left; where a row holds several documents, it is the place in the token's document.
    Raises ValueError for inputs that do not fit together.
    """
    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = inputs
    given = inputs.given
    if isinstance(given, PackedBatch):
        require(
            all(other is None for other in (*inputs[1:], *documents.values())),
            "model",
            "a PackedBatch alone",
            "other tensors beside it",
            "they are fields of the batch",
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
        input_ids=_packed(padding, "input_ids", input_ids),
        inputs_embeds=None if inputs_embeds is None else padding.pack(inputs_embeds),
        position_ids=_packed(padding, "position_ids", position_ids),
        token_type_ids=_packed(padding, "token_type_ids", token_type_ids),
        cu_seqlens=padding.cu_seqlens,
        max_seqlen=padding.max_seqlen,
        attention_mask=general_mask,
    )
    return batch, padding


def _positions(padding: Unpadding, given: Tensor) -> Tensor:
    """(S,): each token's column, or its place in its own document."""
    seqlen = given.shape[1]
    columns = torch.arange(seqlen, device=given.device)
    if padding.is_by_row:
        return columns
    starts, lengths = padding.cu_seqlens[:-1].long(), padding.cu_seqlens.diff()
    return columns - starts.repeat_interleave(lengths, output_size=seqlen)


def _packed(padding: Unpadding, name: str, tensor: Any, spare: int = 0) -> Any:
    """(B, S), or what broadcasts to it, -> (T,); None stays None. spare: of filler tokens."""
    if tensor is None:
        return None
    try:
        tensor = tensor.expand(padding.batch_shape)
    except RuntimeError:
        require(False, "model", f"{name} of shape {padding.batch_shape}", tuple(tensor.shape))
    return padding.pack(tensor, spare)
