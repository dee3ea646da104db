"""Inputs of linear_cross_entropy, and its results beside plain PyTorch's."""

import torch
import torch.nn.functional as F

from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from tests.oracle import assert_as_accurate, gradients

NAMES = ("loss", "dhidden", "dweight", "dbias")


def inputs(rows, size, classes, dtype, device):
    """(hidden, weight, bias), targets; a fifth of the rows does not count."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.randn(classes, size, device=device) * size**-0.5 * 2).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    targets = torch.randint(classes, (rows,), device=device)
    targets[1::5] = -100
    return (hidden, weight, bias), targets


def ours(targets, **options):
    return lambda *tensors: linear_cross_entropy(*tensors, targets, **options)


def plain(targets, reduction="mean", **options):
    """In the inputs' dtype, but for the softmax; a mean over no rows is 0."""

    def function(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, reduction="sum", **options)
        count = (targets != options.get("ignore_index", -100)).sum().clamp(min=1)
        return loss / count if reduction == "mean" else loss

    return function


def compare(tensors, targets, dy=3.0, **options):
    dy = torch.tensor(dy, device=targets.device)
    actual = gradients(ours(targets, **options), *tensors, dy=dy)
    same_dtype = gradients(plain(targets, **options), *tensors, dy=dy)
    truth = gradients(plain(targets, **options), *(t.double() for t in tensors), dy=dy.double())
    assert_as_accurate(actual, same_dtype, truth, names=NAMES)
