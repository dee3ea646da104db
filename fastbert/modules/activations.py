"""The activation functions that `hidden_act` may name."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.modules.linear import Leaf, split_bias
from fastbert.ops.bias_gelu import Call, bias_gelu

Activation = Callable[[Tensor], Tensor]  # elementwise

GELU_TANH = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,  # the exact erf formula, which this name means in Hugging Face
    "gelu_python": F.gelu,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def dense_and_activate(x: Tensor, dense: Leaf, function: Activation) -> Tensor:
    """`function(dense(x))`: (..., H) -> (..., I); for GELU one operator adds the bias too."""
    is_gelu = function is F.gelu or function is GELU_TANH
    x, bias = split_bias(x, dense, bias_gelu if is_gelu else None)
    if bias is None:
        return function(x)
    return bias_gelu.run(Call(x, bias, "none" if function is F.gelu else "tanh"))


def activation(hidden_act: str | Activation) -> Activation:
    """The function that a config's `hidden_act` names, or `hidden_act` itself if it is a function.

    Raises ValueError for an unknown name.
    """
    if callable(hidden_act):
        return hidden_act
    if hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act: expected a function or one of {', '.join(ACTIVATIONS)}, "
            f"got {hidden_act!r}"
        )
    return ACTIVATIONS[hidden_act]
