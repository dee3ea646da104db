"""The precision of a run: autocast and loss scaling."""

import torch

from fastbert.check import InputError

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for a precision; autocast is off unless that is "bf16" or "fp16"."""
    dtype = LOW_PRECISION.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=precision in LOW_PRECISION)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss against underflow of fp16 gradients; does nothing in another precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def resolve_precision(wanted: str) -> str:
    """The precision that is meant: "auto" is bf16 if the hardware multiplies in it, else fp32.

    Raises InputError for an unknown precision.
    """
    if wanted not in ("auto", "fp32", *LOW_PRECISION):
        raise InputError(f"--precision: one of auto, bf16, fp16, fp32, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
