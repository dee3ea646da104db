"""Copies of an encoder's weights in the form that its products read, made all at once.

Autocast casts each weight before its product, and each gradient back: two kernels for every linear
layer of a step, most of which take longer to launch than to run. Weights that share a product are
concatenated, too. Here a few multi-tensor launches make all copies (the working copies of the
master weights in Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740), and the product that
computes a weight's gradient writes it in the weight's own dtype. The parameters stay as they are,
so that optimizers, checkpoints and evaluation see no copies.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.modules.linear import encoders_of
from fastbert.modules.products import PRODUCTS, Products
from fastbert.ops.fused import as_rows, joined, once, product, result_dtype

ALIGNED = 64  # elements: copies begin at multiples of 128 bytes, as fast products require


class WeightCopies(Products):
    """Copies in `dtype` of the weights and biases of plain linear layers in the model's encoders.

    Tensors in float32 are cast; tensors in `dtype` are only concatenated. Copies of biases are read
    while the biases are not trained. Encoders in FP8, shards and other dtypes are left out; with a
    `dtype` of None, as in a float32 run, all are. Products read the copies inside `in_use`, after
    `attach`, and for leaves that are given this object, also as recorded in a graph. A copy is
    found by the memory of its original, so that an alias of a parameter finds it, too.
    """

    reads_each_bias = True  # each is found by its own memory

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        def is_copied(tensor: Any) -> bool:
            # known by its attribute: DTensor's module takes as long to import as all of fastbert
            is_whole = tensor is not None and not hasattr(tensor, "device_mesh")
            return is_whole and tensor.dtype in (torch.float32, dtype)

        self.modules: list[nn.Module] = []  # the linear layers, and the lists of layers around them
        for layers in () if dtype is None else encoders_of(model):
            if PRODUCTS not in vars(layers):
                linears = (module for module in layers.modules() if type(module) is nn.Linear)
                self.modules.append(layers)
                self.modules += (linear for linear in linears if is_copied(linear.weight))
        # the element of `memory` at which each tensor's copy begins
        self.starts: dict[Tensor, int] = {}
        size = 0
        for name in ("weight", "bias"):  # so weights are neighbours, and biases
            tensors: Iterator[Any] = (getattr(module, name, None) for module in self.modules)
            for tensor in tensors:
                if is_copied(tensor) and tensor not in self.starts:
                    self.starts[tensor] = size
                    size += -(-tensor.numel() // ALIGNED) * ALIGNED
        device = next(iter(self.starts)).device if self.starts else None
        self.memory = torch.empty(size, dtype=dtype, device=device)
        self.copies = [self._copy(at, *tensor.shape) for tensor, at in self.starts.items()]
        self.places: dict[Any, int] = {}  # `starts` by `_memory_of` the tensors, at `renew`
        self.storages: list[Any] = []  # kept, so that no new storage gets the address of one

    def _copy(self, place: int, *shape: int) -> Tensor:
        return self.memory[place : place + math.prod(shape)].view(shape)

    def renew(self) -> None:
        """Makes all copies."""
        self.storages = [tensor.untyped_storage() for tensor in self.starts]
        self.places = {_memory_of(tensor): at for tensor, at in self.starts.items()}
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, list(self.starts))

    def attach(self) -> None:
        """Makes all copies, which products read from now on: the weights must not change."""
        self.renew()
        for module in self.modules:
            vars(module)[PRODUCTS] = self

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context for forward and backward: makes all copies anew, which products then read."""
        self.attach()
        try:
            yield
        finally:
            for module in self.modules:
                vars(module).pop(PRODUCTS, None)

    def product(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> Tensor | None:
        """`x @ weight.T + bias` with the copies; None if the product is to have another dtype.

        x: (..., K); weights: (N, K) when concatenated; biases: (N,) when concatenated, or empty.
        Returns (..., N) in the copies' dtype; None too if x is float64 or a weight has no copy.
        """
        are_known = all(_memory_of(weight) in self.places for weight in weights)
        if not are_known or x.dtype == torch.float64 or result_dtype(x) != self.memory.dtype:
            return None
        bias = None
        if biases:
            are_copied = all(_memory_of(one) in self.places for one in biases)
            are_trained = torch.is_grad_enabled() and any(one.requires_grad for one in biases)
            is_copy = are_copied and not are_trained
            bias = self._joined(biases) if is_copy else joined(biases)
        return _Product.apply(x, self._joined(weights), bias, *weights)  # type: ignore[no-untyped-call]

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors' copies, concatenated: a view if they are neighbours in memory."""
        places = [self.places[_memory_of(tensor)] for tensor in tensors]
        ends = [at + tensor.numel() for at, tensor in zip(places, tensors, strict=True)]
        if places[1:] == ends[:-1]:
            return self._copy(places[0], sum(map(len, tensors)), *tensors[0].shape[1:])
        return joined([self._copy(at, *one.shape) for at, one in zip(places, tensors, strict=True)])


def _memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """A key for the memory and layout of a tensor, which its aliases share."""
    storage = tensor.untyped_storage()._cdata  # tensors without data have one, too, but no address
    return storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


class _Product(torch.autograd.Function):
    """`x @ copy.T + bias`, whose gradients go to `weights`, which `copy` is a copy of."""

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
