"""Reads the arguments that `from_pretrained` shares with transformers."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.check import require

DOWNLOAD = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# How transformers reads a checkpoint. None of these change the model: fastbert always prefers
# safetensors, reads pickles with weights_only, and runs no remote code.
_WITHOUT_EFFECT = {"low_cpu_mem_usage", "use_safetensors", "weights_only", "trust_remote_code"}


def for_constructor(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a model class's constructor takes: all of them if it has `**kwargs`.

    Other options are dropped if they are None, False or without effect, else raise ValueError.
    """
    parameters = inspect.signature(kind).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    known = options.keys() - _WITHOUT_EFFECT if takes_all else parameters.keys()
    for name, value in options.items():
        is_nothing = value is None or value is False or name in _WITHOUT_EFFECT
        require(
            name in known or is_nothing,
            f"{kind.__name__}.from_pretrained",
            "only options that fastbert's models use",
            name,
            "leave it out, or use a Hugging Face model patched by fastbert.patch",
        )
    return {name: value for name, value in options.items() if name in known}


def device_of(device_map: Any) -> torch.device | None:
    """The device that a device_map names, or None if it is None; ValueError if it names several."""
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    is_one = device_map is None or isinstance(device_map, (str, int, torch.device))
    require(is_one, "device_map", 'one device or "auto" for the whole model', repr(device_map))
    return None if device_map is None else torch.device(device_map)


def dtype_of(dtype: torch.dtype | str | None, weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype, "auto" for the weights', or None for None; ValueError unless floating-point."""
    if dtype == "auto":
        return next((x.dtype for x in weights.values() if x.is_floating_point()), None)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    is_one = dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point)
    require(is_one, "dtype", 'a floating-point dtype, its name or "auto"', repr(dtype))
    return found
