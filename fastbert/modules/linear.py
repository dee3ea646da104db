"""Several linear layers of the same input as one matrix product."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.backend import Op


def fused_linear(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """The outputs of `linears` side by side: (..., H) -> (..., sum of their output sizes).

    One product with the concatenated weights where every layer is a plain `nn.Linear`, but for few
    rows of float32 on a CPU, where copying the weights takes longer than the rest. A layer that is
    something else (LoRA, 8-bit, parametrized) or carries hooks is called, not read.
    """
    are_few = x.device.type == "cpu" and x.numel() < x.shape[-1] ** 2
    is_worth_it = not are_few or rounds_products(x)  # whose gradients' sum would be rounded thrice
    are_alike = all(map(is_plain, linears)) and len({layer.bias is None for layer in linears}) == 1
    if is_worth_it and are_alike:
        weight = torch.cat([layer.weight for layer in linears])  # type: ignore[misc]
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([layer.bias for layer in linears])  # type: ignore[misc]
        return F.linear(x, weight, bias)
    return torch.cat([layer(x) for layer in linears], dim=-1)


def split_bias(x: Tensor, layer: nn.Module, into: Op | None) -> tuple[Tensor, Tensor | None]:
    """A linear layer's product and its bias, for the operator `into`, which adds it on its way.

    The gradient of the bias is then a by-product of its kernel, not another pass over the rows, and
    in low precision its sum with the product is not rounded. The bias is None where it is in the
    product already: in float32 where `into` has no kernel here, and for a layer that is not a plain
    `nn.Linear`, which is called.
    """
    if not is_plain(layer):
        return layer(x), None
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    if into is not None and (into.has_kernels(x.device.type) or rounds_products(x)):
        return F.linear(x, weight), bias
    return F.linear(x, weight, bias), None


def rounds_products(x: Tensor) -> bool:
    """Whether a product of x, under autocast too, is in less than float32."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return torch.finfo(dtype).bits < 32


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the layer does no more than a layer of that kind with its parameters."""
    return type(layer) is kind and not has_hooks(layer)


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
