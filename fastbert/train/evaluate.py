"""Evaluation of the model on held-out text."""

import torch
from torch import nn

from fastbert.packing import PackedBatch
from fastbert.train.distributed import Ranks, reshard
from fastbert.train.objective import Metrics
from fastbert.train.precision import autocast


@torch.no_grad()
def evaluate(
    objective: nn.Module, batches: list[PackedBatch], precision: str, step: int, ranks: Ranks
) -> dict[str, float]:
    """The metrics of the held-out batches, which the ranks share. A collective call.

    step: the training step, copied into the result. Returns "step", "heldout_mlm_loss" in nats,
    "mlm_accuracy", and the metrics of pairs if there are any.
    """
    was_training = objective.training
    objective.eval()
    found = []
    for first in range(0, len(batches), ranks.size):
        mine = first + ranks.rank
        # every rank runs equally many batches, because FSDP exchanges weights; surplus is dropped
        batch = batches[mine % len(batches)]
        with autocast(precision, ranks.device):
            sums = objective(batch.to(ranks.device), 1, 1).sums
        found.append(sums if mine < len(batches) else torch.zeros_like(sums))
    reshard(objective)
    objective.train(was_training)
    metrics = Metrics(*ranks.sum(torch.stack(found).sum(0)).tolist())
    return {
        "step": step,
        "heldout_mlm_loss": metrics.mlm_loss,
        "mlm_accuracy": metrics.mlm_accuracy,
        **metrics.of_pairs(),
    }
