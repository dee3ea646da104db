"""In which precision a run computes."""

import torch

from fastbert.check import InputError

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = LOW_PRECISION.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=precision in LOW_PRECISION)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Of the loss, against underflow in fp16; with another precision it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def resolve_precision(wanted: str) -> str:
    """What `auto` stands for: bf16 where this machine multiplies in it, else fp32."""
    if wanted not in ("auto", "fp32", *LOW_PRECISION):
        raise InputError(f"--precision: one of auto, bf16, fp16, fp32, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
