"""One call of a model: its arguments, and what its head reads of the bare model's output."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.models.inputs import Inputs, pack_inputs, packed
from fastbert.models.losses import Scored, without_padding
from fastbert.modules.graphs.buckets import off_by
from fastbert.modules.request import (
    DOCUMENTS,
    call_or_config,
    refuse_attentions,
    refuse_unknown,
    require_values,
)
from fastbert.modules.sequences import Rows
from fastbert.ops.mlm_gather import count_labels
from fastbert.ops.unpad import Unpadding, filled
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.rng import DropoutState, for_batch


@dataclasses.dataclass(eq=False)
class Request:
    """One call of a model, with T packed tokens of B sequences and M rows whose output is wanted.

    model: whose call it is; inputs, documents: as the caller passed them; output_hidden_states,
    return_dict, num_items: see `ForwardOptions`; rows: the only tokens whose last hidden state is
    read, None for all; reads: what the head reads of the bare model's output: hidden states in the
    input's form, packed ones, or only the pooled ones; packed: `batch` and `padding`, None until
    one of them is first read.
    """

    model: Any
    inputs: Inputs
    documents: dict[str, Any]
    output_hidden_states: bool | Collection[int]
    return_dict: bool
    num_items: int | Tensor | None
    rows: Rows | None = None
    reads: Literal["as given", "packed", "pooled"] = "as given"
    packed: tuple[PackedBatch, Unpadding | None] | None = None

    @classmethod
    def read(cls, model: Any, inputs: Inputs, options: dict[str, Any]) -> Self:
        """Reads a call; raises ValueError for arguments that do not fit together or are unknown."""
        config = model.config
        documents = {name: options.get(name) for name in DOCUMENTS}
        others = {name: x for name, x in options.items() if name not in DOCUMENTS}
        refuse_unknown(type(model).__name__, others)
        refuse_attentions(call_or_config(config, options, "output_attentions"))
        expected, is_decoder = "a configuration of an encoder", getattr(config, "is_decoder", False)
        require(not is_decoder, type(model).__name__, expected, "is_decoder=True")
        is_padded = inputs.attention_mask is not None
        require(
            not (torch.jit.is_tracing() or (torch.compiler._is_exporting_flag and is_padded)),
            type(model).__name__,
            "a call with values, because the model reads the lengths of the batch",
            "one that is traced or exported",
            "use `fastbert export`, or a Hugging Face model patched by fastbert.patch",
        )
        return cls(
            model,
            inputs,
            documents,
            call_or_config(config, options, "output_hidden_states"),
            call_or_config(config, options, "return_dict"),
            options.get("num_items_in_batch"),
        )

    @property
    def batch(self) -> PackedBatch:
        """The tokens, packed only when first read, because a CUDA graph may pack them instead."""
        return self._layout[0]

    @property
    def padding(self) -> Unpadding | None:
        """How to restore the padded form; None if input and output are packed."""
        return self._layout[1]

    @property
    def by_sequence(self) -> Unpadding:
        """The padded form with one sequence in each row: the input's own, if it is one."""
        batch, padding = self._layout
        if padding is not None and padding.is_by_row:
            return padding
        return Unpadding.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, batch.num_tokens)

    @property
    def _layout(self) -> tuple[PackedBatch, Unpadding | None]:
        if self.packed is None:
            layers = getattr(getattr(self.model.base_model, "encoder", None), "layer", None)
            has_graphs = layers is not None and not off_by(layers)  # None if a wrapper hides them
            size = self.model.config.hidden_size if has_graphs else None
            self.packed = pack_inputs(self.inputs, self.documents, size)
        return self.packed

    def labelled(self, labels: Tensor | None) -> Self:
        """This request with `labels` (B, S) packed into the batch, and with num_labels counted.

        Labels at padding are dropped. Raises ValueError for labels in addition to a PackedBatch.
        """
        if labels is None and not self.is_packed:
            return self
        (batch, padding), num_items = self._layout, self.num_items
        if labels is not None:
            require(
                padding is not None,
                "labels",
                "None with a PackedBatch, which has labels as a field",
                tuple(labels.shape),
            )
            assert padding is not None
            shape = padding.batch_shape
            require(labels.shape == shape, "labels", f"shape {shape}", tuple(labels.shape))
            if not labels.dtype.is_signed:  # which cannot hold what padding gets
                labels = labels.long()
            own = packed(padding, "labels", labels, IGNORE_INDEX)
            batch = dataclasses.replace(batch, labels=own)
        if batch.labels is not None and batch.num_labels is None:
            require_values("labels", batch.labels)
            batch = dataclasses.replace(batch, num_labels=count_labels(batch.labels))
        is_padded = padding is not None and padding.slots is not None
        if labels is not None and is_padded and num_items is not None:
            assert batch.labels is not None
            num_items = without_padding(num_items, labels, (batch.labels != IGNORE_INDEX).sum())
        return dataclasses.replace(self, packed=(batch, padding), num_items=num_items)

    def labelled_pairs(self, next_sentence_label: Tensor | None) -> Self:
        """This request with next-sentence labels, (B,) or (B, 1), in its batch.

        Raises ValueError if the batch already has them.
        """
        if next_sentence_label is None:
            return self
        batch, padding = self._layout
        require(
            batch.next_sentence_label is None,
            "next_sentence_label",
            "None with a PackedBatch that has the field",
            tuple(next_sentence_label.shape),
        )
        batch = dataclasses.replace(batch, next_sentence_label=next_sentence_label.view(-1))
        return dataclasses.replace(self, packed=(batch, padding))

    @property
    def is_packed(self) -> bool:
        """Whether the tokens are packed already; without labels a CUDA graph may pack them."""
        return self.packed is not None or isinstance(self.inputs.given, PackedBatch)

    @property
    def labels(self) -> Tensor | None:
        """The labels of the tokens, (T,), or None."""
        return self.batch.labels if self.is_packed else None

    @property
    def pair_labels(self) -> Tensor | None:
        """The next-sentence labels of the batch, (B,), or None."""
        return self.batch.next_sentence_label if self.is_packed else None

    def only(self, *, first: bool = False, labelled: bool = False) -> Self:
        """This request for the tokens of `wanted_rows` only, if that saves time.

        Unchanged if hidden states are requested, which need every token.
        """
        batch, size = self.batch, self.model.config.hidden_size
        pays = Rows.pay(batch.num_tokens, size, batch.device, labelled=labelled)
        if self.output_hidden_states or not pays:
            return self
        return dataclasses.replace(self, rows=wanted_rows(batch, first=first, labelled=labelled))

    def output(self, kind: Any, encoded: Any, logits: Tensor | None, scored: Scored | None) -> Any:
        """The output of class `kind`: normalised loss (None without a score), logits, states."""
        return kind(
            loss=None if scored is None else scored.loss(self.num_items),
            logits=logits,
            hidden_states=encoded.hidden_states,
        )

    def padded(self, tokens: Tensor, spare: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...) with `spare` at padding; unchanged if the input was packed.

        tokens: (B, S, ...) if a CUDA graph packed the batch
        """
        if not self.is_packed:
            return filled(tokens, self.is_real, spare)
        return tokens if self.padding is None else self.padding.pad(tokens, spare)

    @property
    def is_real(self) -> Tensor | None:
        """(B, S) bool, False at padding; None if there is no padding or the input is packed."""
        if self.is_packed:
            return None if self.padding is None else self.padding.is_real
        mask = self.inputs.attention_mask
        return None if mask is None else mask != 0


def drawn(batch: PackedBatch) -> DropoutState:
    """The dropout state of a batch: its own, or one drawn from torch's generator."""
    return for_batch(
        batch.cu_seqlens,
        batch.num_tokens,
        sequence_ids=batch.sequence_ids,
        state=batch.dropout_state,
    )


def wanted_rows(batch: PackedBatch, *, first: bool, labelled: bool) -> Rows:
    """The rows for the last layer: each sequence's first token, the labelled tokens, or both.

    The host waits for the GPU only if labelled rows are wanted and the batch has no num_labels.
    """
    has_label, num_labels = None, 0
    if labelled:
        assert batch.labels is not None
        has_label = batch.labels != IGNORE_INDEX
        known = batch.num_labels
        num_labels = count_labels(batch.labels) if known is None else known
    return Rows.read_by_losses(batch, first=first, has_label=has_label, num_labels=num_labels)
