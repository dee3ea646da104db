"""Functions that a user has replaced: the packed path would not call them, Hugging Face's does.

Scripts and libraries set their own function in the place of one that a modeling file, transformers'
registries or `torch.nn.functional` hold; SageAttention, for one, in the place of torch's attention.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

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
    modeling, functional = vars(sys.modules[cls.__module__]), vars(F)
    utilities = vars(sys.modules["transformers.modeling_utils"])
    masks = sys.modules.get("transformers.masking_utils")  # which no model of 4.57 may have read
    attentions = modeling.get("ALL_ATTENTION_FUNCTIONS", utilities["ALL_ATTENTION_FUNCTIONS"])
    functions = [
        attentions.get(attention),
        masks and masks.ALL_MASK_ATTENTION_FUNCTIONS.get(attention),
        *map(modeling.get, _OF_MODELING),
        *map(functional.get, _OF_TORCH),
    ]
    if _USUAL.get((cls, attention)) == functions:
        return None
    names = f"attn_implementation={attention!r}", f"the mask for {attention!r}"
    named = zip((*names, *_OF_MODELING, *_OF_TORCH), functions, strict=True)
    for name, function in named:
        if not (function is None or function in _OWN or _is_theirs(function)):
            return name
    if functions[0] is None and attention != "eager":  # whose function is the modeling file's
        return names[0]
    _USUAL[cls, attention] = functions
    return None


def _is_theirs(function: Callable[..., Any]) -> bool:
    return is_torchs(function) or is_defined_in(function, (*THEIRS, "torch."))


# torch.compile, too, asks while it traces, as `fastbert.backend` does
replaced_function._dynamo_marked_constant = True  # type: ignore[attr-defined]
_USUAL: dict[tuple[type, str], list[Any]] = {}  # the functions that were found to be usual
