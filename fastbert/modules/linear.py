"""Several linear layers of the same input as one matrix product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fused_linear(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """The outputs of `linears` side by side: (..., H) -> (..., sum of their output sizes).

    One product with the concatenated weights where every layer is a plain `nn.Linear`. A layer that
    is something else (LoRA, 8-bit, parametrized) or carries hooks is called, not read.
    """
    if all(map(_is_plain, linears)) and len({layer.bias is None for layer in linears}) == 1:
        weight = torch.cat([layer.weight for layer in linears])  # type: ignore[misc]
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([layer.bias for layer in linears])  # type: ignore[misc]
        return F.linear(x, weight, bias)
    return torch.cat([layer(x) for layer in linears], dim=-1)


def _is_plain(layer: nn.Module) -> bool:
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return type(layer) is nn.Linear and not any(hooks)
