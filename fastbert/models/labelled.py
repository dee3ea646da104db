"""A model whose only target is `labels`."""

from typing import Any, Unpack

from torch import Tensor

from fastbert.models.base import BertPreTrainedModel
from fastbert.models.inputs import ForwardOptions, Inputs
from fastbert.packing import PackedBatch


class LabelledModel(BertPreTrainedModel):
    """A model whose only target is the argument `labels`."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Any:
        """The loss if labels are given, and the logits; for the labels see the class.

        input_ids: (B, S) int64, or a PackedBatch; attention_mask: see `read_mask`; token_type_ids,
        position_ids: (B, S), by default zeros and the column; inputs_embeds: (B, S, H) instead of
        input_ids; options: see `ForwardOptions`. Raises ValueError for arguments that do not fit.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(inputs, options, labels=labels)
