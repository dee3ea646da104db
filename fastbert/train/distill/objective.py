"""The distillation loss: distances to a teacher's logits and hidden states, and the MLM loss."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.models.losses import cosine_loss, masked_rows, score_classes, soft_target_loss
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.models.request import wanted_rows
from fastbert.modules.sequences import Rows
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.train.objective import MaskedMetrics, PretrainingObjective, Result


@dataclasses.dataclass(frozen=True)
class DistillationMetrics(MaskedMetrics):
    """Sums over masked tokens, except cosine_loss_sum, a distance summed over all tokens.

    It has as many fields as `Metrics`.
    """

    soft_loss_sum: float = 0.0
    cosine_loss_sum: float = 0.0
    num_tokens: float = 0.0

    @property
    def soft_loss(self) -> float:
        return self.soft_loss_sum / max(self.num_targets, 1)

    @property
    def cosine_loss(self) -> float:
        return self.cosine_loss_sum / max(self.num_tokens, 1)


class Weights(NamedTuple):
    """The weights of the three losses."""

    soft: float
    mlm: float
    cosine: float


class Answer(NamedTuple):
    """A model's results for a batch of T tokens.

    hidden_states: (T, H), or (M, H) for M selected rows; logits: (C, V) at the masked positions;
    targets: (C,) int64, the tokens to predict there, -100 at unused positions
    """

    hidden_states: Tensor
    logits: Tensor
    targets: Tensor


class Teacher:
    """The teacher model, in eval mode and without gradients.

    It is not an nn.Module, so an objective that holds it leaves it out of its parameters, shards
    and checkpoints, and does not change its mode.
    """

    def __init__(self, model: BertForMaskedLM) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def answer(self, batch: PackedBatch, rows: Rows | None) -> Answer:
        """The teacher's `answer` to a batch, without gradients."""
        return answer(self.model, batch, rows)


def answer(model: BertForMaskedLM, batch: PackedBatch, rows: Rows | None) -> Answer:
    """Hidden states of all tokens or only of `rows`, and the MLM logits at the masked positions."""
    hidden_states = model.bert(batch, rows=rows).last_hidden_state
    masked = masked_rows(hidden_states, batch, rows)
    return Answer(hidden_states, model.cls.predictions(masked.rows), masked.targets)


class DistillationObjective(PretrainingObjective):
    """The three losses of DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108).

    At the masked positions, the KL divergence from the teacher's probabilities, both softened by
    `temperature`, and the MLM loss; at all tokens, the cosine distance of the last hidden states.
    Losses are divided by the counts of the whole batch, as in `PretrainingObjective`. In eval mode
    it acts as a `PretrainingObjective`, so held-out metrics are those of the MLM loss.

    Both models' logits at the masked positions are in memory at the same time, also in float32.
    """

    model: BertForMaskedLM

    def __init__(
        self,
        model: BertForMaskedLM,
        teacher: Teacher,
        weights: Weights,
        temperature: float,
    ) -> None:
        super().__init__(model)
        self.teacher = teacher
        self.weights = weights
        self.temperature = temperature

    def forward(
        self,
        batch: PackedBatch,
        num_targets: int | Tensor,
        num_pairs: int | Tensor,
        num_tokens: int | Tensor = 1,
    ) -> Result:
        """The weighted sum of the three losses; in eval mode the result of `PretrainingObjective`.

        The last three sums are the soft-target loss, the cosine loss, and the number of tokens.
        """
        if not self.training:
            return super().forward(batch, num_targets, num_pairs, num_tokens)
        weights = self.weights
        # the cosine loss needs all tokens; without it, the last layer computes only labelled ones
        rows = None if weights.cosine else wanted_rows(batch, first=False, labelled=True)
        own, taught = answer(self.model, batch, rows), self.teacher.answer(batch, rows)
        words = score_classes(own.logits, own.targets, count_correct=True)
        soft = soft_target_loss(
            own.logits, taught.logits, own.targets != IGNORE_INDEX, self.temperature
        )
        both = weights.soft * soft + weights.mlm * words.loss_sum
        loss = words._replace(loss_sum=both).loss(num_targets)
        cosine = tokens = torch.zeros_like(loss)
        if weights.cosine:
            is_real = batch.is_real()
            cosine = cosine_loss(own.hidden_states, taught.hidden_states, is_real)
            tokens = is_real.sum()
            loss = loss + weights.cosine * words._replace(loss_sum=cosine).loss(num_tokens)
        return Result.of(loss, [*words.sums(), soft, cosine, tokens])
