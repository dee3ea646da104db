"""Losses as sums and counts, so that an optimizer step can normalise them over all its batches.

B sequences, T tokens, L labels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.check import require
from fastbert.modules.linear import is_plain, is_usual
from fastbert.modules.sequences import Rows
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.mlm_gather import MaskedRows, mlm_gather
from fastbert.packing import IGNORE_INDEX, PackedBatch

Count = Tensor | int | None  # the number of labels in a whole optimizer step, which divides sums


class Scored(NamedTuple):
    """The summed loss of the labelled rows, and their number; each field has shape ().

    loss_sum: float32 or wider, 0 without labelled rows; num_rows: the number of labelled rows;
    correct: the number of rows whose target has the highest logit, None if it was not counted.
    """

    loss_sum: Tensor
    num_rows: Tensor
    correct: Tensor | None = None

    def loss(self, num_items: Count = None) -> Tensor:
        """loss_sum / num_rows, or / num_items; 0 with zero gradients if there are no labels."""
        count = self.num_rows if num_items is None else num_items
        if isinstance(count, Tensor):
            count = count.to(self.loss_sum.device).clamp(min=1)
            # `without_padding` returns a float64 fraction, which would widen the loss
            count = count.to(self.loss_sum.dtype) if count.is_floating_point() else count
            return self.loss_sum / count
        return self.loss_sum / max(count, 1)

    def sums(self) -> list[Tensor]:
        """The sums for metrics: loss, correct targets (which must be counted), labelled rows."""
        assert self.correct is not None
        return [self.loss_sum, self.correct, self.num_rows]


def wants_logits(
    model: nn.Module, has_loss: bool, return_logits: bool | None, skip_logits: bool | None
) -> bool:
    """Whether to return logits over the vocabulary; by default not in training with a loss.

    Raises ValueError if return_logits and skip_logits contradict each other.
    """
    agree = None in (return_logits, skip_logits) or return_logits != skip_logits
    said = f"{return_logits} and {skip_logits}"
    require(agree, type(model).__name__, "return_logits and skip_logits that agree", said)
    if skip_logits is not None:
        return not skip_logits
    return not (has_loss and model.training) if return_logits is None else return_logits


def without_padding(num_items: Count, labels: Tensor, kept: Tensor | int) -> Count:
    """A step's number of labels as Trainer counts them, without the share that is at padding.

    labels: this batch's, with -100 for no label; kept: the number of its labels not at padding
    """
    if num_items is None:
        return None
    given = (labels != IGNORE_INDEX).sum().clamp(min=1)
    if isinstance(kept, Tensor):
        given = given.to(kept.device)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(given.device)
    return num_items * kept / given.double()


def pretraining_loss(words: Scored, pairs: Scored, num_items: Count) -> Tensor:
    """The masked-LM loss plus the next-sentence loss.

    num_items: the number of masked tokens in an optimizer step. It divides the sum of the token
    losses, and the mean of the pair losses is weighted with this batch's share of it. Without it,
    both losses are means.
    """
    pair_loss = pairs.loss()
    if num_items is not None:
        pair_loss = pairs._replace(loss_sum=pair_loss * words.num_rows).loss(num_items)
    return words.loss(num_items) + pair_loss


def score_words(head: Any, masked: MaskedRows, count_correct: bool = False) -> Scored:
    """Runs a masked-LM head with a `transform` and a `decoder` on the rows of `masked`."""
    rows, decoder = head.transform(masked.rows), head.decoder
    if not (is_plain(decoder) and is_usual(decoder.weight)):
        return score_classes(decoder(rows), masked.targets, count_correct)
    result = linear_cross_entropy(
        *(rows, decoder.weight, decoder.bias, masked.targets.long()),
        reduction="sum",
        return_correct=count_correct,
    )
    loss_sum, correct = result if isinstance(result, tuple) else (result, None)
    return Scored(loss_sum, masked.count, correct)


def masked_rows(hidden_states: Tensor, batch: PackedBatch, rows: Rows | None = None) -> MaskedRows:
    """The masked positions of hidden states (T, H), or (M, H) if only `rows` were computed."""
    labels = batch.labels
    assert labels is not None
    if rows is not None:
        labels = rows.take(labels, IGNORE_INDEX)
    return mlm_gather(hidden_states, labels, capacity=batch.num_labels)


def soft_target_loss(
    logits: Tensor, teacher_logits: Tensor, counts: Tensor, temperature: float
) -> Tensor:
    """KL divergence from a teacher's probabilities, summed over rows, times temperature^2.

    logits, teacher_logits: (C, L), divided by the temperature here (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531); counts: (C,) bool, True for the rows to sum. Returns () in
    float32 or wider.
    """
    own, taught = (
        (_wide(scores) / temperature).log_softmax(-1) for scores in (logits, teacher_logits)
    )
    divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence.masked_fill(~counts, 0).sum()


def cosine_loss(hidden_states: Tensor, teacher_states: Tensor, counts: Tensor) -> Tensor:
    """Sum of 1 - cosine similarity over the rows of (T, H) states where (T,) `counts` is True."""
    cosine = F.cosine_similarity(_wide(hidden_states), _wide(teacher_states), dim=-1)
    return (1 - cosine).masked_fill(~counts, 0).sum()


def score_classes(logits: Tensor, targets: Tensor, count_correct: bool = False) -> Scored:
    """Cross-entropy of logits (T, L) and targets (T,); rows with the target -100 are left out."""
    targets = targets.to(logits.device, torch.int64)
    loss_sum = F.cross_entropy(_wide(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    correct = (logits.argmax(-1) == targets).sum() if count_correct else None
    return Scored(loss_sum, (targets != IGNORE_INDEX).sum(), correct)


def span_loss(
    scores: Sequence[Tensor], columns: Sequence[Tensor], is_real: Tensor | None, num_items: Count
) -> Tensor:
    """The mean of start loss and end loss: for each, logits (B, S) and columns (B,) or (B, 1).

    Columns below 0 count as 0, as in Hugging Face. Columns beyond the end are left out, and so are
    those where is_real (B, S) bool is False.
    """
    losses = []
    for each, places in zip(scores, columns, strict=True):
        places = places.to(each.device, torch.int64).view(-1, 1).clamp(0, each.shape[1])
        inside = places < each.shape[1]
        counts = inside if is_real is None else F.pad(is_real, (0, 1)).gather(1, places)
        targets = torch.where(counts, places, IGNORE_INDEX).squeeze(1)
        losses.append(score_classes(each, targets).loss(num_items))
    return (losses[0] + losses[1]) / 2


def problem_type_of(labels: Tensor, num_labels: int) -> str:
    """The problem_type that Hugging Face infers from labels of sequences: regression for one
    number each, otherwise single label for integers and multi-label for floats."""
    if num_labels == 1:
        return "regression"
    kind = "single" if labels.dtype in (torch.int64, torch.int32) else "multi"
    return f"{kind}_label_classification"


def score_sequences(logits: Tensor, labels: Tensor, problem_type: str) -> Scored:
    """Squared error, cross-entropy or binary cross-entropy of logits (B, L).

    labels: (B,) classes for single_label_classification; (B, L) numbers for regression and for
    multi_label_classification. As in Hugging Face, regression and multi-label losses are means
    over all B * L numbers. Raises ValueError for labels of another size.
    """
    shape, is_single = tuple(logits.shape), problem_type == "single_label_classification"
    require(
        labels.numel() == logits.shape[0] * (1 if is_single else logits.shape[1]),
        "labels",
        f"shape {shape[:1] if is_single else shape} for {problem_type}",
        tuple(labels.shape),
    )
    if is_single:
        return score_classes(logits, labels.flatten())
    logits = _wide(logits)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    of = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    count = torch.full((), logits.numel(), device=logits.device)
    return Scored(of(logits, labels, reduction="sum"), count)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
