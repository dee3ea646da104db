"""The activation functions that `hidden_act` may name."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.modules.linear import split_bias
from fastbert.ops.bias_gelu import bias_gelu

GELU_TANH = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu,  # the exact one, by erf: Hugging Face's meaning of the name
    "gelu_python": F.gelu,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def dense_and_activate(x: Tensor, dense: nn.Module, function: Callable) -> Tensor:
    """function(dense(x)), the bias added by the operator of the function, if it has one."""
    into = bias_gelu if function in (F.gelu, GELU_TANH) else None
    return activate(function, *split_bias(x, dense, into))


def activate(function: Callable, x: Tensor, bias: Tensor | None) -> Tensor:
    """function(x + bias), by one operator where there is one for it; a bias of None is none."""
    if bias is None:
        return function(x)
    if function is F.gelu:
        return bias_gelu(x, bias)
    if function is GELU_TANH:
        return bias_gelu(x, bias, approximate="tanh")
    return function(x + bias.to(x.dtype))


def activation(hidden_act: str | Callable) -> Callable:
    """The function that a config's `hidden_act` names, or itself if it is one already."""
    if callable(hidden_act):
        return hidden_act
    if hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act: expected a function or one of {', '.join(ACTIVATIONS)}, "
            f"got {hidden_act!r}"
        )
    return ACTIVATIONS[hidden_act]
