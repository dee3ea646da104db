"""The activation functions that `hidden_act` may name."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import Op
from fastbert.modules.linear import Leaf, split_bias
from fastbert.ops.bias_gelu import BiasGelu, bias_gelu
from fastbert.rng import DropoutState

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


def approximation(function: Activation) -> str | None:
    """The name in `bias_gelu` of the formula that `function` uses; None if it is not GELU."""
    if function is F.gelu:
        return "none"
    return "tanh" if function is GELU_TANH else None


def dense_and_activate(
    x: Tensor, dense: Leaf, function: Activation, rng: DropoutState | None = None
) -> Tensor:
    """`function(dense(x))`: (..., H) -> (..., I); for GELU one operator adds the bias too."""
    approximate = approximation(function)
    x, bias = split_bias(x, dense, None if approximate is None else bias_gelu, rng)
    if approximate is None or bias is None:
        return function(x)
    return bias_gelu.run(BiasGelu(x, bias, approximate))


def feed_forward(
    x: Tensor,
    dense: Leaf,
    function: Activation,
    output: Leaf,
    into: Op | None,
    rng: DropoutState | None,
) -> tuple[Tensor, Tensor | None]:
    """`output(function(dense(x)))`: (..., H) -> (..., O), and the bias that `into` is to add.

    In FP8, two plain layers with a GELU between them are one operator. into: see `split_bias`.
    """
    products = dense.products
    if products is not None and into is not None and dense.is_plain and output.is_plain:
        approximate, bias = approximation(function), dense.bias
        second = output.products
        if approximate is not None and bias is not None and second is not None:
            y = products.feed_forward(x, dense.weight, bias, second, output.weight, approximate)
            if y is not None:
                return y, output.bias
    return split_bias(dense_and_activate(x, dense, function, rng), output, into, rng)


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
