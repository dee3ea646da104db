"""AdamW or LAMB as BERT uses them: no decay on biases and LayerNorm, linear warm-up and decay."""

import re

import torch
from torch import nn

from fastbert.optim import Lamb

_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")


def make_optimizer(
    model: nn.Module, weight_decay: float, name: str = "adamw"
) -> torch.optim.Optimizer:
    """The optimizer of that name over two groups; the learning rate is set at each step.

    "adamw" is torch's (Loshchilov & Hutter 2017). Its second beta is RoBERTa's 0.98 (Liu et al.
    2019): with BERT's 0.999, small models at a high rate were seen to stay at the loss of the
    unigrams for hundreds of steps. "lamb" is `fastbert.optim.Lamb`, without a ratio for biases and
    LayerNorm, as NVIDIA has it; the step clips for both. Both skip a step where their `found_inf`
    is 1, without the host's help.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # biases and the gains and offsets of LayerNorm are the parameters of one dimension
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "lamb":
        return Lamb(groups, lr=0.0, variant="nvidia", max_grad_norm=None)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def finetuning_optimizer(
    model: nn.Module, num_layers: int, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW with a share of the learning rate by layer (Howard & Ruder 2018, section 3.2).

    The head and the pooler take the whole rate, the last of `num_layers` layers `layer_decay` of
    it, each layer below that share of the one above, and the embeddings that of the first. A group
    has its share under "share"; the learning rate is set at each step.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = layer_decay ** _depth(name, num_layers)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((share, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "share": s, "weight_decay": d} for (s, d), p in groups.items()],
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-6,
        fused=True,
    )


def _depth(name: str, num_layers: int) -> int:
    """How many layers a parameter lies below the head."""
    if layer := _LAYER.search(name):
        return num_layers - int(layer[1])
    return num_layers + 1 if "embeddings." in name else 0


def linear_schedule(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The learning rate of a step in [0, total): up to `peak` in `warmup` steps, then down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(total - warmup, 1)
