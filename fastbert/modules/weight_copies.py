"""Copies of an encoder's weights in low precision, which a training step makes all at once.

Autocast casts each weight where a product reads it, and each of their gradients back: two launches
for every linear layer of a step, most of which are so short that launching them takes longer. Here
a few multi-tensor launches make all copies (the working copies beside the master weights of
Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740), and the product that computes a
weight's gradient writes it in the weight's own dtype. The parameters stay what they are, so that
optimizers, checkpoints and evaluation know of no copies.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastbert.modules.linear import PRODUCTS, encoders_of
from fastbert.ops.fused import as_rows, once, product, result_dtype

ALIGNED = 64  # elements: copies begin at multiples of 128 bytes, which fast products want


class WeightCopies:
    """Copies in `dtype` of the weights of all plain linear layers of the model's encoders.

    Left out are encoders in FP8, shards, and weights that are not in float32. Only products inside
    `in_use` read the copies, those of leaves that are given them, and graphs that were recorded so.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.modules: list[nn.Module] = []  # the linear layers, and the lists of layers around them
        self.places: dict[Tensor, int] = {}  # of each weight, the element at which its copy begins
        size = 0
        for layers in encoders_of(model):
            if PRODUCTS in vars(layers):
                continue
            self.modules.append(layers)
            for linear in layers.modules():
                if type(linear) is nn.Linear and _is_copied(linear.weight, dtype):
                    self.modules.append(linear)
                    if linear.weight not in self.places:
                        self.places[linear.weight] = size
                        size += -(-linear.weight.numel() // ALIGNED) * ALIGNED
        device = next(iter(self.places)).device if self.places else None
        self.memory = torch.empty(size, dtype=dtype, device=device)
        self.copies = [self._copy(at, *weight.shape) for weight, at in self.places.items()]

    def _copy(self, place: int, rows: int, columns: int) -> Tensor:
        return self.memory[place : place + rows * columns].view(rows, columns)

    def renew(self) -> None:
        """Makes all copies."""
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, list(self.places))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Has products read the copies, which are made anew first; for forward and backward."""
        self.renew()
        for module in self.modules:
            vars(module)[PRODUCTS] = self
        try:
            yield
        finally:
            for module in self.modules:
                vars(module).pop(PRODUCTS, None)

    def begin(self, x: Tensor, training: bool) -> str:
        """Begins a forward, which may replay a graph, as the copies keep their places."""
        return ""

    def product(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor | None:
        """`x @ weight.T + bias` by the copies; None without autocast to their dtype.

        x: (..., K); weights: side by side, (N, K) in all; bias: (N,) or None. Returns (..., N) in
        autocast's dtype. None too for x in float64 and for weights without a copy.
        """
        are_known = all(weight in self.places for weight in weights)
        if not are_known or x.dtype == torch.float64 or result_dtype(x) != self.memory.dtype:
            return None
        return _Product.apply(x, self._joined(weights), bias, *weights)  # type: ignore[no-untyped-call]

    def _joined(self, weights: Sequence[Tensor]) -> Tensor:
        """The copies of the weights as one matrix: a view where they are neighbours in memory."""
        places = [self.places[weight] for weight in weights]
        ends = [at + weight.numel() for at, weight in zip(places, weights, strict=True)]
        if places[1:] == ends[:-1]:
            return self._copy(places[0], sum(map(len, weights)), weights[0].shape[1])
        pairs = zip(places, weights, strict=True)
        return torch.cat([self._copy(at, *weight.shape) for at, weight in pairs])

    def feed_forward(self, *_: Any) -> None:
        """Leaves both products of a feed-forward to `product`."""


def _is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the weight is a whole float32 parameter, which autocast casts."""
    return weight.dtype == torch.float32 != dtype and not isinstance(weight, DTensor)


class _Product(torch.autograd.Function):
    """`x @ copy.T + bias`, whose gradients are those of the weights that `copy` is one of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        low = x.to(copy.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(low, copy, None if bias is None else bias.to(copy.dtype))
        ctx.save_for_backward(low, copy)
        ctx.rows, ctx.dtypes = [len(weight) for weight in weights], (x.dtype, weights[0].dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once("a step's linear layer")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        rows = as_rows(dy)
        dx = dbias = None
        dweights: Sequence[Tensor | None] = [None] * len(ctx.rows)
        if ctx.needs_input_grad[0]:
            dx = (dy @ copy).to(x_dtype)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        if any(ctx.needs_input_grad[3:]):
            dweights = product(rows.t(), as_rows(x), weight_dtype).split(ctx.rows)
        return dx, None, dbias, *dweights
