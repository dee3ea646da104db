"""The random initialization of a model's weights."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def draw(model: Any, names: Collection[str] | None = None) -> None:
    """Initializes as BERT does: normal weights with std `initializer_range`, and zero biases.

    names: the parameters to initialize; None for those of all linear layers and embeddings
    """
    for owner, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if names is None or f"{owner}.weight" in names:
            nn.init.normal_(module.weight, std=model.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        has_bias = isinstance(module, nn.Linear) and module.bias is not None
        if has_bias and (names is None or f"{owner}.bias" in names):
            nn.init.zeros_(module.bias)


class Undrawn(TorchFunctionMode):
    """Skips the random initialization in a model's constructor, because weights are loaded next.

    Drawing BERT's weights takes longer than reading them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function in _DRAWING:
            return named["tensor"] if "tensor" in named else args[0]
        return function(*args, **named)


_INIT = nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_  # called by torch's layers
_DRAWING = *_INIT, Tensor.normal_, Tensor.uniform_
