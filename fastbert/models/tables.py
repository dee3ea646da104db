"""Resizes embeddings and decoders, and keeps tied ones tied when state dicts come and go."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def resize(table: nn.Embedding | nn.Linear, count: int, std: float | None) -> None:
    """Gives an embedding, or a decoder, `count` rows in new parameters; old rows keep their values.

    New rows are drawn around 0 with the given std. If std is None, they are drawn close to the mean
    of the old rows, so that a decoder's probabilities hardly change at first (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    table.weight = _resized(table.weight, count, std)
    if isinstance(table, nn.Embedding):
        table.num_embeddings = count
        if table.padding_idx is not None and table.padding_idx >= count:
            table.padding_idx = None
        return
    table.out_features = count
    if table.bias is not None:
        table.bias = _resized(table.bias, count, None if std is None else 0.0)


def _resized(old: Tensor, count: int, std: float | None) -> nn.Parameter:
    added = max(count - len(old), 0)
    noise = torch.randn(added, *old.shape[1:], device=old.device, dtype=old.dtype)
    if std is None:
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        extra = wide.mean(0) + 3e-5 * wide.std(0) * noise
    else:
        extra = std * noise
    rows = torch.cat([old[:count], extra.to(old.dtype)])
    return nn.Parameter(rows, requires_grad=old.requires_grad)


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
    """Ties parameters again after a state dict was loaded."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    pairs = model._tied_weights_keys
    if names.issuperset([*pairs, *pairs.values()]):  # otherwise another library wrapped a module
        model.tie_weights()
