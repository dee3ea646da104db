"""The pre-training loss of one micro-batch, and the sums from which metrics are computed."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.models.losses import masked_rows, score_classes, score_words
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.models.request import wanted_rows
from fastbert.packing import PackedBatch


class Result(NamedTuple):
    """loss: (), for backward; sums: (6,) float32 on the device, the fields of `Metrics`."""

    loss: Tensor
    sums: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, loss: Tensor, sums: list[Tensor]) -> "Result":
        """The result of a loss () and six sums () of any dtype, stacked without gradients."""
        return cls(loss, torch.stack([value.float() for value in sums]))


@dataclasses.dataclass(frozen=True)
class MaskedMetrics:
    """Sums over masked tokens, which are the first sums of every objective.

    The properties are means, losses in nats. skipped_steps: steps whose gradients were not finite,
    which the sums do not include
    """

    mlm_loss_sum: float = 0.0
    mlm_correct: float = 0.0
    num_targets: float = 0.0
    skipped_steps: float = dataclasses.field(default=0.0, kw_only=True)

    @property
    def mlm_loss(self) -> float:
        return self.mlm_loss_sum / max(self.num_targets, 1)

    @property
    def mlm_accuracy(self) -> float:
        return self.mlm_correct / max(self.num_targets, 1)


@dataclasses.dataclass(frozen=True)
class Metrics(MaskedMetrics):
    """Sums over masked tokens and sentence pairs."""

    nsp_loss_sum: float = 0.0
    nsp_correct: float = 0.0
    num_pairs: float = 0.0

    @property
    def nsp_loss(self) -> float:
        return self.nsp_loss_sum / max(self.num_pairs, 1)

    @property
    def nsp_accuracy(self) -> float:
        return self.nsp_correct / max(self.num_pairs, 1)

    def of_pairs(self) -> dict[str, float]:
        """The reported metrics of sentence pairs; empty without pairs."""
        if not self.num_pairs:
            return {}
        return {"nsp_loss": self.nsp_loss, "nsp_accuracy": self.nsp_accuracy}


class PretrainingObjective(nn.Module):
    """MLM loss of a micro-batch, and NSP loss if it has pairs (Devlin et al. 2018).

    Each loss is divided by the count of the whole batch, so the losses of the micro-batches add up
    to the loss of the batch, however it is divided and the masked tokens are distributed.

    nsp_weight: weight of the next-sentence loss, 1 in Devlin et al.
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
        """The losses of `batch`, a micro-batch with labels.

        num_targets, num_pairs, num_tokens: counts of the whole batch, as numbers or tensors of
        shape (); only objectives with a loss over all tokens use num_tokens
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
