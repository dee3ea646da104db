import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops.bias_gelu import bias_gelu
from tests.oracle import assert_as_accurate, gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 384), (37, 300), (9, 1024), (0, 16)]
NAMES = ("y", "dx", "dbias")
# NumPy, in the interpreter, remarks on infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
approximations = pytest.mark.parametrize("approximate", ["none", "tanh"])


def ours(approximate):
    return lambda x, bias: bias_gelu(x, bias, approximate=approximate)


def plain(approximate):
    return lambda x, bias: F.gelu(x + bias, approximate=approximate)


def inputs(shape, dtype, device):
    """Mostly moderate values, some in either tail."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) * 2.5
    return (
        x.to(dtype),
        torch.randn(shape[-1], device=device).to(dtype),
        torch.randn_like(x).to(dtype),
    )


def compare(x, bias, dy, approximate):
    actual = gradients(ours(approximate), x, bias, dy=dy)
    same_dtype = gradients(plain(approximate), x, bias, dy=dy)
    truth = gradients(plain(approximate), x.double(), bias.double(), dy=dy)
    assert_as_accurate(actual, same_dtype, truth, names=NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@approximations
@pytest.mark.usefixtures("body")
def test_is_as_accurate_as_pytorch(approximate, dtype, shape, device):
    compare(*inputs(shape, dtype, device), approximate)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4099, 3072), (2048, 4096)], ids=["base", "large"])
@approximations
def test_is_as_accurate_as_pytorch_at_berts_sizes(approximate, dtype, shape):
    with backend.use("triton"):
        compare(*inputs(shape, dtype, "cuda"), approximate)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_do_not_wrap_beyond_2_to_the_31_elements():
    rows, cols = 2**19 + 3, 4096
    x = torch.randn(cols, device="cuda").bfloat16().expand(rows, cols).contiguous()
    x[-1] = 1.0
    bias, dy = torch.zeros(cols, device="cuda"), torch.ones_like(x)
    with backend.use("triton"):
        y, dx, dbias = gradients(ours("none"), x, bias, dy=dy)
    slope = gradients(plain("none"), x[:1].float(), bias, dy=dy[:1])[1]
    torch.testing.assert_close(y[-2], plain("none")(x[0].float(), bias).bfloat16())
    assert (y[-1] == F.gelu(x[-1])).all()
    torch.testing.assert_close(dx[-2], slope[0].bfloat16())
    torch.testing.assert_close(dbias, slope[0] * (rows - 1), rtol=1e-3, atol=10)


@approximations
@pytest.mark.usefixtures("body")
def test_small_values_in_float32(approximate, device):
    """Where an approximation that half precision hides would show."""
    x, bias, dy = inputs((64, 32), torch.float32, device)
    compare(x / 8, bias / 8, dy, approximate)


@approximations
def test_the_lower_tail_keeps_its_digits(approximate, device):
    """Where 1 + erf(x) cancels, as in PyTorch's own: gelu(-4.5) is -1.5e-5."""
    x = torch.linspace(-4.5, -2, 64, device=device).half()
    with backend.use("triton"):
        y = bias_gelu(x, torch.zeros_like(x), approximate=approximate)
    truth = F.gelu(x.double(), approximate=approximate)
    subnormal = 2**-24
    assert ((y.double() - truth).abs() <= truth.abs() * 2e-3 + subnormal).all()


@approximations
@pytest.mark.usefixtures("body")
def test_values_that_are_not_finite(approximate, dtype, device):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 6e4, -6e4], device=device)
    bias = torch.zeros(5, device=device)
    y, dx, _ = gradients(ours(approximate), x[None].to(dtype), bias, dy=torch.ones_like(x[None]))
    assert not y[0, 0].isfinite()  # PyTorch's own is inf or NaN, by device
    assert y[0, 1:3].isnan().all()
    assert dx[0, :3].isnan().all()
    assert y[0, 3:].tolist() == [x[3].to(dtype).item(), 0]
    assert dx[0, 3:].tolist() == [1, 0]


@pytest.mark.usefixtures("body")
def test_reads_rows_that_lie_apart_and_mixed_dtypes(device):
    wide = torch.randn(9, 64, device=device).half()
    bias = torch.randn(40, 2, device=device)[:, 0]
    dy = torch.randn(9, 80, device=device).half()[:, 11:51]
    for x in (wide[:, :40], wide[:, 11:51]):
        y, dx, dbias = gradients_as_they_lie(x, bias, dy)
        expected = gradients(plain("none"), x.float(), bias, dy=dy)
        assert (y.dtype, dx.dtype, dbias.dtype) == (torch.half, torch.half, torch.float32)
        torch.testing.assert_close(y, expected[0].half())
        torch.testing.assert_close(dx, expected[1].half())
        torch.testing.assert_close(dbias, expected[2], rtol=1e-3, atol=1e-3)


def gradients_as_they_lie(x, bias, dy):
    """As `gradients`, whose copies would be contiguous."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = bias_gelu(x, bias)
    return y.detach(), *torch.autograd.grad(y, (x, bias), dy)


@pytest.mark.usefixtures("body")
def test_a_transposed_input_and_an_expanded_gradient(device):
    x, bias = torch.randn(24, 6, device=device).t(), torch.randn(24, device=device)
    dy = torch.tensor(2.0, device=device).expand(6, 24)
    actual = gradients_as_they_lie(x, bias, dy)
    for a, e in zip(actual, gradients(plain("none"), x, bias, dy=dy), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("body")
def test_the_backward_gives_the_same_bits_each_time(device):
    x, bias, dy = inputs((530, 24), torch.float32, device)  # more tiles than programs
    first, second = (gradients(bias_gelu, x, bias, dy=dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    compare(x, bias, dy, "none")


def test_keeps_only_its_inputs_for_the_backward(device):
    x, bias, _ = inputs((4, 16), torch.float32, device)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with backend.use("triton"), hooks:
        bias_gelu(x.requires_grad_(), bias.requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), bias.data_ptr()}


@approximations
def test_is_traced_into_a_graph(approximate, device):
    x, bias, dy = inputs((5, 40), torch.float32, device)
    with backend.use("triton"):
        eager = gradients(ours(approximate), x, bias, dy=dy)
        compiled = torch.compile(ours(approximate), fullgraph=True, backend="aot_eager")
        for e, c in zip(eager, gradients(compiled, x, bias, dy=dy), strict=True):
            assert torch.equal(e, c)


def test_a_forced_backend_never_falls_back():
    x = torch.ones(2, 4, dtype=torch.float64)
    with backend.use("triton"):
        with pytest.raises(backend.BackendUnavailable, match=r"bias_gelu.*float64"):
            bias_gelu(x, x[0])
        with pytest.raises(backend.BackendUnavailable, match=r"bias_gelu.*bias of torch.float64"):
            bias_gelu(x.float(), x[0])
        with pytest.raises(backend.BackendUnavailable, match=r"x on cpu and bias on meta"):
            bias_gelu(x.float(), x[0].float().to("meta"))


@pytest.mark.usefixtures("body")
def test_wrong_arguments_are_named(device):
    x = torch.ones(2, 4, device=device)
    with pytest.raises(ValueError, match=r"bias_gelu: expected bias of shape \(4,\), got \(3,\)"):
        bias_gelu(x, x[0, :3])
    with pytest.raises(ValueError, match=r'expected approximate "none" or "tanh", got erf'):
        bias_gelu(x, x[0], approximate="erf")


def test_float64_is_computed_in_float64():
    x, bias = torch.randn(3, 8).double(), torch.randn(8).double()
    assert torch.equal(bias_gelu(x, bias), F.gelu(x + bias))
