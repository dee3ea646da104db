"""AdamW as BERT uses it: no decay on biases and LayerNorm, linear warm-up and decay."""

import torch
from torch import nn


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017) over two groups; the learning rate is set at each step.

    The second beta is RoBERTa's 0.98 (Liu et al. 2019): with BERT's 0.999, small models at a high
    rate were seen to stay at the loss of the unigrams for hundreds of steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # biases and the gains and offsets of LayerNorm are the parameters of one dimension
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def linear_schedule(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The learning rate of a step in [0, total): up to `peak` in `warmup` steps, then down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(total - warmup, 1)
