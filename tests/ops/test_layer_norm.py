import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from tests.oracle import assert_as_accurate, gradients

SHAPES = [(3, 7), (2, 5, 768), (257, 100), (4, 1024), (0, 16)]
NAMES = ("y", "dx", "dweight", "dbias")


@pytest.fixture(params=["triton", "reference"])
def body(request, device):
    try:
        backend.load(request.param, "layer_norm", device)
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    with backend.use(request.param):
        yield request.param


def native(eps):
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype)
    return x, weight, bias, torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("eps", [1e-12, 0.5])  # 0.5: an eps that is dropped shows
@pytest.mark.usefixtures("body")
def test_is_as_accurate_as_pytorch(eps, dtype, shape, device):
    x, weight, bias, dy = inputs(shape, dtype, device)
    actual = gradients(lambda *t: layer_norm(*t, eps), x, weight, bias, dy=dy)
    expected = gradients(native(eps), x, weight, bias, dy=dy)
    truth = gradients(native(eps), x.double(), weight.double(), bias.double(), dy=dy)
    assert_as_accurate(actual, expected, truth, names=NAMES)


@pytest.mark.usefixtures("body")
def test_reads_rows_that_lie_apart_and_mixed_dtypes(device):
    wide = torch.randn(9, 64, device=device)
    x, dy = wide[:, :40].half(), torch.randn(9, 40, device=device).half()
    x = torch.nn.functional.pad(x, (0, 24))[:, :40]
    assert not x.is_contiguous()
    weight, bias = torch.randn(2, 40, device=device)
    y, dx, dweight, _ = gradients(lambda *t: layer_norm(*t, 1e-5), x, weight, bias, dy=dy)
    expected = gradients(native(1e-5), x.float(), weight, bias, dy=dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.half, torch.half, torch.float32)
    torch.testing.assert_close(y, expected[0].half())
    torch.testing.assert_close(dweight, expected[2], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("body")
def test_the_backward_gives_the_same_bits_each_time(device):
    x, weight, bias, dy = inputs((1030, 24), torch.float32, device)  # more rows than programs
    first, second = (gradients(layer_norm, x, weight, bias, dy=dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = gradients(native(1e-12), x.double(), weight.double(), bias.double(), dy=dy)
    torch.testing.assert_close(first[2].double(), expected[2], rtol=1e-4, atol=1e-4)


def test_a_forced_backend_never_falls_back():
    x = torch.ones(2, 4, dtype=torch.float64)
    with backend.use("triton"), pytest.raises(backend.BackendUnavailable, match=r"layer_norm.*64"):
        layer_norm(x, x[0], x[0])


def test_a_wrong_weight_is_named(device):
    x = torch.ones(2, 4, device=device)
    with (
        backend.use("triton"),
        pytest.raises(ValueError, match=r"layer_norm: expected weight of shape \(4,\), got \(3,\)"),
    ):
        layer_norm(x, x[0, :3], x[0])


def test_dropout_add_layer_norm_keeps_the_residuals_dtype():
    x, residual = torch.randn(5, 8).bfloat16(), torch.randn(5, 8)
    weight, bias = torch.randn(2, 8)
    y = dropout_add_layer_norm(x, residual, weight, bias)
    torch.testing.assert_close(y, native(1e-12)(residual + x, weight, bias))
    assert y.dtype == residual.dtype
    dropped = dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.999)
    torch.testing.assert_close(dropped, native(1e-12)(residual, weight, bias))
