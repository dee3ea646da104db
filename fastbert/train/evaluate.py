"""What a run reports: of its training steps, and of text that it has not seen."""

import math

import torch
from torch import nn

from fastbert.packing import PackedBatch
from fastbert.train.distributed import Ranks, reshard
from fastbert.train.objective import Metrics
from fastbert.train.precision import autocast


def training_row(
    step: int, metrics: Metrics, nsp_weight: float, tokens_per_second: float
) -> dict[str, float]:
    """What is reported; a mean that no step has contributed to is NaN."""
    means = {
        "loss": metrics.mlm_loss + nsp_weight * metrics.nsp_loss,
        "mlm_loss": metrics.mlm_loss,
        "mlm_accuracy": metrics.mlm_accuracy,
        **_of_pairs(metrics),
    }
    if not metrics.num_targets:
        means = dict.fromkeys(means, math.nan)
    return {
        "step": step,
        **means,
        "real_tokens_per_second": tokens_per_second,
        "skipped_steps": metrics.skipped_steps,
    }


@torch.no_grad()
def evaluate(
    objective: nn.Module, batches: list[PackedBatch], precision: str, step: int, ranks: Ranks
) -> dict[str, float]:
    """The metrics of the held-out batches, every one of them once, by one rank or another."""
    objective.eval()
    found = []
    for first in range(0, len(batches), ranks.size):
        mine = first + ranks.rank
        batch = batches[mine % len(batches)]  # as many for each rank, as they exchange weights
        with autocast(precision, ranks.device):
            sums = objective(batch.to(ranks.device), 1, 1).sums
        found.append(sums if mine < len(batches) else torch.zeros_like(sums))
    reshard(objective)
    objective.train()
    metrics = Metrics(*ranks.sum(torch.stack(found).sum(0)).tolist())
    return {
        "step": step,
        "heldout_mlm_loss": metrics.mlm_loss,
        "mlm_accuracy": metrics.mlm_accuracy,
        **_of_pairs(metrics),
    }


def _of_pairs(metrics: Metrics) -> dict[str, float]:
    """Nothing where there are none."""
    if not metrics.num_pairs:
        return {}
    return {"nsp_loss": metrics.nsp_loss, "nsp_accuracy": metrics.nsp_accuracy}
