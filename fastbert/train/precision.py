"""The precision of a run: autocast and loss scaling."""

import torch
from torch import nn

from fastbert import backend
from fastbert.check import InputError
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.ops.fp8_linear import multiplies_fp8

# Autocast's dtypes; with "fp8", this dtype is for all but the encoder's matrix products.
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context for a precision, disabled for "fp32"."""
    dtype = LOW_PRECISION.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=precision in LOW_PRECISION)


def cast_once(model: nn.Module, precision: str) -> None:
    """Casts an encoder's fixed weights once, which autocast would do at every batch."""
    WeightCopies(model, LOW_PRECISION.get(precision)).attach()


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """A scaler of the loss against underflow of fp16 gradients; disabled in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def resolve_precision(wanted: str, *, trains: bool = False) -> str:
    """The precision to use: "auto" becomes bf16 if the hardware multiplies in it, else fp32.

    trains: allows "fp8". Raises InputError for an unknown precision, and for FP8 on hardware
    without it, unless the reference backend is forced, which emulates it.
    """
    known = ("auto", "bf16", "fp16", "fp32", *(("fp8",) if trains else ()))
    if wanted not in known:
        raise InputError(f"--precision: expected one of {', '.join(known)}, got {wanted!r}")
    if wanted == "fp8" and not _has_fp8() and backend.forced() != "reference":
        raise InputError(
            "--precision fp8: needs a GPU that multiplies FP8 (compute capability 8.9 or later); "
            "use bf16, or set FASTBERT_BACKEND=reference to emulate FP8 slowly"
        )
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def _has_fp8() -> bool:
    return torch.cuda.is_available() and multiplies_fp8(torch.device("cuda"))
