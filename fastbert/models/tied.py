"""Ties parameters again after a state dict was loaded, and separates them in one to be saved."""

from typing import Any

from torch import nn


def set_apart(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Copies tied parameters in a state dict, all but the first name's, because Trainer saves with
    safetensors, which refuses tensors that share memory."""
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = state.get(prefix + name)
        if parameter in seen and tensor is not None and not isinstance(tensor, nn.Parameter):
            state[prefix + name] = tensor.clone()
        seen.add(parameter)


def tie_again(model: Any, _: Any) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    pairs = model._tied_weights_keys
    if names.issuperset([*pairs, *pairs.values()]):  # otherwise another library wrapped a module
        model.tie_weights()
