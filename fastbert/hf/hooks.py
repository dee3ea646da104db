"""Detects hooks and replaced classes, for which a module of a patched model must be called."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastbert.modules.linear import each_hook, is_defined_in, is_of_weights
from fastbert.modules.plan import is_awake

# Attributes of a patched class, which its subclasses inherit.
ORIGINAL = "_fastbert_original_class"  # the class that it replaces
PATCHED = "_fastbert_patched_class"  # the patched class itself
FAMILY = "_fastbert_family"  # its `Family`
THEIRS = "transformers.", "fastbert.hf."


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has active hooks, or a forward set on the instance."""
    return "forward" in vars(module) or any(map(is_awake, each_hook(module)))


def is_observed(layer: nn.Module) -> bool:
    """Whether a hook or replaced forward sees input and output, which must then be (B, S, H)."""
    return "forward" in vars(layer) or any(map(_observes, each_hook(layer)))


def works_by_token(leaf: nn.Module) -> bool:
    """Whether a module used as linear layer, norm or embedding treats each token separately.

    Any other module, or a hook, might read along the sequence, so it must see (B, S, H).
    """
    cls = type(leaf)
    is_known = (cls.__module__, cls.__name__) in _BY_TOKEN
    if isinstance(leaf, nn.LayerNorm):
        is_known = is_known and len(leaf.normalized_shape) == 1
    inside = leaf.modules() if leaf._modules else (leaf,)  # also what is inside an adapter
    return is_known and not any(map(is_observed, inside))


# Classes with other weights or products, whose output rows depend only on the same input row.
_BY_TOKEN = {
    ("torch.nn.modules.linear", "Linear"),  # with hooks that only touch weights
    ("torch.nn.modules.normalization", "LayerNorm"),
    ("torch.nn.modules.sparse", "Embedding"),
    ("torch.nn.utils.parametrize", "ParametrizedLinear"),
    ("torch.nn.utils.parametrize", "ParametrizedLayerNorm"),
    ("torch.ao.nn.quantized.dynamic.modules.linear", "Linear"),
    ("bitsandbytes.nn.modules", "Linear8bitLt"),
    ("bitsandbytes.nn.modules", "Linear4bit"),
    ("peft.tuners.lora.layer", "Linear"),  # with adapter_names it has a hook, so is observed
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
}


def is_theirs(module: nn.Module) -> bool:
    """Whether a module's class and its forward are transformers' own, patched or not."""
    return type(module).__module__.startswith("transformers.models.") and has_their(
        module, "forward"
    )


def has_their(module: nn.Module, method: str) -> bool:
    """Whether a method of the module's class is transformers' or `patch`'s, or there is none."""
    cls = type(module)
    kinds = cls, getattr(cls, ORIGINAL, cls)
    methods = (getattr(kind, method, None) for kind in kinds)
    return all(one is None or is_defined_in(one, THEIRS) for one in methods)


def see_arguments(layers: nn.ModuleList) -> bool:
    """Whether a hook, or a forward set on a layer, sees all arguments of the layer: the packed path
    passes other arguments than Hugging Face's."""
    for layer in layers._modules.values():
        # accelerate's hooks, which pass all arguments on, keep what they call under this name
        own = vars(layer).get("_old_forward" if "_hf_hook" in vars(layer) else "forward")
        if own is not None and getattr(own, "__func__", None) is not type(layer).forward:
            return True
        before, with_kwargs = layer._forward_pre_hooks, layer._forward_hooks_with_kwargs
        if before or with_kwargs:
            hooks = (hook for key, hook in layer._forward_hooks.items() if key in with_kwargs)
            if any(map(_observes, (*before.values(), *hooks))):
                return True
    return False


def _observes(hook: Callable[..., Any]) -> bool:
    return is_awake(hook) and not is_of_weights(hook)
