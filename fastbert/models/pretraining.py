"""The pre-training models: masked language modelling, with and without next-sentence prediction."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.models.base import BertPreTrainedModel
from fastbert.models.bert import BertModel
from fastbert.models.inputs import pack_inputs
from fastbert.modules.encoder import pad_output
from fastbert.modules.heads import BertLMPredictionHead, BertOnlyMLMHead, BertPreTrainingHeads
from fastbert.modules.linear import is_plain
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.outputs import BertForPreTrainingOutput, MaskedLMOutput
from fastbert.packing import IGNORE_INDEX, PackedBatch


class Scored(NamedTuple):
    """How well the rows that have something to predict are predicted; each a ().

    loss_sum: cross-entropy summed over these rows, in float32 or wider, 0 if there are none;
    correct: how many targets have the highest score; num_rows: how many rows there are.
    """

    loss_sum: Tensor
    correct: Tensor
    num_rows: Tensor

    def loss(self) -> Tensor:
        """Mean cross-entropy; a finite 0 with zero gradients if there is no row."""
        return self.loss_sum / self.num_rows.clamp(min=1)


def score_masked(head: BertLMPredictionHead, hidden_states: Tensor, batch: PackedBatch) -> Scored:
    """Runs the MLM head on the masked positions of (T, H) hidden states, and on no other."""
    assert batch.labels is not None
    rows, targets, _, count = mlm_gather(hidden_states, batch.labels, capacity=batch.num_labels)
    rows, decoder = head.transform(rows), head.decoder
    if is_plain(decoder):
        loss_sum, correct = linear_cross_entropy(
            rows, decoder.weight, decoder.bias, targets, reduction="sum", return_correct=True
        )
    else:
        loss_sum, correct = _score(decoder(rows), targets)
    return Scored(loss_sum, correct, count)


def score_pairs(logits: Tensor, batch: PackedBatch) -> Scored:
    """(B, 2) next-sentence scores with their labels."""
    labels = batch.next_sentence_label
    assert labels is not None
    return Scored(*_score(logits, labels), (labels != IGNORE_INDEX).sum())


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss_sum = F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss_sum, (logits.argmax(-1) == targets).sum()


class BertForPreTraining(BertPreTrainedModel):
    """BERT with both heads of its pre-training (Devlin et al. 2018), as in Hugging Face."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.initialize()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        return_logits: bool | None = None,
    ) -> BertForPreTrainingOutput | tuple:
        """The sum of both losses where both labels are given, and the heads' scores.

        labels: (B, S) int64, the token to predict or -100; next_sentence_label: (B,) int64, 0
        where the second segment follows the first; the other arguments as in `BertModel`.
        prediction_logits (B, S, V), with zeros at padded positions, or (T, V) for a PackedBatch,
        are left out in training mode with labels, where the head runs on the masked positions
        alone; return_logits=True asks for them all the same, return_logits=False never has them.
        """
        batch, padding = pack_inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels,
            next_sentence_label,
        )
        encoded = self.bert(
            batch, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        hidden_states = encoded.last_hidden_state
        pair_logits = self.cls.seq_relationship(encoded.pooler_output)
        loss = None
        if batch.labels is not None and batch.next_sentence_label is not None:
            masked = score_masked(self.cls.predictions, hidden_states, batch)
            loss = masked.loss() + score_pairs(pair_logits, batch).loss()
        if return_logits is None:
            return_logits = loss is None or not self.training
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=self.cls.predictions(hidden_states) if return_logits else None,
            seq_relationship_logits=pair_logits,
            hidden_states=encoded.hidden_states,
        )
        if padding is not None:
            dtype = self.bert.embeddings.LayerNorm.weight.dtype
            output = pad_output(output, padding, dtype)
        return output if return_dict else output.to_tuple()


class BertForMaskedLM(BertPreTrainedModel):
    """BERT with the masked-language-modelling head alone, as in Hugging Face."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.initialize()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        return_logits: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """The masked-LM loss where labels are given, and the scores; see `BertForPreTraining`."""
        batch, padding = pack_inputs(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels
        )
        encoded = self.bert(
            batch, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        hidden_states = encoded.last_hidden_state
        loss = None
        if batch.labels is not None:
            loss = score_masked(self.cls.predictions, hidden_states, batch).loss()
        if return_logits is None:
            return_logits = loss is None or not self.training
        output = MaskedLMOutput(
            loss=loss,
            logits=self.cls(hidden_states) if return_logits else None,
            hidden_states=encoded.hidden_states,
        )
        if padding is not None:
            dtype = self.bert.embeddings.LayerNorm.weight.dtype
            output = pad_output(output, padding, dtype)
        return output if return_dict else output.to_tuple()
