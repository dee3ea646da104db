"""Several linear layers of the same input as one matrix product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.backend import Op

_NARROW = (torch.float16, torch.bfloat16)


class Leaf:
    """A module without modules of its own, and whether it is plain, which is asked once.

    A plain one's parameters are read at each use, from its dictionary: `nn.Module`'s own look-up
    takes longer. Any other is called.
    """

    __slots__ = ("is_plain", "module")

    def __init__(self, module: nn.Module, kind: type[nn.Module] = nn.Linear) -> None:
        self.module = module
        self.is_plain = is_plain(module, kind)

    def __call__(self, x: Tensor) -> Tensor:
        if type(self.module) is nn.Linear and self.is_plain:
            return F.linear(x, self.weight, self.bias)
        return self.module(x)

    @property
    def weight(self) -> Any:
        return self.module._parameters["weight"]

    @property
    def bias(self) -> Any:
        return self.module._parameters["bias"]


def fused_linear(x: Tensor, linears: Sequence[Leaf]) -> Tensor:
    """The outputs of `linears` side by side: (..., H) -> (..., sum of their output sizes).

    One product with the concatenated weights where every layer is a plain `nn.Linear`, but for few
    rows of float32 on a CPU, where copying the weights takes longer than the rest. A layer that is
    something else (LoRA, 8-bit, parametrized) or carries hooks is called, not read.
    """
    are_few = x.is_cpu and x.numel() < x.shape[-1] ** 2
    is_worth_it = not are_few or rounds_products(x)  # whose gradients' sum would be rounded thrice
    if is_worth_it and all(layer.is_plain for layer in linears):
        biases = [layer.bias for layer in linears]
        without = biases.count(None)
        if without in (0, len(biases)):
            weight = torch.cat([layer.weight for layer in linears])
            return F.linear(x, weight, None if without else torch.cat(biases))
    return torch.cat([layer(x) for layer in linears], dim=-1)


def split_bias(x: Tensor, layer: Leaf, into: Op | None) -> tuple[Tensor, Tensor | None]:
    """A linear layer's product and its bias, for the operator `into`, which adds it on its way.

    The gradient of the bias is then a by-product of its kernel, not another pass over the rows, and
    in low precision its sum with the product is not rounded. The bias is None where it is in the
    product already: in float32 where `into` has no kernel here, and for a layer that is not a plain
    `nn.Linear`, which is called.
    """
    if not layer.is_plain:
        return layer(x), None
    weight, bias = layer.weight, layer.bias
    if into is not None and (into.has_kernels(x.device.type) or rounds_products(x)):
        return F.linear(x, weight), bias
    return F.linear(x, weight, bias), None


def rounds_products(x: Tensor) -> bool:
    """Whether a product of x, under autocast too, is in less than float32."""
    return x.dtype in _NARROW or torch.is_autocast_enabled(x.device.type)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the layer does no more than a layer of that kind with its parameters."""
    return type(layer) is kind and not has_hooks(layer)


def is_plain_table(table: nn.Module) -> bool:
    """Whether looking up an embedding reads rows and no more, with a dense, unscaled gradient."""
    return is_plain(table, nn.Embedding) and reads_rows(table)


def reads_rows(table: Any) -> bool:
    """Whether an `nn.Embedding` has none of the options by which it does more than that."""
    return table.max_norm is None and not table.sparse and not table.scale_grad_by_freq


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says: hooks, or a forward of its own.

    Accelerate's offloading and older transformers' capture set such a forward on the instance.
    """
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(layer)
