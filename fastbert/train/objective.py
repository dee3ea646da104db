"""The pre-training loss of one part of a batch, with the sums that its metrics are made of."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.models.inputs import wanted_rows
from fastbert.models.losses import masked_rows, score_classes, score_words
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.packing import PackedBatch


class Result(NamedTuple):
    """loss: (), to run backward from; sums: (6,) float32, the first of `Metrics`, on the device."""

    loss: Tensor
    sums: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, loss: Tensor, sums: list[Tensor]) -> "Result":
        return cls(loss, torch.stack([value.float() for value in sums]))


class Metrics(NamedTuple):
    """Sums over masked tokens and sentence pairs; the means are what people read.

    skipped_steps: those whose gradients were not finite; the sums leave them out.
    """

    mlm_loss_sum: float = 0.0
    mlm_correct: float = 0.0
    num_targets: float = 0.0
    nsp_loss_sum: float = 0.0
    nsp_correct: float = 0.0
    num_pairs: float = 0.0
    skipped_steps: float = 0.0

    @property
    def mlm_loss(self) -> float:
        return self.mlm_loss_sum / max(self.num_targets, 1)

    @property
    def nsp_loss(self) -> float:
        return self.nsp_loss_sum / max(self.num_pairs, 1)

    @property
    def mlm_accuracy(self) -> float:
        return self.mlm_correct / max(self.num_targets, 1)

    @property
    def nsp_accuracy(self) -> float:
        return self.nsp_correct / max(self.num_pairs, 1)

    def of_pairs(self) -> dict[str, float]:
        """What is reported of them; nothing where there are none."""
        if not self.num_pairs:
            return {}
        return {"nsp_loss": self.nsp_loss, "nsp_accuracy": self.nsp_accuracy}


class PretrainingObjective(nn.Module):
    """MLM loss, and NSP loss where there are pairs, of a share of a batch.

    They are normalised by the counts of the whole batch.

    The shares' losses then add up to the batch's, whatever the number of shares and however the
    masked tokens fall among them. `nsp_weight` scales the next-sentence loss, 1 in Devlin et al.
    """

    def __init__(
        self, model: BertForPreTraining | BertForMaskedLM, nsp_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.nsp_weight = nsp_weight

    def forward(
        self,
        batch: PackedBatch,
        num_targets: int | Tensor,
        num_pairs: int | Tensor,
        num_tokens: int | Tensor = 1,
    ) -> Result:
        """num_targets, num_pairs, num_tokens: those of the whole batch, numbers or ().

        The last is for objectives that have a loss over all tokens.
        """
        pair_labels = batch.next_sentence_label
        rows = wanted_rows(batch, first=pair_labels is not None, labelled=True)
        encoded = self.model.bert(batch, rows=rows)
        heads = self.model.cls
        masked = masked_rows(encoded.last_hidden_state, batch, rows)
        words = score_words(heads.predictions, masked, count_correct=True)
        loss, sums = words.loss(num_targets), words.sums()
        if pair_labels is not None:
            pair_logits = heads.seq_relationship(encoded.pooler_output)
            pairs = score_classes(pair_logits, pair_labels, count_correct=True)
            loss = loss + self.nsp_weight * pairs.loss(num_pairs)
            sums += pairs.sums()
        else:
            sums += [torch.zeros_like(loss)] * 3
        return Result.of(loss, sums)
