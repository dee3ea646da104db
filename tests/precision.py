"""Errors of low precision: a model's distance from its own float64 copy, beside another's."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTHS = [1, 40, 17, 64, 5, 33]


def padded_batch(lengths, vocab_size, device, pad=0) -> dict[str, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocab_size, mask.shape).masked_fill(~mask, pad)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def rms(errors: list[Tensor]) -> float:
    return torch.cat([error.flatten() for error in errors]).square().mean().sqrt().item()


def root_mean_square_error(
    model: Any,
    of: Callable[[Any], list[Tensor]],
    truth: list[Tensor],
    *,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Of what `of(model)` returns, under autocast, or with the parameters in a low precision."""
    model = copy.deepcopy(model)
    if dtype is not None:
        model = model.to(dtype)
    device = next(model.parameters()).device.type
    with torch.autocast(device, autocast, enabled=autocast is not None):
        found = of(model)
    return rms([a.double() - t for a, t in zip(found, truth, strict=True)])
