"""Inputs of the layer normalizations, and their results written out in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import rng as random
from fastbert.ops.layer_norm import dropout_add_layer_norm
from tests.oracle import gradients

SUM_NAMES = ("y", "dx", "dresidual", "dweight", "dbias", "dx_bias")


def native(eps):
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype)
    return x, weight, bias, torch.randn(shape, device=device).to(dtype)


class Sum(NamedTuple):
    """Inputs of dropout_add_layer_norm, in the order of SUM_NAMES, and the upstream gradient."""

    tensors: tuple[Tensor, ...]
    dy: Tensor
    rng: random.DropoutState

    def results(self, **options):
        def function(x, residual, weight, bias, x_bias):
            return dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, rng=self.rng, **options
            )

        return gradients(function, *self.tensors, dy=self.dy)

    def plain(self, dtype=None, *, eps=1e-12, dropout_p=0.0):
        """Written out; without a dtype in those of the inputs, as PyTorch promotes them."""
        keep, scale = 1, 1
        if dropout_p:
            keep = random.hidden_keep_mask(self.rng, self.tensors[0].shape[-1], dropout_p)
            keep, scale = keep.view(self.tensors[0].shape), random.keep_scale(dropout_p)

        def function(x, residual, weight, bias, x_bias):
            return native(eps)(residual + (x + x_bias) * keep * scale, weight, bias)

        tensors = self.tensors if dtype is None else [t.to(dtype) for t in self.tensors]
        return gradients(function, *tensors, dy=self.dy)


def sum_inputs(shape, dtype, device, *, site=5):
    x, weight, bias, dy = inputs(shape, dtype, device)
    residual = torch.randn(shape, device=device).to(dtype)
    x_bias = torch.randn(shape[-1], device=device).to(dtype)
    num_rows = shape[:-1].numel() if isinstance(shape, torch.Size) else x[..., 0].numel()
    state = random.new_state(torch.device(device))
    keys = torch.randint(2**31, (num_rows,), device=device) << 32 | torch.arange(
        7, 7 + num_rows, device=device
    )
    rng = random.DropoutState(state, keys, site)
    return Sum((x, residual, weight, bias, x_bias), dy, rng)
