"""Who watches a module of a patched model, and would notice that its forward is not called."""

import sys
from collections.abc import Callable, Iterator

from torch import nn

_CAPTURE = "transformers.utils.output_capturing"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return "forward" in vars(module) or any(map(_is_awake, _hooks(module)))


def is_observed(layer: nn.Module) -> bool:
    """Whether something looks at the layer's input and output, which must then be (B, S, H).

    FSDP's hooks only move parameters, so they may see what flows.
    """
    if "forward" in vars(layer):
        return True
    return any(_is_awake(hook) and not _is_fsdp(hook) for hook in _hooks(layer))


def _hooks(module: nn.Module) -> Iterator[Callable]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()
    yield from module._backward_hooks.values()
    yield from module._backward_pre_hooks.values()


def _is_awake(hook: Callable) -> bool:
    """transformers 5 captures hidden states by hooks that stay for good, and sleep until asked."""
    if _module(hook) != _CAPTURE:
        return True
    return bool(sys.modules[_CAPTURE]._active_collector.get())


def _is_fsdp(hook: Callable) -> bool:
    return _module(hook).startswith("torch.distributed.")


def _module(hook: Callable) -> str:
    return getattr(hook, "__module__", None) or type(hook).__module__
