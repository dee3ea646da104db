"""The random numbers that a model's weights begin with."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def draw(model: Any, names: Collection[str] | None = None) -> None:
    """Draws weights with std `initializer_range`, and zeros biases, as BERT's begin.

    names: of the only parameters to be drawn, None for those of all linear layers and embeddings
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
    """Has the constructor of a model draw nothing, because weights follow.

    Drawing those of a BERT takes longer than reading them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function in _DRAWING:
            return named["tensor"] if "tensor" in named else args[0]
        return function(*args, **named)


_INIT = nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_  # which torch's layers call
_DRAWING = *_INIT, Tensor.normal_, Tensor.uniform_
