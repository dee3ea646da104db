import contextlib

import pytest
import torch

from fastbert import backend
from fastbert.ops import attention_plain


@pytest.fixture(params=["triton", "by sequence", "padded"])
def body(request, monkeypatch, device):
    """Both plain strategies run on a CPU here; which one runs is chosen by the device."""
    if request.param == "padded":
        monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)
    if request.param == "triton":
        request.getfixturevalue("triton")
    if request.param == "by sequence" and device != "cpu":
        pytest.skip("would make the host wait")
    with backend.use("triton" if request.param == "triton" else "reference"):
        yield request.param


@pytest.fixture
def triton(monkeypatch):
    """With products of float32 as PyTorch has them, not the default on tensor cores."""
    with _triton(monkeypatch, "ieee"):
        yield


@pytest.fixture(params=["ieee", pytest.param("tf32x3", marks=pytest.mark.gpu)])
def triton_either_way(request, monkeypatch, device, dtype):
    """With either way that the kernels have for products of float32."""
    if request.param == "tf32x3" and (device == "cpu" or dtype != torch.float32):
        pytest.skip("only float32 on a GPU has another way")
    with _triton(monkeypatch, request.param):
        yield


@pytest.fixture(params=["of the table", "whole"])
def backward(request, monkeypatch):
    """The kernels that run as it is, and the one that has a whole sequence in a program."""
    if request.param == "whole":
        from fastbert.kernels import attention
        from fastbert.kernels.attention_common import Tile

        if "dtype" in request.fixturenames and request.getfixturevalue("dtype").itemsize != 2:
            pytest.skip("for 16 bits only")
        monkeypatch.setattr(attention, "single_tile", lambda *_, **__: None)
        monkeypatch.setattr(attention, "whole_tile", lambda *_, **__: Tile(64, 64, 4, 1))


@contextlib.contextmanager
def _triton(monkeypatch, precision):
    from fastbert.kernels import attention_common

    monkeypatch.setattr(attention_common, "FLOAT32_PRECISION", precision)
    with backend.use("triton"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
