import contextlib

import pytest
import torch

from fastbert import backend
from fastbert.ops import attention_plain


@pytest.fixture(params=["triton", "by sequence", "padded", "short"])
def body(request, monkeypatch, device):
    """All plain strategies run on a CPU here, where the lengths choose one of two."""
    if request.param == "padded":
        monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)
    short = 2**60 if request.param == "short" else 0
    for name, value in (("SHORT_ALIKE", short), ("SHORT", short), ("MANY", 0)):
        monkeypatch.setattr(attention_plain, name, value)
    if request.param == "triton":
        request.getfixturevalue("triton")
    if request.param in ("by sequence", "short") and device != "cpu":
        pytest.skip("would make the host wait")
    with backend.use("triton" if request.param == "triton" else "reference"):
        yield request.param


@pytest.fixture
def triton(monkeypatch, device):
    """With products of float32 as PyTorch has them, not the default on tensor cores."""
    with _triton(monkeypatch, "ieee", device):
        yield


@pytest.fixture(params=["ieee", pytest.param("tf32x3", marks=pytest.mark.gpu)])
def triton_either_way(request, monkeypatch, device, dtype):
    """With either way that the kernels have for products of float32."""
    if request.param == "tf32x3" and (device == "cpu" or dtype != torch.float32):
        pytest.skip("only float32 on a GPU has another way")
    with _triton(monkeypatch, request.param, device):
        yield


@contextlib.contextmanager
def _triton(monkeypatch, precision, device):
    try:
        backend.load("triton", "attention", device)
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    from fastbert.kernels import attention_common

    monkeypatch.setattr(attention_common, "FLOAT32_PRECISION", precision)
    with backend.use("triton"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
