"""AdamW and LAMB for BERT, and its learning-rate schedule: linear warm-up, then linear decay."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastbert.optim import Lamb

_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")


def make_optimizer(
    model: nn.Module, weight_decay: float, name: str = "adamw"
) -> torch.optim.Optimizer:
    """The optimizer `name`, with weight decay on all parameters but biases and LayerNorm's.

    The learning rate is 0 until a step sets it. "adamw" is torch's (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1711.05101), with RoBERTa's second beta of 0.98 (Liu et al. 2019): with
    BERT's 0.999, small models at a high learning rate stayed at the unigram loss for hundreds of
    steps. "lamb" is `fastbert.optim.Lamb` in NVIDIA's variant, without a trust ratio for biases and
    LayerNorm. Neither clips gradients by itself: see `clipped_step`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # the one-dimensional parameters are biases and the weights of LayerNorm
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "lamb":
        return Lamb(groups, lr=0.0, variant="nvidia", max_grad_norm=None)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float
) -> Tensor:
    """Updates the parameters with gradients clipped to a norm of `max_norm`, and drops gradients.

    optimizer: one from this module; it scales the gradients itself, which saves a pass over them.
    Returns a float32 tensor (): 1 if the gradients were not finite, so that neither weights nor
    state changed, else 0. The host does not wait. The clipped gradients equal those of
    `nn.utils.clip_grad_norm_`, as Pascanu et al. 2013 define them (arXiv:1211.5063).
    """
    scaled: Any = optimizer
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    # the attributes of a GradScaler: the optimizer divides by the first, skips if the second is 1
    scaled.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1).float()
    scaled.found_inf = skipped
    optimizer.step()
    del scaled.grad_scale, scaled.found_inf
    optimizer.zero_grad()
    return skipped


def finetuning_optimizer(
    model: nn.Module, num_layers: int, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW with layer-wise learning rates (Howard & Ruder 2018, section 3.2).

    The head and the pooler have the full learning rate. Each of the `num_layers` layers, from the
    last to the first, has `layer_decay` times the rate of the layer above it, and so have the
    embeddings below the first layer. The caller multiplies each step's learning rate with the
    factor "share" of each parameter group. Biases and LayerNorm have no weight decay.
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
    """A parameter's depth: 0 in the head, 1 in the last layer, num_layers + 1 in the embeddings."""
    if layer := _LAYER.search(name):
        return num_layers - int(layer[1])
    return num_layers + 1 if "embeddings." in name else 0


def linear_schedule(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The learning rate of a step in [0, total): linear to `peak` in `warmup` steps, then to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)
