"""`BertForQuestionAnswering`: logits for where an answer begins and ends in a text."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastbert.check import require
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.bert import BertModel
from fastbert.models.inputs import ForwardOptions, Inputs, Request
from fastbert.models.losses import span_loss
from fastbert.ops.unpad import Unpadding
from fastbert.outputs import QuestionAnsweringModelOutput
from fastbert.packing import PackedBatch


class BertForQuestionAnswering(BertPreTrainedModel):
    """BERT with logits for where an answer begins and ends, as in Hugging Face.

    The softmax is over the real tokens of a sequence. In Hugging Face's model it includes padding,
    so that the loss depends on the width of the batch; here the logits of padding are the dtype's
    lowest number, which adds nothing to a softmax and is never the argmax.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        require(
            self.num_labels == 2,
            "BertForQuestionAnswering",
            "num_labels = 2, for a start and an end",
            self.num_labels,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Unpack[ForwardOptions],
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """The mean of the losses of start and end if both positions are given, and their logits.

        start_positions, end_positions: (B,) int64, a column of the batch, or for packed input the
        position in the sequence or document. Negative positions count as 0, as in Hugging Face;
        positions at padding or beyond the end are left out of the loss. The other arguments as in
        `BertModel`. Returns start_logits and end_logits, (B, S), or (T,) for a PackedBatch.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(
            inputs, options, start_positions=start_positions, end_positions=end_positions
        )

    def predict(
        self,
        request: Request,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        encoded = self.encode(request)
        logits = self.qa_outputs(encoded.last_hidden_state)  # (T, 2)
        batch, padding = request.batch, request.padding
        by_row = None if padding is None else _by_column(logits, padding)
        loss = None
        if start_positions is not None and end_positions is not None:
            by_sequence = by_row
            if by_sequence is None or (padding is not None and not padding.is_by_row):
                sizes = batch.cu_seqlens, batch.max_seqlen, batch.num_tokens
                by_sequence = _by_column(logits, Unpadding.from_cu_seqlens(*sizes))
            *scores, is_real = by_sequence
            loss = span_loss(scores, (start_positions, end_positions), is_real, request.num_items)
        starts, ends = logits.unbind(-1) if by_row is None else by_row[:2]
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=starts, end_logits=ends, hidden_states=encoded.hidden_states
        )


def _by_column(logits: Tensor, padding: Unpadding) -> tuple[Tensor, Tensor, Tensor]:
    """(T, 2) -> start and end logits (B, S), lowest at padding, and is_real (B, S) bool."""
    is_real = padding.pad(torch.ones_like(logits[:, 0], dtype=torch.bool))
    scores = padding.pad(logits).masked_fill(~is_real[..., None], torch.finfo(logits.dtype).min)
    starts, ends = scores.unbind(-1)
    return starts, ends, is_real
