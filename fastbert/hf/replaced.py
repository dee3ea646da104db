"""Functions that a user has replaced: the packed path would not call them, Hugging Face's does.

Scripts and libraries set their own function in the place of one that a modeling file, transformers'
registries or `torch.nn.functional` hold; SageAttention, for one, in the place of torch's attention.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from fastbert.hf.attention import attention_forward, attention_mask
from fastbert.hf.families import is_torchs
from fastbert.hf.hooks import THEIRS
from fastbert.modules.linear import is_defined_in

_OF_MODELING = (
    *("eager_attention_forward", "create_bidirectional_mask", "apply_chunking_to_forward"),
    "create_position_ids_from_input_ids",  # RoBERTa's, in 4.57
)
_OF_TORCH = (
    *("scaled_dot_product_attention", "softmax", "linear", "layer_norm", "gelu", "embedding"),
    "dropout",
)
_OWN = attention_forward, attention_mask  # of `register_attention`


def replaced_function(cls: type, attention: str) -> str | None:
    """The name of a function which a forward of `cls` would call and which is the user's own.

    None if there is none. cls: the patched class of a model or an encoder; attention: the name of
    its attention implementation.
    """
    known = _USUAL.get((cls, attention))
    if known is not None and list(map(dict.get, known[0], known[1])) == known[2]:
        return None
    modeling = vars(sys.modules[cls.__module__])
    masks = sys.modules.get("transformers.masking_utils")  # which no model of 4.57 may have read
    registries = [(sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS, "attention")]
    if masks is not None:
        registries.append((masks.ALL_MASK_ATTENTION_FUNCTIONS, "mask"))
    places: list[tuple[dict[str, Any], str, str]] = []  # where each function is, and its name
    for registry, kind in registries:  # an instance's own functions come before all instances'
        name = f"the {kind} function of {attention!r}"
        own = vars(registry).get("_local_mapping")
        shared = vars(type(registry)).get("_global_mapping")
        places += [(one, attention, name) for one in (own, shared) if one is not None]
    places += [(modeling, name, name) for name in _OF_MODELING]
    places += [(vars(F), name, name) for name in _OF_TORCH]
    functions = [place.get(key) for place, key, _ in places]
    for (_, _, name), function in zip(places, functions, strict=True):
        if not (function is None or function in _OWN or _is_theirs(function)):
            return name
    if attention != "eager" and registries[0][0].get(attention) is None:
        # unknown; eager attention's function is the modeling file's
        return f"the attention function of {attention!r}"
    _USUAL[cls, attention] = [one[0] for one in places], [one[1] for one in places], functions
    return None


def has_usual_loss(cls: type) -> bool:
    """Whether the cross-entropy of a head of `cls` is torch's class, with torch's own functions."""
    modeling = vars(sys.modules[cls.__module__])
    loss = modeling.get("CrossEntropyLoss", nn.CrossEntropyLoss)
    is_torchs_class = loss is nn.CrossEntropyLoss and is_defined_in(loss.forward, ("torch.",))
    return is_torchs_class and is_torchs(F.cross_entropy)


def _is_theirs(function: Callable[..., Any]) -> bool:
    return is_torchs(function) or is_defined_in(function, (*THEIRS, "torch."))


# torch.compile cannot trace this, so it calls it once, while it traces: functions that are replaced
# after that are not noticed in the compiled model
replaced_function._dynamo_marked_constant = True  # type: ignore[attr-defined]
# for each class and attention: dictionaries, keys, and the usual functions that were found there
_USUAL: dict[tuple[type, str], tuple[list[dict[str, Any]], list[str], list[Any]]] = {}
